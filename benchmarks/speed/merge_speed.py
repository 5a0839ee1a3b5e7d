"""How fast is a whole model merged? Ours against PWEMoE's module and the best of plain PyTorch, and against a copy.

A vision tower of CLIP ViT-B/32's size (87 million parameters, all routed, a group for each part), E = 8, fp32 and
bf16. All contenders merge the same tensors with the same weights; PWEMoE's module makes new tensors, as its code does,
the others rewrite their outputs in place. GB/s counts what has to move: (E + 2) N elements. The copy uses the stores
that our merge uses, on buffers far larger than the caches.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import paretofuse as pf
from benchmarks.harness.record import Options, Row, check, interleave, milliseconds, paired_ratio
from benchmarks.models import clip
from paretofuse.engine.merging import native
from paretofuse.engine.merging.backends import native_merger
from paretofuse.engine.stacking.skeleton import stored_tensors

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TARGETS = {"fp32": ">= 1.7", "bf16": ">= 5"}
"""The best of plain PyTorch's time by ours."""

Contenders = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Tensors:
    """The same model for plain PyTorch: of each tensor (flat, n elements) everything, in the same order.

    Attributes:
        base, out: n elements.
        deltas: [E, n], contiguous.
        weights: [E] in the model's dtype.
        floats: the weights as Python floats, for functions that take scalars.
    """

    base: list[Tensor]
    deltas: list[Tensor]
    out: list[Tensor]
    weights: list[Tensor]
    floats: list[list[float]]


def run(options: Options) -> list[Row]:
    """Measure both dtypes."""
    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    for name in DTYPES:
        rows += _measure(name, options)
    return rows


def _measure(name: str, options: Options) -> list[Row]:
    model = clip.vision_tower(options.quick).to(DTYPES[name])
    with tempfile.TemporaryDirectory(prefix="paretofuse-") as folder:
        experts = clip.write_experts(model, Path(folder))
        towers = clip.parts(model)
        engine = pf.stack(
            model, experts, route=lambda name: next(p for p in towers if name.startswith(f"{p}."))
        )
        wrapped = {
            part: clip.pwemoe_module(module, part, list(experts.values()), 0.3).to(DTYPES[name])
            for part, module in towers.items()
        }
    preference = torch.tensor([0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05], dtype=DTYPES[name])
    with torch.no_grad():
        for module in wrapped.values():  # routers that tell preferences and parts apart
            module.gate[2].weight.normal_(std=0.3)
            module._set_preference_vector(preference)
        weights = torch.stack([wrapped[group].gate(preference).float() for group in engine.groups])
    plain = _plain_tensors(wrapped, preference)
    ours, raw, outputs = _ours(engine, weights)
    torch_contenders = _plain_contenders(plain, name)

    def theirs() -> list[dict[str, Tensor]]:
        with torch.no_grad():
            return [module._merge_state_dict() for module in wrapped.values()]

    live = stored_tensors(engine.module)
    truth = _truth(wrapped, preference)
    merged = dict(zip(wrapped, theirs(), strict=True))
    _compare(
        {f"{p}.{k}": t for p, own in merged.items() for k, t in own.items()}, truth, name, "PWEMoE's module"
    )
    ours_all: Contenders = {"ours, engine.switch": ours, "ours, raw plan": raw}
    for label, call in {**ours_all, **torch_contenders}.items():
        found = live if label.startswith("ours, engine") else outputs
        if label in torch_contenders:
            found = dict(zip(truth, plain.out, strict=True))
        with torch.no_grad():
            for tensor in found.values():
                tensor.fill_(float("nan"))
        call()
        _compare({k: t.detach() for k, t in found.items()}, truth, name, label)
    del truth, merged

    size = sum(t.numel() for t in plain.base)
    item = DTYPES[name].itemsize
    source = torch.ones(min(1 << 28, 8 * size * item), dtype=torch.uint8)
    target = torch.empty_like(source)

    def copy() -> None:
        native.copy(target.data_ptr(), source.data_ptr(), source.numel(), threads=options.threads)

    contenders: Contenders = {**ours_all, **torch_contenders, "PWEMoE's module": theirs, "copy": copy}
    seconds = interleave(contenders, options.repeat(9))
    check(torch.equal(source, target), "the copy did not copy")
    return _rows(name, seconds, list(torch_contenders), (clip.EXPERTS + 2) * size * item, 2 * source.numel())


