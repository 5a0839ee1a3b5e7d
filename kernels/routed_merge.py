"""The routed merge: a whole flat model, for K preferences, in one launch.

    out[k, t] = base[t] + sum_e weights[k, tile_group[t // tile], e] * deltas[e, t]

    base [N]   deltas [E, N]   tile_group [N / tile]   weights [K, G, E]   out [K, N]

A program takes `BLOCK` elements of one tile and `K_BLOCK` preferences: base and deltas are read once for
all of them. Arithmetic is float32 whatever is stored; the result is rounded once, to nearest even.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paretofuse.kernels.launch import MergeConfig, merge_config
from paretofuse.kernels.numeric import round_to
from paretofuse.kernels.triton_or_none import interpreted, jit, require, tl


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What base, deltas and out may be, in any mix."""

MAX_EXPERTS = 64


@jit
def merge_kernel(
    base: tl.tensor,
    deltas: tl.tensor,
    tile_group: tl.tensor,
    weights: tl.tensor,
    out: tl.tensor,
    n: tl.tensor,
    experts: tl.tensor,
    groups: tl.tensor,
    preferences: tl.tensor,
    delta_stride: tl.tensor,
    out_stride: tl.tensor,
    TILE: tl.constexpr,
    K_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    E_CHUNK: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """Grid: (ceil(preferences / K_BLOCK) * n / BLOCK,); neighbours share a block, so L2 serves its deltas."""
    passes = tl.cdiv(preferences, K_BLOCK)
    block = tl.program_id(0) // passes
    start = block.to(tl.int64) * BLOCK
    group = tl.load(tile_group + start // TILE).to(tl.int64)
    k = (tl.program_id(0) % passes) * K_BLOCK + tl.arange(0, K_BLOCK)[:, None].to(tl.int64)  # [K_BLOCK, 1]
    t = start + tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    inside = t < n
    row = weights + (k * groups + group) * experts  # [K_BLOCK, 1]
    merged = tl.zeros((K_BLOCK, BLOCK), tl.float32)
    merged += tl.load(base + t, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    for first in range(0, experts, E_CHUNK):
        for j in tl.static_range(E_CHUNK):
            e = first + j
            delta = tl.load(
                deltas + e.to(tl.int64) * delta_stride + t,
                mask=inside & (e < experts),
                other=0.0,
                eviction_policy="evict_first",
            ).to(tl.float32)
            weight = tl.load(row + e, mask=(k < preferences) & (e < experts), other=0.0)
            merged += weight * delta
    rounded = round_to(merged, out.dtype.element_ty, INTERPRETED)
    tl.store(out + k * out_stride + t, rounded, mask=inside & (k < preferences))


def _launch(
    base: Tensor,
    deltas: Tensor,
    tile_group: Tensor,
    weights: Tensor,
    out: Tensor,
    tile: int,
    config: MergeConfig,
) -> None:
    """Launch once on `out` [K, N]; all arguments already checked."""
    n, (k, groups, experts) = base.numel(), weights.shape
    block = min(config.block, tile)
    grid = (-(-k // config.k_block) * (n // block),)
    if n and k:
        merge_kernel[grid](
            base, deltas, tile_group, weights, out, n, experts, groups, k, deltas.stride(0), out.stride(0),
            TILE=tile, K_BLOCK=config.k_block, BLOCK=block, E_CHUNK=config.e_chunk,
            INTERPRETED=interpreted(merge_kernel), num_warps=config.warps,
        )  # fmt: skip


@torch.library.custom_op("paretofuse::routed_merge_out", mutates_args=("out",))
def _routed_merge_out(
    base: Tensor, deltas: Tensor, tile_group: Tensor, weights: Tensor, out: Tensor, tile: int
) -> None:
    require(merge_kernel, base.device.type, "paretofuse.kernels.reference.routed_merge_reference")
    _launch(
        base,
        deltas,
        tile_group,
        weights,
        out,
        tile,
        merge_config(base.numel(), weights.shape[0], weights.shape[2]),
    )


@_routed_merge_out.register_fake
def _(base: Tensor, deltas: Tensor, tile_group: Tensor, weights: Tensor, out: Tensor, tile: int) -> None:
    return None


def routed_merge(
    base: Tensor,
    deltas: Tensor,
    tile_group: Tensor,
    weights: Tensor,
    *,
    out: Tensor | None = None,
    tile: int = 1024,
) -> Tensor:
    """Merge a flat model for one preference or for K at once, in one launch of a Triton kernel.

    Args:
        base: [N] float32, bfloat16 or float16, contiguous; N a multiple of `tile`.
        deltas: [E, N] of one of those dtypes, planes contiguous; E from 1 to 64.
        tile_group: [N / tile] int32, the row of the weights for each tile. Values must be in [0, G): they are
            read on the device only, and not checked.
        weights: [K, G, E] float32, contiguous; or [G, E] for one preference.
        out: [K, N] (or [N], when the weights are [G, E]) of one of those dtypes, rows contiguous; it must
            overlap no input. Made in the base's dtype unless given.
        tile: elements per tile, a power of two from 16 on.

    Returns:
        `out`.

    Raises:
        ImportError: Triton is not installed.
        TypeError, ValueError: a dtype, shape, stride or device does not fit, or the tensors are on the CPU
            outside Triton's interpreter. There is no fallback: the caller chooses the backend.
    """
    single = weights.ndim == 2
    many_weights = weights[None] if single else weights
    _check_inputs(base, deltas, tile_group, many_weights, tile)
    require(merge_kernel, base.device.type, "paretofuse.kernels.reference.routed_merge_reference")
    expected = (base.numel(),) if single else (many_weights.shape[0], base.numel())
    if out is None:
        out = base.new_empty(expected)
    _check("out", out, DTYPES, expected, base.device)
    rows = out[None] if single else out
    torch.ops.paretofuse.routed_merge_out(base, deltas, tile_group, many_weights, rows, tile)
    return out


def _check_inputs(base: Tensor, deltas: Tensor, tile_group: Tensor, weights: Tensor, tile: int) -> None:
    """Raise TypeError or ValueError unless the inputs of a merge fit together."""
    if tile < 16 or tile & (tile - 1):
        raise ValueError(
            f"tile: got {tile}, expected a power of two from 16 on; lay the buffers out with such a tile"
        )
    if weights.ndim != 3 or not 1 <= weights.shape[-1] <= MAX_EXPERTS:
        raise ValueError(
            f"weights: got shape {tuple(weights.shape)}, expected [K, G, E] or [G, E] with "
            f"1 <= E <= {MAX_EXPERTS}; merge more experts in several stacks"
        )
    n, experts = base.numel(), weights.shape[-1]
    if n % tile:
        raise ValueError(
            f"base: got {n} elements, expected a multiple of tile = {tile}; pad each tensor to whole tiles"
        )
    _check("base", base, DTYPES, (n,), base.device)
    _check("deltas", deltas, DTYPES, (experts, n), base.device)
    _check("tile_group", tile_group, (torch.int32,), (n // tile,), base.device)
    _check("weights", weights, (torch.float32,), tuple(weights.shape), base.device)
    if not weights.is_contiguous():
        raise ValueError(f"weights: got strides {weights.stride()}, expected contiguous; call .contiguous()")


def _check(
    name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...], device: torch.device
) -> None:
    """Raise unless a tensor has one of the dtypes, the shape, the device, and contiguous rows."""
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: got {tensor.dtype}, expected one of {dtypes}; convert it with .to(...)")
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name}: got shape {tuple(tensor.shape)}, expected {shape}; check the layout and tile"
        )
    if tensor.device != device:
        raise ValueError(
            f"{name}: got device {tensor.device}, expected {device}; move it to the base's device"
        )
    if tensor.numel() and tensor.stride(-1) != 1:
        raise ValueError(
            f"{name}: got strides {tensor.stride()}, expected contiguous rows; call .contiguous()"
        )
