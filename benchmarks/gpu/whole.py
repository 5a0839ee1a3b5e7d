"""The cases of `gpu.bench` that users feel: from preference to model by the clock, and a step of router training."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

import paretofuse as pf
from benchmarks.gpu.cases import Case, Contender, Tools, allowed, merged_exactly, row_of, short, stacked
from paretofuse.engine.layout import TILE
from paretofuse.engine.training.captured import CapturedMeasure


def switch_case(name: str, make: Callable[[], nn.Module], experts: int, tools: Tools) -> Case:
    """The live module at a new preference: routers, copy and launch of ours, beside what people do without us.

    They keep a merged state dict for each preference in pinned host memory and load it, or add the deltas up by
    PyTorch's own batched operations.
    """
    engine = stacked(make(), experts, tools)
    flat = engine._bound.flat[0]
    n, item, dtype = flat.base.numel(), flat.base.element_size(), flat.base.dtype
    preference = [1 / experts] * experts
    with torch.no_grad():
        weights = engine.routers(preference)
    engine.switch(preference)
    rows = torch.cat([weights, weights.new_zeros(1, experts)])[None].to(
        tools.device
    )  # nothing is static here
    truth = merged_exactly(flat, rows)
    moved = n * (2 + experts) * item
    case = Case(f"switch {name} {short(dtype)} E={experts}", truth, 2 * experts * n)

    def flatten(state: dict[str, Tensor]) -> Tensor:
        target = torch.zeros(1, n, dtype=dtype, device=tools.device)
        for key, view in flat.bucket.view(target[0]).items():
            view.copy_(state[key])
        return target

    def ours() -> dict[str, Tensor]:
        engine.switch(preference)
        return engine.module.state_dict()

    once = torch.finfo(dtype).eps / 2 + 1e-6
    case.contenders["engine.switch(preference)"] = Contender(ours, moved, once, flatten, ours=True)
    kept = {key: value.cpu() for key, value in engine.module.state_dict().items()}
    if tools.device.type == "cuda":
        kept = {key: value.pin_memory() for key, value in kept.items()}
    other = copy.deepcopy(engine.module)

    def load() -> dict[str, Tensor]:
        other.load_state_dict(kept)
        return other.state_dict()

    case.contenders["load_state_dict, merged before"] = Contender(load, 2 * n * item, once, flatten)
    base = flat.bucket.view(flat.base)
    planes = {key: engine._bound.deltas[key] for key in base}
    out = {key: torch.empty_like(value) for key, value in base.items()}
    table = rows[0, flat.tiles.long()]  # [tiles, E]
    starts = zip(flat.bucket.specs, flat.bucket.offsets, strict=True)
    shares = {spec.name: table[offset // TILE].tolist() for spec, offset in starts}

    def foreach() -> dict[str, Tensor]:
        targets = list(out.values())
        torch._foreach_copy_(targets, list(base.values()))
        for e in range(experts):
            terms = torch._foreach_mul([planes[key][e] for key in base], [shares[key][e] for key in base])
            torch._foreach_add_(targets, terms)
        return out

    case.contenders["torch._foreach, known weights"] = Contender(foreach, moved, allowed(dtype, 32), flatten)
    return case


def step_case(name: str, make: Callable[[], nn.Module], experts: int, batch: int, tools: Tools) -> Case:
    """Forward, backward and the routing weights' gradient of a vision model, beside the dense step that it contains."""
    model = make().float()
    size = int(model.config.image_size)
    engine = stacked(model, experts, tools)
    generator = torch.Generator(tools.device).manual_seed(6)
    images = torch.randn(batch, 3, size, size, generator=generator, device=tools.device)
    preference = row_of(0, experts)

    def ours() -> Tensor:
        engine.train_at(preference)
        found: Tensor = engine.jacobian([_pooled(engine.module, images)])[0]
        return found

    dense = engine.merge(preference).requires_grad_()
    parameters = list(dense.parameters())

    def plain() -> tuple[Tensor, ...]:
        return torch.autograd.grad(_pooled(dense, images), parameters, allow_unused=True)

    truth = _truth(engine, dense, images)
    n = sum(p.numel() for p in parameters)
    flops = 6 * n * batch * (size // int(model.config.patch_size)) ** 2
    case = Case(f"router step {name} fp32 E={experts}, {batch} images", truth, flops)
    moved = n * (4 + experts) * 4
    # Sums of millions of products, in another order than the truth's.
    case.contenders["ours"] = Contender(ours, moved, 2e-3, ours=True)
    if tools.device.type == "cuda":
        case.contenders["ours, captured"] = Contender(_captured(engine, images, preference), moved, 2e-3)
    case.contenders["forward and backward alone"] = Contender(
        plain, 3 * n * 4, 2e-3, lambda gradients: _reduced(engine, dense, gradients)
    )
    return case


def _pooled(module: nn.Module, images: Tensor) -> Tensor:
    """The loss of a step."""
    loss: Tensor = module(images).pooler_output.square().mean()
    return loss


def _captured(engine: pf.Engine, images: Tensor, preference: list[float]) -> Callable[[], Tensor]:
    """A step's replay, captured when first made, once a step was taken in the ordinary way."""
    made: list[CapturedMeasure] = []
    objective = pf.Objective(engine.objectives[0], [images], _pooled)
    numbers = np.array(preference)

    def replay() -> Tensor:
        if not made:
            engine.train_at(preference)
            engine.jacobian([_pooled(engine.module, images)])
            made.append(CapturedMeasure(engine, [objective], [images], 1))
        found = made[0].measure(numbers, [images])[0, 1:]
        return found.view(-1, len(engine.objectives)).to(images.device)

    return replay


def _truth(engine: pf.Engine, dense: nn.Module, images: Tensor) -> Tensor:
    """dLoss/dweights [G, E] by autograd in float64: each group's sum of <dLoss/dW, delta>."""
    state = {key: value.detach().double().requires_grad_() for key, value in dense.named_parameters()}
    loss = (
        functional_call(copy.deepcopy(dense).double(), state, (images.double(),))
        .pooler_output.square()
        .mean()
    )
    return _reduced(engine, dense, torch.autograd.grad(loss, list(state.values()), allow_unused=True))


def _reduced(engine: pf.Engine, dense: nn.Module, gradients: tuple[Tensor | None, ...]) -> Tensor:
    """A dense gradient's inner products with the deltas, summed by group, in float64 [G, E]."""
    found = torch.zeros(
        len(engine.groups),
        len(engine.objectives),
        dtype=torch.float64,
        device=next(dense.parameters()).device,
    )
    for (key, _), gradient in zip(dense.named_parameters(), gradients, strict=True):
        group = engine.tensor_groups.get(key)
        if group is not None and gradient is not None:
            deltas = engine._bound.deltas[key].double().flatten(1)
            found[engine.groups.index(group)] += deltas @ gradient.double().flatten()
    return found
