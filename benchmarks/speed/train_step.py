"""What does learning cost? A router step at ViT-B/32's size against a plain dense forward and backward.

Batch 16, E = 8, two tasks. Ours: merge at a preference, a forward and a backward for each task's loss with the
Jacobian of the routing weights, then the routers' own backward and Adam; every tensor is routed. Plain: the same
module as an ordinary one, a forward and a backward with weight gradients for the same two batches, nothing else.
PWEMoE: its module around each attention and MLP block, its training step. Ours with a sketch: rank-16 planes stand in
for the experts' in the gradient of linear layers, as `pf.fit(sketch=16)` has it. LoRA experts: of every linear layer,
their own factors, which no weight gradient is needed for either. Families: ours with coefficients of rows, and of
columns besides.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import paretofuse as pf
from benchmarks.harness.record import Options, Row, check, interleave, milliseconds, paired_ratio
from benchmarks.models import clip
from paretofuse.engine.routing.families import FAMILIES

PREFERENCE = (0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05)
SKETCH = 16
LORA = ((16, "<= 0.80"), (4, "<= 0.75"))
"""Ranks of eight LoRA experts, and what a step over them should take of a plain one."""

Batch = tuple[Tensor, Tensor]


def batch_size(options: Options) -> int:
    """Images in a batch."""
    return 2 if options.quick else 16


def our_step(engine: pf.Engine, batches: list[Batch], *, materialize: bool = True) -> Callable[[], object]:
    """A router step as `pf.fit` takes it, by linear scalarization; through the fused module unless `materialize`."""
    module = engine.module if materialize else engine.fused_module
    optimizer = torch.optim.Adam(engine.routers.parameters(), lr=1e-4)
    shares = torch.tensor(PREFERENCE[: len(batches)], dtype=torch.float64)

    def step() -> None:
        weights = engine.train_at(PREFERENCE, materialize=materialize)
        rows = [engine.jacobian([clip.classify(module, batch)])[0] for batch in batches]
        direction = torch.tensordot(shares, torch.stack(rows), 1)
        optimizer.zero_grad()
        weights.backward(direction.to(weights.dtype))
        optimizer.step()

    return step


def dense_step(model: nn.Module, batches: list[Batch]) -> Callable[[], object]:
    """Forward and backward of each batch, with all weight gradients; no optimizer."""
    model.requires_grad_(True)

    def step() -> None:
        for batch in batches:
            model.zero_grad(set_to_none=True)
            clip.classify(model, batch).backward()

    return step


def pwemoe_step(model: nn.Module, batches: list[Batch]) -> Callable[[], object]:
    """A step as fusion-bench's PWEMoEAlgorithmForCLIP takes it, by linear scalarization."""
    set_preference = clip.pwemoe_class().set_preferenece_vector
    routers = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(routers, lr=1e-4)
    ray = torch.tensor(PREFERENCE)

    def step() -> None:
        set_preference(model, ray)
        losses = [clip.classify(model, batch) for batch in batches]
        total = sum(r * loss for r, loss in zip(ray, losses, strict=False))
        optimizer.zero_grad()
        assert isinstance(total, Tensor)
        total.backward()
        optimizer.step()

    return step


def run(options: Options) -> list[Row]:
    """Measure the three side by side in one process."""
    torch.set_num_threads(options.threads)
    base = clip.vision_tower(options.quick)
    batches = clip.batches(base, batch_size(options))
    with tempfile.TemporaryDirectory(prefix="paretofuse-") as folder:
        experts = clip.write_experts(base, Path(folder))
        engine = pf.stack(base, experts)
        theirs = clip.vision_tower(options.quick)
        clip.upscale(theirs, experts)
    dense = base  # its own weights matter no more
    _check_gradients(engine, dense, batches)
    _check_pwemoe(engine, theirs, batches)

    steps: dict[str, Callable[[], object]] = {
        "ours": our_step(engine, batches),
        "plain dense": dense_step(dense, batches),
        "PWEMoE": pwemoe_step(theirs, batches),
    }
    seconds = interleave(steps, options.repeat(7))
    share = paired_ratio(seconds["ours"], seconds["plain dense"])
    rows = [_row("ours", seconds, "ours / plain dense", share, "<= 1.10"), _row("plain dense", seconds)]
    speedup = paired_ratio(seconds["PWEMoE"], seconds["ours"])
    rows.append(_row("PWEMoE", seconds, "theirs / ours", speedup))
    with engine._in_place.sketched(SKETCH, materialize=True):
        name = f"ours, sketch {SKETCH}"
        seconds = interleave({name: steps["ours"], "plain dense": steps["plain dense"]}, options.repeat(7))
    share = paired_ratio(seconds[name], seconds["plain dense"])
    rows.append(_row(name, seconds, "ours / plain dense", share, "<= 0.80"))
    for family in FAMILIES[1:]:
        engine.set_family(family)
        name = f"ours, {family}"
        seconds = interleave(
            {name: our_step(engine, batches), "plain dense": steps["plain dense"]}, options.repeat(7)
        )
        share = paired_ratio(seconds[name], seconds["plain dense"])
        rows.append(_row(name, seconds, "ours / plain dense", share))
    for rank, target in LORA:
        name = f"ours, 8 LoRAs of rank {rank}"
        seconds = _with_adapters(name, rank, dense, batches, steps["plain dense"], options)
        share = paired_ratio(seconds[name], seconds["plain dense"])
        rows.append(_row(name, seconds, "ours / plain dense", share, target))
    return rows


