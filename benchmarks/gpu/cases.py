"""What `gpu_bench` measures: each case's contenders on the same tensors, and the truth that they must reach.

Nothing here needs a GPU: the tests run every contender at tiny sizes in Triton's interpreter.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import paretofuse as pf
from benchmarks.harness.record import MissingContender, check
from paretofuse.engine.layout import TILE
from paretofuse.engine.planes.groups import Quantized
from paretofuse.engine.planes.int4 import Int4
from paretofuse.engine.planes.int8 import Int8
from paretofuse.kernels.reference import routed_grad_reference, routed_merge_reference
from paretofuse.kernels.routed_grad import grad_partials, group_sums, plan_groups
from paretofuse.kernels.routed_merge import routed_merge

DELTA_SIZE = 0.002
"""Standard deviation of the deltas; that of the weights is about 0.02."""

MANY = 150_000_000
"""Elements up to which a merge for eight preferences is measured: its truth in float64 takes 64 bytes for each."""

Call = Callable[[], Any]


@dataclass(frozen=True)
class Contender:
    """Something to time.

    Attributes:
        call: does the work; returns its result.
        moved: bytes that it has to read and write, each once.
        result: turns what `call` returned into what the truth is compared with.
        allowed: the largest error, over the truth's largest value.
        ours: whether the others are compared with it.
    """

    call: Call
    moved: float
    allowed: float
    result: Callable[[Any], Tensor] = lambda found: found
    ours: bool = False


@dataclass
class Case:
    """One piece of work: its contenders by label, the float64 truth, and how many operations the formula has."""

    name: str
    truth: Tensor
    flops: float
    contenders: dict[str, Contender] = field(default_factory=dict)

    def verify(self, label: str) -> None:
        """Run a contender and compare.

        Raises:
            BenchmarkError: its result is wrong.
        """
        contender = self.contenders[label]
        found = contender.result(contender.call()).double()
        check(found.shape == self.truth.shape, f"{self.name}, {label}: shape {found.shape}")
        error = (found - self.truth).abs().max().item() / self.truth.abs().max().item()
        check(
            error <= contender.allowed,
            f"{self.name}, {label}: off by {error:.3g}, allowed {contender.allowed:.3g}",
        )


@dataclass(frozen=True)
class Tools:
    """How to run things on a device.

    Attributes:
        device: where.
        compile: torch.compile, or what stands for it in tests.
        graph: captures a call and returns one that replays it; None where there are no CUDA graphs.
        pwemoe: PWEMoE's module class, or None where it cannot be had.
    """

    device: torch.device
    compile: Callable[[Callable[..., Any]], Callable[..., Any]]
    graph: Callable[[Call], Call] | None
    pwemoe: Callable[[], Any]


def allowed(dtype: torch.dtype, roundings: float = 16) -> float:
    """Errors of plain PyTorch, which rounds as often as its formula does; ours are given less."""
    return roundings * torch.finfo(dtype).eps


def short(dtype: torch.dtype) -> str:
    """A dtype's name in the tables."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def stacked(model: nn.Module, experts: int, tools: Tools) -> pf.Engine:
    """An engine of a model and experts that are the model plus noise."""
    others = {}
    for index in range(experts):
        generator = torch.Generator(tools.device).manual_seed(1000 + index)
        other = copy.deepcopy(model)
        for tensor in other.parameters():
            noise = torch.randn(tensor.shape, generator=generator, device=tools.device)
            tensor.data.add_((DELTA_SIZE * noise).to(tensor.dtype))
        others[f"task{index}"] = other
    return pf.stack(model, others, backend="triton")


QUANTIZED: dict[type[Quantized], float] = {Int8: 0.02, Int4: 0.3}
"""Formats of small planes, and the error of a result that they are allowed beside the exact one."""


def quantized_planes(deltas: Tensor, kind: type[Quantized]) -> tuple[Tensor, Tensor]:
    """Flat deltas [E, N] as stored in a format, and their scales."""
    planes = [kind.encode(delta.float()) for delta in deltas]
    return torch.stack([plane.packed for plane in planes]), torch.stack([plane.scales for plane in planes])


