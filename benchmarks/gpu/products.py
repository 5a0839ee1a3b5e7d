"""The cases of `gpu_bench` in which a mixed weight meets activations: routed_linear, its backward pass, routed_rows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.cases import Case, Contender, Tools, allowed, short
from paretofuse.kernels.routed_linear import routed_linear
from paretofuse.kernels.routed_rows import routed_rows


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
    product = 2 * rows * outs * ins

    def merge() -> Tensor:
        return torch.addmv(base.flatten(), deltas.flatten(1).T, own).view(outs, ins)

    if not backward:
        name = f"linear {rows} x {ins} -> {outs} {short(dtype)} E={experts}"
        case = Case(name, x.double() @ mixed.T, product)

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
    outer = grad.double().T @ x.double()
    truth = torch.cat([(grad.double() @ mixed).flatten(), (deltas.double() * outer).sum((1, 2))])
    scale = truth[-experts:].abs().max() / truth[:-experts].abs().max()
    truth[-experts:] /= scale
    case = Case(f"linear backward {rows} x {ins} -> {outs} {short(dtype)} E={experts}", truth, 2 * product)

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
    name = f"rows {batch} x {per} x {ins} -> {outs} {short(dtype)} E={experts}"
    case = Case(name, truth, 2 * batch * per * outs * ins)
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
