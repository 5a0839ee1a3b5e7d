"""The plain PyTorch truth of every kernel: short, slow, and what the tests compare with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def routed_merge_reference(
    base: Tensor,
    deltas: Tensor,
    tile_group: Tensor,
    weights: Tensor,
    *,
    tile: int,
    dtype: torch.dtype | None = None,
    accumulate: torch.dtype = torch.float32,
    scales: Tensor | None = None,
) -> Tensor:
    """Merge a flat model for K preferences.

    out[k, t] = base[t] + sum_e weights[k, group(t), e] * deltas[e, t]

    Args:
        base: [N], N a multiple of `tile`.
        deltas: [E, N], one plane for each expert; any dtype that converts to `accumulate`, or packed as `unpacked`
            takes them.
        tile_group: [N / tile] integers, the group of each tile.
        weights: [K, G, E] routing weights.
        tile: elements per tile.
        dtype: of the result; the base's unless given.
        accumulate: float32, or float64 for a truth to test against.
        scales: [E, N / group], multiplies each group of `deltas`; None means 1.

    Returns:
        [K, N], rounded once.
    """
    rows = weights.to(accumulate)[:, tile_group.long()]  # [K, T, E]
    merged = base.to(accumulate).view(-1, tile).repeat(len(weights), 1, 1)  # [K, T, tile]
    for e, delta in enumerate(unpacked(deltas, scales, base.numel(), accumulate)):
        merged += rows[:, :, e, None] * delta.view(-1, tile)
    return merged.flatten(1).to(dtype or base.dtype)


def unpacked(
    deltas: Tensor, scales: Tensor | None, n: int, accumulate: torch.dtype, group: int | None = None
) -> Tensor:
    """Stored deltas as numbers [E, n] of dtype `accumulate`.

    Args:
        deltas: [E, n], or [E, ceil(n / 2)] uint8 with two numbers in a byte, the first in the low half, each 8 more
            than its value.
        scales: [E, ceil(n / group)], multiplies each group; None means 1.
        n: elements of a plane.
        accumulate: the dtype.
        group: elements of a group; n / number of scales unless given.
    """
    if deltas.dtype == torch.uint8:
        deltas = torch.stack([deltas & 15, deltas >> 4], 2).flatten(1)[:, :n].to(torch.int8) - 8
    wide = deltas.to(accumulate)
    if scales is not None and n:
        each = scales.to(accumulate).repeat_interleave(group or n // scales.shape[1], 1)[:, :n]
        wide = wide * each
    return wide


def merge_tensor_reference(
    base: Tensor, deltas: Sequence[Tensor | None], weights_row: Tensor, dtype: torch.dtype
) -> Tensor:
    """Merge one tensor: base + sum_e weights_row[e] * deltas[e], accumulated in float32 and rounded once.

    Differentiable in the weights.

    Args:
        base: any shape.
        deltas: one for each expert, of the base's shape; None where the expert leaves the tensor unchanged.
        weights_row: [E], [E, rows], or of a matrix [E, rows + columns]: what its row has plus what its column has.
        dtype: of the result.

    Returns:
        A new tensor of the base's shape.
    """
    merged = base.to(torch.float32, copy=True)
    for weight, delta in zip(weights_row.to(torch.float32), deltas, strict=True):
        if delta is not None:
            merged += spread(weight, delta.shape) * delta.to(torch.float32)
    return merged.to(dtype)


def spread(weight: Tensor, shape: Sequence[int]) -> Tensor:
    """A weight that broadcasts over a tensor of this shape.

    Args:
        weight: [], [..., rows] or, of a matrix, [..., rows + columns]: what its row has plus what its column has.
        shape: the tensor's.
    """
    if weight.dim() == 0:
        return weight
    rows = shape[0] if len(shape) > 1 else 1
    by_row = weight[..., :rows].reshape(*weight.shape[:-1], *[-1, *[1] * (len(shape) - 1)][: len(shape)])
    return by_row if weight.shape[-1] == rows else by_row + weight[..., None, rows:]


def routed_grad_reference(
    grad: Tensor,
    deltas: Tensor,
    tile_group: Tensor,
    groups: int,
    *,
    tile: int,
    accumulate: torch.dtype = torch.float64,
    scales: Tensor | None = None,
) -> Tensor:
    """The routing weights' gradient: dweights[g, e] = sum over t with group(t) = g of grad[t] * deltas[e, t].

    Args:
        grad: [N], dLoss / dout of the flat merge.
        deltas: [E, N].
        tile_group: [N / tile] integers in [0, groups).
        groups: G.
        tile: elements per tile.
        accumulate: dtype of products, sums and result; float64 unless told.
        scales: [E, N / group], multiplies each group of `deltas`; None means 1.

    Returns:
        [G, E] of dtype `accumulate`.
    """
    tiles = block_products_reference(grad, deltas, tile, accumulate=accumulate, scales=scales)  # [T, E]
    return tiles.new_zeros(groups, len(deltas)).index_add_(0, tile_group.long(), tiles)


def block_products_reference(
    grad: Tensor,
    deltas: Tensor,
    block: int,
    *,
    accumulate: torch.dtype = torch.float64,
    scales: Tensor | None = None,
    group: int | None = None,
) -> Tensor:
    """Stage one of the gradient: <grad, deltas[e]> over each block of `block` elements, the last one maybe
    shorter.

    Args:
        grad: [N].
        deltas: [E, N].
        block: elements per block.
        accumulate: dtype of products, sums and result.
        scales, group: as `unpacked` takes them.

    Returns:
        [ceil(N / block), E].
    """
    pad = (0, -grad.numel() % block)
    wide = torch.nn.functional.pad(grad.to(accumulate), pad).view(-1, block)
    wanted = unpacked(deltas, scales, grad.numel(), accumulate, group)
    rows = [torch.nn.functional.pad(d, pad).view(-1, block) for d in wanted]
    return torch.stack([(wide * row).sum(1) for row in rows], dim=1)


def inner_reference(grad: Tensor, deltas: Sequence[Tensor | None]) -> Tensor:
    """One tensor's share of the gradient: <grad, deltas[e]> for each expert, [E] float64; None is zero."""
    wide = grad.detach().to(torch.float64).flatten()
    products = [
        wide.new_zeros(()) if delta is None else torch.dot(wide, delta.detach().to(torch.float64).flatten())
        for delta in deltas
    ]
    return torch.stack(products)