def merge_case(name: str, make: Callable[[], nn.Module], experts: int, tools: Tools) -> Iterator[Case]:
    """One merge of a whole model: kernels for deltas of every width, and what PyTorch and PWEMoE offer."""
    model = make()
    engine = stacked(model, experts, tools)
    flat = engine._bound.flat[0]
    check(len(engine._bound.flat) == 1, f"{name}: expected one flat buffer")
    n, item, dtype = flat.base.numel(), flat.base.element_size(), flat.base.dtype
    generator = torch.Generator(tools.device).manual_seed(0)
    shares = torch.rand(experts, generator=generator, device=tools.device)
    row = shares / shares.sum()
    # PWEMoE's module around a whole model has one router: all groups take the same weights.
    weights = row.repeat(1, len(engine.groups) + 1, 1)
    truth = merged_exactly(flat, weights)
    once = torch.finfo(dtype).eps / 2 + 1e-6
    moved = n * (2 + experts) * item
    out = torch.full((1, n), float("nan"), dtype=dtype, device=tools.device)
    case = Case(f"merge {name} {short(dtype)} E={experts}", truth, 2 * experts * n)

    def ours() -> Tensor:
        return routed_merge(flat.base, flat.stored.values, flat.tiles, weights, out=out, tile=TILE)

    case.contenders["ours"] = Contender(ours, moved, once, ours=True)
    if tools.graph is not None:
        case.contenders["ours, graph replay"] = Contender(tools.graph(ours), moved, once, lambda _: out)
    for kind, error in QUANTIZED.items():
        quantized, scales = quantized_planes(flat.stored.values, kind)

        def small(quantized: Tensor = quantized, scales: Tensor = scales) -> Tensor:
            return routed_merge(flat.base, quantized, flat.tiles, weights, scales=scales, out=out, tile=TILE)

        less = n * 2 * item + quantized.nbytes + scales.nbytes
        case.contenders[f"ours, {kind.format} deltas"] = Contender(small, less, once + error)
    case.contenders["engine.switch"] = Contender(
        lambda: engine.switch(weights=weights[0, :-1]), moved, once, lambda _: _live(engine, n)
    )
    views = flat.bucket.view(out[0])
    triples = [
        (flat.bucket.view(flat.base)[k].flatten(), engine._bound.deltas[k].flatten(1), views[k].flatten())
        for k in views
    ]
    own = row.to(dtype)

    def addmv() -> Tensor:
        for base, planes, target in triples:
            torch.addmv(base, planes.T, own, out=target)
        return out

    case.contenders["torch.addmv, each tensor"] = Contender(addmv, moved, allowed(dtype))

    def formula(base: Tensor, deltas: Tensor, per_tile: Tensor, target: Tensor) -> None:
        merged = base.float().view(-1, TILE)
        for e in range(experts):
            merged = merged + per_tile[:, e, None] * deltas[e].float().view(-1, TILE)
        target.copy_(merged.view(-1).to(target.dtype))

    per_tile = weights[0, flat.tiles.long()]
    compiled = tools.compile(formula)

    def by_compile() -> Tensor:
        compiled(flat.base, flat.stored.values, per_tile, out[0])
        return out

    case.contenders["torch.compile, flat"] = Contender(by_compile, moved, once)
    _add_pwemoe(case, model, engine, own, moved, tools)
    yield case
    if n <= MANY:
        yield _many(name, flat, engine, tools)


def merged_exactly(flat: Any, weights: Tensor) -> Tensor:
    """The truth of a flat buffer's merges at weights [K, G + 1, E]: [K, N], in float64."""
    return routed_merge_reference(
        flat.base, flat.stored.values, flat.tiles, weights, tile=TILE,
        dtype=torch.float64, accumulate=torch.float64,
    )  # fmt: skip


def _many(name: str, flat: Any, engine: pf.Engine, tools: Tools) -> Case:
    """Eight preferences in one pass over the deltas, against eight merges."""
    experts, n, item = len(engine.objectives), flat.base.numel(), flat.base.element_size()
    generator = torch.Generator(tools.device).manual_seed(1)
    weights = torch.rand(8, len(engine.groups) + 1, experts, generator=generator, device=tools.device)
    truth = merged_exactly(flat, weights)
    out = torch.full((8, n), float("nan"), dtype=flat.base.dtype, device=tools.device)
    once = torch.finfo(flat.base.dtype).eps / 2 + 1e-6

    def ours() -> Tensor:
        return routed_merge(flat.base, flat.stored.values, flat.tiles, weights, out=out, tile=TILE)

    def one_by_one() -> Tensor:
        for k in range(8):
            routed_merge(flat.base, flat.stored.values, flat.tiles, weights[k], out=out[k], tile=TILE)
        return out

    case = Case(f"merge of 8 {name} {short(flat.base.dtype)} E={experts}", truth, 16 * experts * n)
    case.contenders["ours"] = Contender(ours, n * (9 + experts) * item, once, ours=True)
    case.contenders["ours, one by one"] = Contender(one_by_one, 8 * n * (2 + experts) * item, once)
    return case


