"""The routed merge: a whole flat model, for K preferences, in one launch.

    out[k, t] = base[t] + sum_e weights[k, tile_group[t // tile], e] * deltas[e, t]

    base [N]   deltas [E, N]   tile_group [N / tile]   weights [K, G, E]   out [K, N]

A program takes `BLOCK` elements of one tile, holds base and deltas of up to 16 experts in registers, and goes through
the preferences: base and deltas are read once, whatever K is. More experts, and deltas of one byte, are read again for
each preference. Arithmetic is float32 whatever is stored; the
result is rounded once, to nearest even.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paretofuse.kernels import checks
from paretofuse.kernels.launch import Launch, MergeConfig, merge_config, merge_threads
from paretofuse.kernels.numeric import round_to, widen
from paretofuse.kernels.triton_or_none import float8_as_bits, interpreted, jit, require, tl

INSTEAD = "paretofuse.kernels.reference.routed_merge_reference"


@jit
def load_chunk(
    deltas: tl.tensor, e: tl.tensor, t: tl.tensor, experts: tl.tensor, delta_stride: tl.tensor
) -> tl.tensor:
    """The deltas [E_CHUNK, BLOCK] of experts e, zero where there are no more experts."""
    at = deltas + e[:, None].to(tl.int64) * delta_stride + t[None, :]
    return tl.load(at, mask=(e < experts)[:, None], other=0.0, eviction_policy="evict_first")


@jit
def load_weights(
    weights: tl.tensor,
    scales: tl.tensor,
    row: tl.tensor,
    tile: tl.tensor,
    e: tl.tensor,
    experts: tl.tensor,
    tiles: tl.tensor,
    HAS_SCALES: tl.constexpr,
) -> tl.tensor:
    """What experts e count in a tile [E_CHUNK]: their routing weights, times the tile's scales."""
    w = tl.load(weights + row * experts + e, mask=e < experts, other=0.0)
    if HAS_SCALES:
        w *= tl.load(scales + e.to(tl.int64) * tiles + tile, mask=e < experts, other=0.0)
    return w