def _rows(
    name: str, seconds: Mapping[str, list[float]], plain: list[str], moved: int, copied: int
) -> list[Row]:
    ours = seconds["ours, engine.switch"]
    best = min(plain, key=lambda label: paired_ratio(seconds[label], ours))
    rows = []
    for label, values in seconds.items():
        nbytes = copied if label == "copy" else moved
        share = paired_ratio([moved / s for s in values], [copied / s for s in seconds["copy"]])
        row = Row(
            case=f"merge {name}",
            contender=label + (" (best of plain PyTorch)" if label == best else ""),
            quantity="time",
            unit="ms",
            values=milliseconds(values),
            gb_per_s=nbytes / sorted(values)[len(values) // 2] / 1e9,
            bandwidth_share=1.0 if label == "copy" else share,
        )
        comparison, ratio, target = "theirs / ours", paired_ratio(values, ours), ""
        if label == "copy":
            comparison, ratio = "", None
        elif label.startswith("ours"):
            comparison, ratio, target = "GB/s, ours / copy", share, ">= 0.85"
        elif label == best:
            target = TARGETS[name]
        elif label.startswith("PWEMoE"):
            target = ">= 15"
        rows.append(Row(**{**row.__dict__, "comparison": comparison, "ratio": ratio, "target": target}))
    return rows


def _ours(engine: pf.Engine, weights: Tensor) -> tuple[Callable[[], object], Callable[[], object], Any]:
    """Our switch of the live module, and the plan alone; the third is what the plan writes to."""
    specs = engine.layout.with_role("routed")
    outputs = {
        spec.name: torch.empty(spec.shape, dtype=engine._stack.base[spec.name].dtype) for spec in specs
    }
    merger = native_merger(specs, engine.layout.group_index, engine._stack, [outputs])
    return lambda: engine.switch(weights=weights), lambda: merger(weights[None].contiguous()), outputs


def _plain_tensors(wrapped: Mapping[str, Any], preference: Tensor) -> Tensors:
    """Views of the tensors that PWEMoE's modules hold, so that nothing is held twice."""
    tensors = Tensors([], [], [], [], [])
    for module in wrapped.values():
        weights = module.gate(preference).detach()
        for base, stacked in zip(module.base_model.state_dict().values(), module.expert_params, strict=True):
            tensors.base.append(base.flatten())
            tensors.deltas.append(stacked.detach().flatten(1))
            tensors.out.append(torch.empty_like(tensors.base[-1]))
            tensors.weights.append(weights)
            tensors.floats.append(weights.tolist())
    return tensors


def _plain_contenders(plain: Tensors, name: str) -> Contenders:
    """What plain PyTorch offers for the job, all in place and free of autograd."""
    groups: dict[tuple[float, ...], list[int]] = {}
    for index, floats in enumerate(plain.floats):
        groups.setdefault(tuple(floats), []).append(index)
    # Everything of one group at once, prepared beforehand: (outputs, bases, [(weight, deltas) for each expert]).
    foreach = [
        (
            [plain.out[i] for i in members],
            [plain.base[i] for i in members],
            [(weight, [plain.deltas[i][e] for i in members]) for e, weight in enumerate(floats)],
        )
        for floats, members in groups.items()
    ]
    rows = [weights.view(1, -1) for weights in plain.weights]

    @torch.no_grad()
    def addmv() -> None:
        for base, deltas, out, weights in zip(
            plain.base, plain.deltas, plain.out, plain.weights, strict=True
        ):
            torch.addmv(base, deltas.T, weights, out=out)

    @torch.no_grad()
    def addmm() -> None:
        for base, deltas, out, row in zip(plain.base, plain.deltas, plain.out, rows, strict=True):
            torch.addmm(base.view(1, -1), row, deltas, out=out.view(1, -1))

    @torch.no_grad()
    def each() -> None:
        for outs, bases, experts in foreach:
            torch._foreach_copy_(outs, bases)
            for weight, deltas in experts:
                torch._foreach_add_(outs, deltas, alpha=weight)

    contenders: Contenders = {"torch.addmv": addmv, "torch.addmm": addmm, "torch._foreach_add_": each}
    compiled = _compiled(plain)
    if compiled is not None:
        contenders["torch.compile"] = compiled
    return contenders


def _compiled(plain: Tensors) -> Callable[[], None] | None:
    """The formula through torch.compile: one fused loop over base, deltas and output, float32 inside."""

    def formula(base: Tensor, deltas: Tensor, weights: Tensor, out: Tensor) -> None:
        merged = base.float()
        for e in range(clip.EXPERTS):
            merged = merged + weights[e].float() * deltas[e].float()
        out.copy_(merged.to(out.dtype))

    torch._dynamo.reset()
    function = torch.compile(formula, dynamic=True)

    @torch.no_grad()
    def call() -> None:
        for base, deltas, weights, out in zip(
            plain.base, plain.deltas, plain.weights, plain.out, strict=True
        ):
            function(base, deltas, weights, out)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
    except Exception as error:  # no compiler, or none that torch can use: the other contenders remain
        print(f"torch.compile is left out, it failed here: {type(error).__name__}")
        return None
    return call


def _truth(wrapped: Mapping[str, Any], preference: Tensor) -> dict[str, Tensor]:
    """The merge in float64, of the tensors with the smallest and the largest share too: all of them."""
    truth = {}
    for part, module in wrapped.items():
        weights = module.gate(preference).detach().double()
        for (key, base), stacked in zip(
            module.base_model.state_dict().items(), module.expert_params, strict=True
        ):
            merged = base.double()
            for weight, delta in zip(weights, stacked.detach(), strict=True):
                merged += weight * delta.double()
            truth[f"{part}.{key}"] = merged.float()
    return truth


def _compare(found: Mapping[str, Tensor], truth: Mapping[str, Tensor], name: str, label: str) -> None:
    """Ours sums in float32 and rounds once; the others may round as often as their formula does.

    Raises:
        BenchmarkError: a tensor is further off than that.
    """
    check(found.keys() == truth.keys(), f"{label} merged other tensors than expected")
    step = torch.finfo(DTYPES[name]).eps
    once = step / 2 + 16 * torch.finfo(torch.float32).eps
    allowed = once if label.startswith("ours") else 16 * step
    for key, expected in truth.items():
        error = (found[key].float().reshape(expected.shape) - expected).abs().max().item()
        scale = expected.abs().max().item()
        check(
            error <= allowed * scale, f"{label}: {key} is off by {error:.3g}, allowed {allowed * scale:.3g}"
        )
