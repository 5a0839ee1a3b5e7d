"""The merge of one linear layer, for K preferences, into memory that lives for one product.

    mixed[k, o, i] = base[o, i] + sum_e weights[k, e] * deltas[e, o, i]

    base [O, I]   deltas [E, O, I]   weights [K, E]   mixed [K, O, I] in x's dtype, in the layout of base

What `routed_linear` and `routed_rows` do for many rows of x: the planes are read once, and cuBLAS does the product.
PyTorch's allocator is the scratch: a layer's weight goes where that of the layer before it was, so that a model holds
one at a time, and nothing of it is kept for the backward pass. The formula in PyTorch is `merge_tensor_reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paretofuse.kernels.launch import Launch, MergeConfig, filled, merge_config, merge_threads
from paretofuse.kernels.numeric import round_to
from paretofuse.kernels.triton_or_none import interpreted, jit, tl


@jit
def load_planes(
    deltas: tl.tensor,
    e: tl.tensor,
    at: tl.tensor,
    inside: tl.tensor,
    experts: tl.tensor,
    delta_stride: tl.tensor,
) -> tl.tensor:
    """The deltas [E_CHUNK, BLOCK] of experts e as stored, zero where there are no more."""
    plane = deltas + e[:, None].to(tl.int64) * delta_stride
    mask = (e < experts)[:, None] & inside[None, :]
    return tl.load(plane + at[None, :], mask=mask, other=0.0, eviction_policy="evict_first")


@jit
def layer_merge_kernel(
    base: tl.tensor,
    deltas: tl.tensor,
    weights: tl.tensor,
    mixed: tl.tensor,
    lines: tl.tensor,
    columns: tl.tensor,
    experts: tl.tensor,
    preferences: tl.tensor,
    line_stride: tl.tensor,
    delta_stride: tl.tensor,
    BLOCK: tl.constexpr,
    E_CHUNK: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """Grid: (lines * ceil(columns / BLOCK),). Lines of consecutive numbers, which in base and planes may lie apart.

    As in `merge_kernel`, all wide loads are under way before the first of them is waited for.
    """
    blocks = tl.cdiv(columns, BLOCK)
    line = (tl.program_id(0) // blocks).to(tl.int64)
    c = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = c < columns
    at = line * line_stride + c
    e = tl.arange(0, E_CHUNK)  # [E_CHUNK]
    if ONE_CHUNK:
        chunk = load_planes(deltas, e, at, inside, experts, delta_stride)
    pristine = tl.load(base + at, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    for k in range(0, preferences):
        own = weights + tl.cast(k, tl.int64) * experts
        total = pristine
        if ONE_CHUNK:
            w = tl.load(own + e, mask=e < experts, other=0.0)
            total += tl.sum(w[:, None] * chunk.to(tl.float32), 0)
        else:
            for first in range(0, experts, E_CHUNK):
                piece = load_planes(deltas, first + e, at, inside, experts, delta_stride)
                w = tl.load(own + first + e, mask=first + e < experts, other=0.0)
                total += tl.sum(w[:, None] * piece.to(tl.float32), 0)
        to = mixed + (tl.cast(k, tl.int64) * lines + line) * columns + c
        tl.store(to, round_to(total, mixed.dtype.element_ty, INTERPRETED), mask=inside)


def layer_merge_launch(
    base: Tensor, deltas: Tensor, weights: Tensor, dtype: torch.dtype, config: MergeConfig
) -> tuple[Tensor, Launch]:
    """The kernel and the weights [K, O, I] that it fills; arguments are checked already, the weights contiguous."""
    (outs, ins), (preferences, experts) = base.shape, weights.shape
    transposed = base.stride(1) != 1
    lines, columns = (ins, outs) if transposed else (outs, ins)
    line_stride = base.stride(1) if transposed else base.stride(0)
    mixed = base.new_empty((preferences, lines, columns), dtype=dtype)
    if line_stride == columns or lines == 1:  # one long line, which wide loads need not be cut for
        lines, columns = 1, lines * columns
    launch = Launch(
        layer_merge_kernel,
        (lines * -(-columns // config.block) if preferences else 0,),
        (
            base, deltas, weights, mixed, lines, columns, experts, preferences, line_stride, deltas.stride(0),
        ),
        {
            "BLOCK": config.block, "E_CHUNK": config.e_chunk, "ONE_CHUNK": config.one_chunk,
            "INTERPRETED": interpreted(layer_merge_kernel),
        },
        merge_threads(config.block, 8 * min(deltas.element_size(), mixed.element_size())),
    )  # fmt: skip
    return (mixed.mT if transposed else mixed), launch


def merge_layer(base: Tensor, deltas: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights [K, O, I] of K preferences by the kernel, in the configuration that its rule gives."""
    config = merge_config(deltas.shape[0], deltas.element_size())
    return filled(layer_merge_launch(base, deltas, weights, dtype, config))