def _add_pwemoe(
    case: Case, model: nn.Module, engine: pf.Engine, row: Tensor, moved: float, tools: Tools
) -> None:
    """PWEMoE's own module around the whole model, its router made to give the case's weights."""
    try:
        kind = tools.pwemoe()
    except MissingContender as error:
        print(f"PWEMoE is left out: {error}")
        return
    experts = [engine.merge(row_of(i, len(row))) for i in range(len(row))]
    module = kind(copy.deepcopy(model), experts, router_hidden_layers=2).to(row.device, row.dtype)
    with torch.no_grad():
        for parameter in module.gate.parameters():
            parameter.zero_()
        module.gate[-1].bias.copy_(row)
    module.preference_vector = row
    names = [name for name, _ in model.state_dict().items()]
    specs = engine._bound.flat[0].bucket

    def merged() -> Any:
        with torch.no_grad():
            return module._merge_state_dict()

    def flatten(state: Mapping[str, Tensor]) -> Tensor:
        target = torch.zeros(1, specs.total, dtype=row.dtype, device=row.device)
        for name, view in specs.view(target[0]).items():
            view.copy_(state[name])
        return target

    check(all(spec.name in names for spec in specs.specs), f"{case.name}: PWEMoE merged other tensors")
    # Its deltas are differences of models that were rounded.
    case.contenders["PWEMoE, eager"] = Contender(merged, moved, 2 * allowed(row.dtype), flatten)


def row_of(index: int, count: int) -> list[float]:
    """The preference for one objective alone."""
    return [float(i == index) for i in range(count)]


def _live(engine: pf.Engine, n: int) -> Tensor:
    """The live module's tensors in the flat buffer's order."""
    bucket = engine._bound.flat[0].bucket
    state = engine.module.state_dict()
    first = next(iter(state.values()))
    flat = torch.zeros(1, n, dtype=first.dtype, device=first.device)
    for name, view in bucket.view(flat[0]).items():
        view.copy_(state[name])
    return flat


def grad_case(name: str, n: int, experts: int, groups: int, dtype: torch.dtype, tools: Tools) -> Case:
    """The gradient of the routing weights from a whole flat gradient of n elements."""
    generator = torch.Generator(tools.device).manual_seed(2)
    grad = torch.randn(n, generator=generator, device=tools.device).to(dtype)
    deltas = torch.empty(experts, n, dtype=dtype, device=tools.device)
    for plane in deltas:
        plane.copy_(torch.randn(n, generator=generator, device=tools.device) + 0.1 * grad)
    lengths = [n // TILE // groups * TILE] * (groups - 1)
    lengths.append(n - sum(lengths))
    tiles = torch.repeat_interleave(
        torch.arange(groups, device=tools.device),
        torch.tensor([x // TILE for x in lengths], device=tools.device),
    ).int()
    plan = plan_groups(tiles, groups, TILE)
    truth = routed_grad_reference(grad, deltas, tiles, groups, tile=TILE)
    moved = n * (1 + experts) * grad.element_size()
    case = Case(f"grad {name} {short(dtype)} E={experts}", truth, 2 * experts * n)

    def ours() -> Tensor:
        return group_sums(grad_partials(grad, deltas, tile=TILE), plan)

    case.contenders["ours"] = Contender(ours, moved, 1e-4, ours=True)
    if tools.graph is not None:
        case.contenders["ours, graph replay"] = Contender(tools.graph(ours), moved, 1e-4)
    for kind, error in QUANTIZED.items():
        quantized, scales = quantized_planes(deltas, kind)

        def small(quantized: Tensor = quantized, scales: Tensor = scales) -> Tensor:
            return group_sums(grad_partials(grad, quantized, scales=scales, tile=TILE), plan)

        less = n * grad.element_size() + quantized.nbytes + scales.nbytes
        case.contenders[f"ours, {kind.format} deltas"] = Contender(small, less, error)
    parts = list(zip(grad.split(lengths), deltas.split(lengths, dim=1), strict=True))

    def mv() -> Tensor:
        return torch.stack([d @ g for g, d in parts])

    def formula(grad: Tensor, deltas: Tensor) -> Tensor:
        products = (grad.float() * deltas.float()).view(experts, -1, TILE).sum(2)
        return products.new_zeros(groups, experts).index_add(0, tiles, products.T)

    compiled = tools.compile(formula)
    case.contenders["torch.mv, each group"] = Contender(mv, moved, allowed(dtype))
    case.contenders["torch.compile"] = Contender(lambda: compiled(grad, deltas), moved, 1e-4)
    return case