@jit
def merge_kernel(
    base: tl.tensor,
    deltas: tl.tensor,
    tile_group: tl.tensor,
    weights: tl.tensor,
    scales: tl.tensor,
    out: tl.tensor,
    n: tl.tensor,
    experts: tl.tensor,
    groups: tl.tensor,
    preferences: tl.tensor,
    delta_stride: tl.tensor,
    out_stride: tl.tensor,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    E_CHUNK: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """Grid: (n / BLOCK,). n is whole tiles and BLOCK divides a tile, so no element needs a mask."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    tile = start // TILE
    t = start + tl.arange(0, BLOCK)  # [BLOCK]
    e = tl.arange(0, E_CHUNK)  # [E_CHUNK]
    # All wide loads are issued before the first of them is waited for: that is what hides the memory's latency.
    if ONE_CHUNK:
        chunk = load_chunk(deltas, e, t, experts, delta_stride)  # [E_CHUNK, BLOCK], in registers as stored
    pristine = tl.load(base + t, eviction_policy="evict_first").to(tl.float32)
    group = tl.load(tile_group + tile).to(tl.int64)
    for k in range(0, preferences):
        row = tl.cast(k, tl.int64) * groups + group
        if ONE_CHUNK:
            w = load_weights(weights, scales, row, tile, e, experts, n // TILE, HAS_SCALES)
            merged = pristine + tl.sum(w[:, None] * widen(chunk), 0)
        else:
            # More deltas than registers: they stream past again for each preference.
            merged = pristine
            for first in range(0, experts, E_CHUNK):
                d = load_chunk(deltas, first + e, t, experts, delta_stride)
                w = load_weights(weights, scales, row, tile, first + e, experts, n // TILE, HAS_SCALES)
                merged += tl.sum(w[:, None] * widen(d), 0)
        rounded = round_to(merged, out.dtype.element_ty, INTERPRETED)
        tl.store(out + tl.cast(k, tl.int64) * out_stride + t, rounded, eviction_policy="evict_first")


def merge_launch(
    base: Tensor,
    deltas: Tensor,
    tile_group: Tensor,
    weights: Tensor,
    scales: Tensor | None,
    out: Tensor,
    tile: int,
    config: MergeConfig,
) -> Launch:
    """One launch on `out` [K, N]; all arguments already checked."""
    deltas = float8_as_bits(deltas)
    n, (k, groups, experts) = base.numel(), weights.shape
    block = min(config.block, tile)
    pointers = (base, deltas, tile_group, weights, weights if scales is None else scales, out)
    return Launch(
        merge_kernel,
        (n // block if k else 0,),
        (*pointers, n, experts, groups, k, deltas.stride(0), out.stride(0)),
        {
            "TILE": tile, "BLOCK": block, "E_CHUNK": config.e_chunk, "ONE_CHUNK": config.one_chunk,
            "HAS_SCALES": scales is not None, "INTERPRETED": interpreted(merge_kernel),
        },
        merge_threads(block, deltas.element_size()),
    )  # fmt: skip


@torch.library.custom_op("paretofuse::routed_merge_out", mutates_args=("out",))
def _routed_merge_out(
    base: Tensor,
    deltas: Tensor,
    tile_group: Tensor,
    weights: Tensor,
    scales: Tensor | None,
    out: Tensor,
    tile: int,
) -> None:
    require(merge_kernel, base.device.type, INSTEAD)
    config = merge_config(weights.shape[2], deltas.element_size())
    merge_launch(base, deltas, tile_group, weights, scales, out, tile, config).run()


@_routed_merge_out.register_fake
def _(
    base: Tensor,
    deltas: Tensor,
    tile_group: Tensor,
    weights: Tensor,
    scales: Tensor | None,
    out: Tensor,
    tile: int,
) -> None:
    return None


@torch.library.custom_op("paretofuse::routed_merge", mutates_args=())
def _routed_merge(
    base: Tensor, deltas: Tensor, tile_group: Tensor, weights: Tensor, scales: Tensor | None, tile: int
) -> Tensor:
    out = base.new_empty((weights.shape[0], base.shape[0]))
    _routed_merge_out(base, deltas, tile_group, weights, scales, out, tile)
    return out


@_routed_merge.register_fake
def _(
    base: Tensor, deltas: Tensor, tile_group: Tensor, weights: Tensor, scales: Tensor | None, tile: int
) -> Tensor:
    return base.new_empty((weights.shape[0], base.shape[0]))


def routed_merge(
    base: Tensor,
    deltas: Tensor,
    tile_group: Tensor,
    weights: Tensor,
    *,
    scales: Tensor | None = None,
    out: Tensor | None = None,
    tile: int = 1024,
) -> Tensor:
    """Merge a flat model for one preference or for K at once, in one launch of a Triton kernel.

    Args:
        base: [N] float32, bfloat16 or float16, contiguous; N a multiple of `tile`.
        deltas: [E, N] of one of those dtypes, planes contiguous. Frozen. Or int8 or float8_e4m3fn,
            with scales.
        tile_group: [N / tile] int32, the row of the weights for each tile. Values must be in [0, G): they are
            read on the device only, and not checked.
        weights: [K, G, E] float32, contiguous; or [G, E] for one preference.
        scales: [E, N / tile] float32, contiguous: what each tile of int8 or float8 deltas is multiplied by.
        out: [K, N] (or [N], when the weights are [G, E]) of one of those dtypes, rows contiguous; it must
            overlap no input. Made in the base's dtype unless given.
        tile: elements per tile, a power of two from 16 on.

    Returns:
        `out`.

    Raises:
        ImportError: Triton is not installed.
        TypeError, ValueError: a dtype, shape, stride or device does not fit, a gradient is wanted (there is none:
            `routed_grad.py` reduces those of merged weights), or the tensors are on the CPU outside Triton's
            interpreter. There is no fallback: the caller chooses the backend.
    """
    single = weights.ndim == 2
    many = weights[None] if single else weights
    _check(base, deltas, tile_group, many, scales, tile)
    require(merge_kernel, base.device.type, INSTEAD)
    if out is None:
        merged: Tensor = torch.ops.paretofuse.routed_merge(base, deltas, tile_group, many, scales, tile)
        return merged[0] if single else merged
    shape = (base.numel(),) if single else (many.shape[0], base.numel())
    checks.check_tensor("out", out, checks.FLOATS, shape, base.device)
    checks.check_rows("out", out)
    checks.check_frozen("out", out)
    torch.ops.paretofuse.routed_merge_out(
        base, deltas, tile_group, many, scales, out[None] if single else out, tile
    )
    return out


def _check(
    base: Tensor, deltas: Tensor, tile_group: Tensor, weights: Tensor, scales: Tensor | None, tile: int
) -> None:
    """Raise TypeError or ValueError unless the inputs of a merge fit together."""
    checks.check_tile(tile)
    if weights.ndim != 3:
        raise ValueError(f"weights: got shape {tuple(weights.shape)}, expected [K, G, E] or [G, E]")
    n, experts = base.numel(), weights.shape[-1]
    if n % tile:
        raise ValueError(
            f"base: got {n} elements, expected a multiple of tile = {tile}; pad tensors to whole tiles"
        )
    checks.check_tensor("base", base, checks.FLOATS, (n,), base.device)
    checks.check_deltas(deltas, scales, (experts, n), n // tile, base.device)
    checks.check_tensor("tile_group", tile_group, (torch.int32,), (n // tile,), base.device)
    checks.check_tensor("weights", weights, (torch.float32,), tuple(weights.shape), base.device)
    checks.check_rows("base", base)
    checks.check_rows("tile_group", tile_group)
    checks.check_contiguous("weights", weights)
    checks.check_frozen("base", base)
    checks.check_frozen("weights", weights)
