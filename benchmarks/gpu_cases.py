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
from torch.nn import functional as F

import paretofuse as pf
from benchmarks.record import MissingContender, check
from paretofuse.engine.layout import TILE
from paretofuse.kernels.quantize import quantize_tiles
from paretofuse.kernels.reference import routed_grad_reference, routed_merge_reference
from paretofuse.kernels.routed_grad import grad_partials, group_sums, plan_groups
from paretofuse.kernels.routed_linear import routed_linear
from paretofuse.kernels.routed_merge import routed_merge
from paretofuse.kernels.routed_rows import routed_rows

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
    """One piece of work: its contenders by label, and the float64 truth of each or of all."""

    name: str
    truth: Tensor
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


def merge_case(name: str, model: nn.Module, experts: int, tools: Tools) -> Iterator[Case]:
    """One merge of a whole model: kernels for deltas of every width, and what PyTorch and PWEMoE offer."""
    engine = stacked(model, experts, tools)
    flat = engine._binding.flat[0]
    check(len(engine._binding.flat) == 1, f"{name}: expected one flat buffer")
    n, item, dtype = flat.base.numel(), flat.base.element_size(), flat.base.dtype
    generator = torch.Generator(tools.device).manual_seed(0)
    shares = torch.rand(experts, generator=generator, device=tools.device)
    row = shares / shares.sum()
    # PWEMoE's module around a whole model has one router: all groups take the same weights.
    weights = row.repeat(1, len(engine.groups) + 1, 1)
    truth = routed_merge_reference(
        flat.base, flat.deltas, flat.tiles, weights, tile=TILE, dtype=torch.float64, accumulate=torch.float64
    )
    once = torch.finfo(dtype).eps / 2 + 1e-6
    moved = n * (2 + experts) * item
    out = torch.full((1, n), float("nan"), dtype=dtype, device=tools.device)
    case = Case(f"merge {name} {_short(dtype)} E={experts}", truth)

    def ours() -> Tensor:
        return routed_merge(flat.base, flat.deltas, flat.tiles, weights, out=out, tile=TILE)

    case.contenders["ours"] = Contender(ours, moved, once, ours=True)
    if tools.graph is not None:
        case.contenders["ours, graph replay"] = Contender(tools.graph(ours), moved, once, lambda _: out)
    for kind in (torch.int8, torch.float8_e4m3fn):
        quantized, scales = quantize_tiles(flat.deltas, kind, tile=TILE)

        def byte(quantized: Tensor = quantized, scales: Tensor = scales) -> Tensor:
            return routed_merge(flat.base, quantized, flat.tiles, weights, scales=scales, out=out, tile=TILE)

        less = n * (2 * item + experts * (1 + 4 / TILE))
        case.contenders[f"ours, {'int8' if kind == torch.int8 else 'fp8'} deltas"] = Contender(
            byte, less, once + 0.02
        )
    case.contenders["engine.switch"] = Contender(
        lambda: engine.switch(weights=weights[0, :-1]), moved, once, lambda _: _live(engine, n)
    )
    views = flat.bucket.view(out[0])
    triples = [
        (flat.bucket.view(flat.base)[k].flatten(), engine._binding.planes[k].flatten(1), views[k].flatten())
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
        compiled(flat.base, flat.deltas, per_tile, out[0])
        return out

    case.contenders["torch.compile, flat"] = Contender(by_compile, moved, once)
    _add_pwemoe(case, model, engine, own, moved, tools)
    yield case
    if n <= MANY:
        yield _many(name, flat, engine, tools)


def _many(name: str, flat: Any, engine: pf.Engine, tools: Tools) -> Case:
    """Eight preferences in one pass over the deltas, against eight merges."""
    experts, n, item = len(engine.objectives), flat.base.numel(), flat.base.element_size()
    generator = torch.Generator(tools.device).manual_seed(1)
    weights = torch.rand(8, len(engine.groups) + 1, experts, generator=generator, device=tools.device)
    truth = routed_merge_reference(
        flat.base, flat.deltas, flat.tiles, weights, tile=TILE, dtype=torch.float64, accumulate=torch.float64
    )
    out = torch.full((8, n), float("nan"), dtype=flat.base.dtype, device=tools.device)
    once = torch.finfo(flat.base.dtype).eps / 2 + 1e-6

    def ours() -> Tensor:
        return routed_merge(flat.base, flat.deltas, flat.tiles, weights, out=out, tile=TILE)

    def one_by_one() -> Tensor:
        for k in range(8):
            routed_merge(flat.base, flat.deltas, flat.tiles, weights[k], out=out[k], tile=TILE)
        return out

    case = Case(f"merge of 8 {name} {_short(flat.base.dtype)} E={experts}", truth)
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
    specs = engine._binding.flat[0].bucket

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
    bucket = engine._binding.flat[0].bucket
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
    case = Case(f"grad {name} {_short(dtype)} E={experts}", truth)

    def ours() -> Tensor:
        return group_sums(grad_partials(grad, deltas, tile=TILE), plan)

    case.contenders["ours"] = Contender(ours, moved, 1e-4, ours=True)
    if tools.graph is not None:
        case.contenders["ours, graph replay"] = Contender(tools.graph(ours), moved, 1e-4)
    for kind in (torch.int8, torch.float8_e4m3fn):
        quantized, scales = quantize_tiles(deltas, kind, tile=TILE)

        def byte(quantized: Tensor = quantized, scales: Tensor = scales) -> Tensor:
            return group_sums(grad_partials(grad, quantized, scales=scales, tile=TILE), plan)

        less = n * (grad.element_size() + experts * (1 + 4 / TILE))
        case.contenders[f"ours, {'int8' if kind == torch.int8 else 'fp8'} deltas"] = Contender(
            byte, less, 0.02
        )
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


def _layer(outs: int, ins: int, experts: int, dtype: torch.dtype, tools: Tools) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(tools.device).manual_seed(3)
    base = torch.randn(outs, ins, generator=generator, device=tools.device) / ins**0.5
    deltas = torch.randn(experts, outs, ins, generator=generator, device=tools.device) / ins**0.5
    return base.to(dtype), deltas.to(dtype)


def linear_case(
    rows: int, outs: int, ins: int, experts: int, dtype: torch.dtype, tools: Tools, *, backward: bool = False
) -> Case:
    """A linear layer at one preference, or its backward pass: mixed on the way, or merged first."""
    base, deltas = _layer(outs, ins, experts, dtype, tools)
    weights = torch.full((experts,), 1 / experts, device=tools.device)
    generator = torch.Generator(tools.device).manual_seed(4)
    x = torch.randn(rows, ins, generator=generator, device=tools.device).to(dtype)
    grad = torch.randn(rows, outs, generator=generator, device=tools.device).to(dtype)
    item = base.element_size()
    moved = item * ((1 + experts) * outs * ins + rows * (ins + outs))
    mixed = base.double() + torch.einsum("e,eoi->oi", weights.double(), deltas.double())
    dense = mixed.to(dtype)
    own = weights.to(dtype)

    def merge() -> Tensor:
        return torch.addmv(base.flatten(), deltas.flatten(1).T, own).view(outs, ins)

    if not backward:
        case = Case(f"linear {rows} x {ins} -> {outs} {_short(dtype)} E={experts}", x.double() @ mixed.T)

        def ours() -> Tensor:
            return routed_linear(x, base, deltas, weights)

        def formula(x: Tensor, base: Tensor, deltas: Tensor, weights: Tensor) -> Tensor:
            merged = base.float()
            for e in range(experts):
                merged = merged + weights[e] * deltas[e].float()
            return F.linear(x, merged.to(x.dtype))

        compiled = tools.compile(formula)
        case.contenders["ours"] = Contender(ours, moved, allowed(dtype, 4), ours=True)
        case.contenders["merge by addmv, then F.linear"] = Contender(
            lambda: F.linear(x, merge()), moved + 2 * item * outs * ins, allowed(dtype)
        )
        case.contenders["torch.compile"] = Contender(
            lambda: compiled(x, base, deltas, weights), moved + 2 * item * outs * ins, allowed(dtype, 4)
        )
        case.contenders["F.linear alone, merged before"] = Contender(
            lambda: F.linear(x, dense), item * (outs * ins + rows * (ins + outs)), allowed(dtype, 4)
        )
        return case
    product = grad.double().T @ x.double()
    truth = torch.cat([(grad.double() @ mixed).flatten(), (deltas.double() * product).sum((1, 2))])
    scale = truth[-experts:].abs().max() / truth[:-experts].abs().max()
    truth[-experts:] /= scale
    case = Case(f"linear backward {rows} x {ins} -> {outs} {_short(dtype)} E={experts}", truth)

    def joined(found: tuple[Tensor, Tensor]) -> Tensor:
        return torch.cat([found[0].double().flatten(), found[1].double() / scale])

    ops = torch.ops.paretofuse

    def ours_backward() -> tuple[Tensor, Tensor]:
        dx = ops.routed_linear(grad, base.T, deltas.mT, weights, None)
        return dx, ops.routed_linear_weights_grad(grad, x, deltas)

    def plain() -> tuple[Tensor, Tensor]:
        return grad @ dense, deltas.flatten(1) @ (grad.T @ x).flatten()

    case.contenders["ours"] = Contender(ours_backward, 2 * moved, allowed(dtype, 4), joined, ours=True)
    case.contenders["dense backward, then torch.mv"] = Contender(
        plain, 2 * moved + 2 * item * outs * ins, allowed(dtype), joined
    )
    return case


def rows_case(
    batch: int, per: int, outs: int, ins: int, experts: int, dtype: torch.dtype, tools: Tools
) -> Case:
    """A batch in which each row has its own preference: one kernel, or a merge for each row."""
    base, deltas = _layer(outs, ins, experts, dtype, tools)
    generator = torch.Generator(tools.device).manual_seed(5)
    weights = torch.rand(batch, experts, generator=generator, device=tools.device)
    x = torch.randn(batch, per, ins, generator=generator, device=tools.device).to(dtype)
    item = base.element_size()
    moved = item * ((1 + experts) * outs * ins + batch * per * (ins + outs))
    each = torch.einsum("bpi,eoi->bepo", x.double(), deltas.double())
    truth = x.double() @ base.double().T + torch.einsum("be,bepo->bpo", weights.double(), each)
    case = Case(f"rows {batch} x {per} x {ins} -> {outs} {_short(dtype)} E={experts}", truth)
    own = weights.to(dtype)

    def merge_each() -> Tensor:
        planes, flat = deltas.flatten(1).T, base.flatten()
        return torch.stack(
            [F.linear(r, torch.addmv(flat, planes, w).view(outs, ins)) for r, w in zip(x, own, strict=True)]
        )

    def formula(x: Tensor, base: Tensor, deltas: Tensor, weights: Tensor) -> Tensor:
        y = (x @ base.T).float()
        for e in range(experts):
            y = y + weights[:, e, None, None] * (x @ deltas[e].T).float()
        return y.to(x.dtype)

    compiled = tools.compile(formula)
    case.contenders["ours"] = Contender(
        lambda: routed_rows(x, base, deltas, weights), moved, allowed(dtype, 4), ours=True
    )
    case.contenders["a merge for each row"] = Contender(
        merge_each, moved + item * outs * ins * batch * (experts + 3), allowed(dtype)
    )
    case.contenders["E + 1 products, eager"] = Contender(
        lambda: formula(x, base, deltas, weights), moved, allowed(dtype, 8)
    )
    case.contenders["E + 1 products, torch.compile"] = Contender(
        lambda: compiled(x, base, deltas, weights), moved, allowed(dtype, 8)
    )
    return case


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