def _with_adapters(
    name: str,
    rank: int,
    dense: nn.Module,
    batches: list[Batch],
    plain: Callable[[], object],
    options: Options,
) -> dict[str, list[float]]:
    """Steps over LoRA experts, which are their own sketches, in turns with plain ones; checked first."""
    base = clip.vision_tower(options.quick)
    with tempfile.TemporaryDirectory(prefix="paretofuse-") as folder:
        engine = pf.stack(base, clip.write_adapters(base, Path(folder), rank), planes="auto")

    def jacobian() -> Tensor:
        engine.train_at(PREFERENCE)
        return engine.jacobian([clip.classify(engine.module, batches[0])])[0]

    exact = jacobian()
    with engine._in_place.sketched(rank, materialize=True):
        error, scale = (jacobian() - exact).abs().max().item(), exact.abs().max().item()
        check(
            scale > 0 and error <= 1e-4 * scale,
            f"by factors the Jacobian is off by {error:.3g} of {scale:.3g}",
        )
        dense.requires_grad_(True)
        return interleave({name: our_step(engine, batches), "plain dense": plain}, options.repeat(7))


def _row(
    name: str,
    seconds: Mapping[str, list[float]],
    comparison: str = "",
    ratio: float | None = None,
    target: str = "",
) -> Row:
    return Row(
        case="router step, ViT-B/32, two tasks",
        contender=name,
        quantity="time",
        unit="ms",
        values=milliseconds(seconds[name]),
        comparison=comparison,
        ratio=ratio,
        target=target,
    )


def _check_gradients(engine: pf.Engine, dense: nn.Module, batches: list[Batch]) -> None:
    """The Jacobian equals the dense module's gradients times the deltas, in float64, and so do the losses."""
    engine.train_at(PREFERENCE)
    dense.load_state_dict(engine.module.state_dict())
    dense.requires_grad_(True)
    groups = engine.tensor_groups
    planes: Any = engine._stack.planes
    for batch in batches:
        loss, plain = clip.classify(engine.module, batch), clip.classify(dense, batch)
        check(torch.equal(loss, plain), f"the live module's loss is {loss}, the dense module's {plain}")
        jacobian = engine.jacobian([loss])[0]
        dense.zero_grad(set_to_none=True)
        plain.backward()
        expected = torch.zeros_like(jacobian)
        for name, parameter in dense.named_parameters():
            gradient = parameter.grad
            if gradient is None:
                continue
            row = engine.groups.index(groups[name])
            for e, own in enumerate(planes):
                expected[row, e] += torch.dot(
                    gradient.flatten().double(), own[name].decode().flatten().double()
                )
        error, scale = (jacobian - expected).abs().max().item(), expected.abs().max().item()
        check(scale > 0 and error <= 1e-5 * scale, f"the Jacobian is off by {error:.3g} of {scale:.3g}")
    dense.zero_grad(set_to_none=True)


def _check_pwemoe(engine: pf.Engine, theirs: nn.Module, batches: list[Batch]) -> None:
    """At equal routing weights everywhere, PWEMoE's model is ours."""
    pwemoe: Any = clip.pwemoe_class()
    gates = [module.gate for module in theirs.modules() if isinstance(module, pwemoe)]
    last = [gate[2].weight.detach().clone() for gate in gates]
    with torch.no_grad():
        for gate in gates:
            gate[2].weight.zero_()
        pwemoe.set_preferenece_vector(theirs, torch.tensor(PREFERENCE))
        engine.switch(weights=torch.full((len(engine.groups), len(engine.objectives)), 0.3))
        ours, found = (clip.classify(model, batches[0]).item() for model in (engine.module, theirs))
        for gate, weight in zip(gates, last, strict=True):
            gate[2].weight.copy_(weight)
    check(abs(ours - found) <= 1e-4 * abs(ours), f"at weights 0.3, our loss is {ours}, PWEMoE's {found}")