def routed_linear_reference(
    x: Tensor,
    base: Tensor,
    deltas: Tensor,
    weights: Tensor,
    bias: Tensor | None = None,
    *,
    accumulate: torch.dtype = torch.float32,
) -> Tensor:
    """A linear layer with the mixed weight base + sum_e weights[e] * deltas[e], rounded once to x's dtype.

    Args:
        x: [..., I].
        base: [O, I].
        deltas: [E, O, I].
        weights: [E].
        bias: [O] or None.
        accumulate: of the mixing; float64, with x in float64, for a truth to test against.

    Returns:
        [..., O] in x's dtype.
    """
    mixed = base.to(accumulate)
    for weight, delta in zip(
        weights.to(accumulate), deltas, strict=True
    ):  # no matmul: autocast would round it
        mixed = mixed + weight * delta.to(accumulate)
    return torch.nn.functional.linear(x, mixed.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.to(x.dtype).T


def routed_rows_reference(
    x: Tensor,
    base: Tensor,
    deltas: Tensor | Sequence[Tensor],
    weights: Tensor,
    bias: Tensor | None = None,
    *,
    accumulate: torch.dtype = torch.float32,
    product: Callable[[Tensor, Tensor], Tensor] = _product,
) -> Tensor:
    """A linear layer with its own mixed weight for each batch row: y[b] = x[b] (base + sum_e weights[b, e]
    deltas[e])^T.

    The products with base and with each delta are computed in x's dtype and mixed in `accumulate`.

    Args:
        x: [B, P, I].
        base: [O, I].
        deltas: [E, O, I], or each [O, I].
        weights: [B, E], or [B, E, O]: one for each output.
        bias: [B, O] or None.
        accumulate: of the mixing; float64, with x in float64, for a truth to test against.
        product: of x and a weight [O, I], in x's dtype.

    Returns:
        [B, P, O] in x's dtype.
    """
    y = product(x, base).to(accumulate)
    for e, delta in enumerate(deltas):
        own = weights[:, e].to(accumulate)
        own = own[:, None, None] if own.ndim == 1 else own[:, None]  # [B, 1, 1 or O]
        y = y + own * product(x, delta).to(accumulate)
    if bias is not None:
        y = y + bias[:, None, :].to(accumulate)
    return y.to(x.dtype)
