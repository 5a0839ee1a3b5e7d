"""The routed merge: a whole flat model, for K preferences, in one launch.

    out[k, i] = base[t] + sum_e (weights[k, group(t), e] + weights[k, row(t), e]) * scale(e, t) * deltas[e, t]

    base [N]   deltas [E, N]   weights [K, G, E], with row coefficients [K, G + R, E]   out [K, M]

Deltas are floats, which have no scales, or int8, or int4, two to a byte: those have a scale for each `group` elements.
Row coefficients, if there are any, stand behind the groups. Without `places`, M = N and i = t; with them tile i of the
output is merged from the tile that they name: any tensors of the buffers, in one launch.

A program takes `BLOCK` elements of one tile, holds base and deltas of up to 16 experts in registers (8 with row
coefficients), and goes through the preferences: base and deltas are read once, whatever K is. More experts, and deltas
of one byte or less, are read again for each preference. What experts count is multiplied once for `SUB` elements that
share group, row and scale.
Arithmetic is float32 whatever is stored; the result is rounded once, to nearest even.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from paretofuse.kernels import checks
from paretofuse.kernels.launch import Launch, MergeConfig, merge_config, merge_threads
from paretofuse.kernels.numeric import round_to, unpack
from paretofuse.kernels.triton_or_none import interpreted, jit, require, tl

INSTEAD = "paretofuse.kernels.reference.routed_merge_reference"

SMALLEST_SHARED = 16
"""Elements that at least share a row coefficient where some do."""

NO_ROWS, SHARED_ROW, ANY_ROW = 0, 1, 2
"""Row coefficients: none, one for `SUB` elements that lie in one row, or one for each element."""


@jit
def load_chunk(
    deltas: tl.tensor,
    e: tl.tensor,
    t: tl.tensor,
    experts: tl.tensor,
    delta_stride: tl.tensor,
) -> tl.tensor:
    """The deltas [E_CHUNK, SUBS, SUB] of experts e as stored, zero where there are no more experts."""
    at = deltas + e[:, None, None].to(tl.int64) * delta_stride + t[None]
    return tl.load(at, mask=(e < experts)[:, None, None], other=0, eviction_policy="evict_first")


@jit
def load_weights(
    weights: tl.tensor,
    scales: tl.tensor,
    group: tl.tensor,
    row: tl.tensor,
    e: tl.tensor,
    scale: tl.tensor,
    experts: tl.tensor,
    scale_stride: tl.tensor,
    HAS_SCALES: tl.constexpr,
    ROWS: tl.constexpr,
) -> tl.tensor:
    """What experts e count in pieces of a tile [E_CHUNK, SUBS or 1, SUB or 1]: their weights, times the scales.

    group is the row of the weights of the tile's group, row [SUBS, SUB or 1] that of the elements' own coefficients.
    """
    e = e[:, None, None]
    w = tl.load(weights + group * experts + e, mask=e < experts, other=0.0)
    if ROWS > 0:
        own = weights + row[None] * experts + e
        w += tl.load(own, mask=(e < experts) & (row >= 0)[None], other=0.0)
    if HAS_SCALES:
        w *= tl.load(scales + e.to(tl.int64) * scale_stride + scale[None], mask=e < experts, other=0.0)
    return w


@partial(jit, any_value=("experts", "groups", "preferences"))
def merge_kernel(
    base: tl.tensor,
    deltas: tl.tensor,
    tile_group: tl.tensor,
    weights: tl.tensor,
    scales: tl.tensor,
    places: tl.tensor,
    out: tl.tensor,
    n: tl.tensor,
    experts: tl.tensor,
    groups: tl.tensor,
    preferences: tl.tensor,
    delta_stride: tl.tensor,
    out_stride: tl.tensor,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    SUB: tl.constexpr,
    E_CHUNK: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    GROUP: tl.constexpr,
    PACKED: tl.constexpr,
    PLACES: tl.constexpr,
    ROWS: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """Grid: (M / BLOCK,). M is whole tiles and BLOCK divides a tile, so no element needs a mask.

    places [M / TILE, 5] int32: tile of the inputs, number of that tile within its tensor, elements of a row of that
    tensor, and the rows of the weights that hold its first and last row's coefficients, negative where it has none.
    """
    SUBS: tl.constexpr = BLOCK // SUB
    to = tl.program_id(0).to(tl.int64) * BLOCK
    place = places + to // TILE * 5
    start = to
    if PLACES:
        start = tl.multiple_of(tl.load(place).to(tl.int64) * TILE + to % TILE, BLOCK)
    tile = start // TILE
    sub = tl.arange(0, SUBS)[:, None]  # [SUBS, 1]
    i = sub * SUB + tl.arange(0, SUB)[None, :]  # [SUBS, SUB]
    e = tl.arange(0, E_CHUNK)  # [E_CHUNK]
    t = start + i
    stored = t
    if PACKED:
        stored = start // 2 + sub * (SUB // 2) + tl.arange(0, SUB // 2)[None, :]  # [SUBS, SUB / 2]
    # All wide loads are issued before the first of them is waited for: that is what hides the memory's latency.
    if ONE_CHUNK:
        chunk = load_chunk(
            deltas, e, stored, experts, delta_stride
        )  # [E_CHUNK, SUBS, SUB], in registers as stored
    pristine = tl.load(base + t, eviction_policy="evict_first").to(tl.float32)
    group = tl.load(tile_group + tile).to(tl.int64)
    scale = (start + sub * SUB) // GROUP  # [SUBS, 1]
    row = sub.to(tl.int64)
    if ROWS > 0:
        inside = i if ROWS == 2 else sub * SUB
        inside = tl.load(place + 1).to(tl.int64) * TILE + to % TILE + inside  # of the tensor
        first = tl.load(place + 3).to(tl.int64)
        row = tl.minimum(
            first + inside // tl.load(place + 2), tl.load(place + 4).to(tl.int64)
        )  # a tile has a tail
    for k in range(0, preferences):
        above = tl.cast(k, tl.int64) * groups
        own = tl.where(row >= 0, above + row, -1) if ROWS > 0 else row
        if ONE_CHUNK:
            w = load_weights(
                weights, scales, above + group, own, e, scale, experts, n // GROUP, HAS_SCALES, ROWS
            )
            merged = pristine + tl.sum(w * unpack(chunk, PACKED), 0)
        else:
            # More deltas than registers: they stream past again for each preference.
            merged = pristine
            for begin in range(0, experts, E_CHUNK):
                d = load_chunk(deltas, begin + e, stored, experts, delta_stride)
                w = load_weights(
                    weights,
                    scales,
                    above + group,
                    own,
                    begin + e,
                    scale,
                    experts,
                    n // GROUP,
                    HAS_SCALES,
                    ROWS,
                )
                merged += tl.sum(w * unpack(d, PACKED), 0)
        rounded = round_to(merged, out.dtype.element_ty, INTERPRETED)
        at = out + tl.cast(k, tl.int64) * out_stride + to + i
        tl.store(at, rounded, eviction_policy="evict_first")


def merge_launch(
    base: Tensor,
    deltas: Tensor,
    tile_group: Tensor,
    weights: Tensor,
    scales: Tensor | None,
    places: Tensor | None,
    out: Tensor,
    tile: int,
    shared: int,
    config: MergeConfig,
) -> Launch:
    """One launch on `out` [K, M]; all arguments already checked, `shared` as `routed_merge` takes it."""
    n, (k, width, experts) = base.numel(), weights.shape
    block = min(config.block, tile)
    group = tile if scales is None else n // scales.shape[1]
    pointers = (base, deltas, tile_group, weights, weights if scales is None else scales)
    return Launch(
        merge_kernel,
        (out.shape[1] // block if k else 0,),
        (
            *pointers, tile_group if places is None else places, out, n, experts, width, k, deltas.stride(0),
            out.stride(0),
        ),
        {
            "TILE": tile, "BLOCK": block, "SUB": min(block, group, shared if shared > 1 else block),
            "E_CHUNK": config.e_chunk, "ONE_CHUNK": config.one_chunk, "HAS_SCALES": scales is not None,
            "GROUP": group, "PACKED": deltas.dtype == torch.uint8, "PLACES": places is not None,
            "ROWS": NO_ROWS if not shared else SHARED_ROW if shared > 1 else ANY_ROW,
            "INTERPRETED": interpreted(merge_kernel),
        },
        merge_threads(block, checks.bits(deltas)),
    )  # fmt: skip


@torch.library.custom_op("paretofuse::routed_merge_out", mutates_args=("out",))
def _routed_merge_out(
    base: Tensor,
    deltas: Tensor,
    tile_group: Tensor,
    weights: Tensor,
    scales: Tensor | None,
    places: Tensor | None,
    out: Tensor,
    tile: int,
    shared: int,
) -> None:
    _launch(base, deltas, tile_group, weights, scales, places, out, tile, shared).run()


def _launch(
    base: Tensor,
    deltas: Tensor,
    tile_group: Tensor,
    weights: Tensor,
    scales: Tensor | None,
    places: Tensor | None,
    out: Tensor,
    tile: int,
    shared: int,
) -> Launch:
    """The launch of a merge, in the configuration that its sizes ask for."""
    require(merge_kernel, base.device.type, INSTEAD)
    group = 0 if scales is None else base.numel() // scales.shape[1]
    config = merge_config(weights.shape[2], deltas.element_size(), group=group, shared=shared)
    return merge_launch(base, deltas, tile_group, weights, scales, places, out, tile, shared, config)


@_routed_merge_out.register_fake
def _(
    base: Tensor,
    deltas: Tensor,
    tile_group: Tensor,
    weights: Tensor,
    scales: Tensor | None,
    places: Tensor | None,
    out: Tensor,
    tile: int,
    shared: int,
) -> None:
    return None


@torch.library.custom_op("paretofuse::routed_merge", mutates_args=())
def _routed_merge(
    base: Tensor, deltas: Tensor, tile_group: Tensor, weights: Tensor, scales: Tensor | None, tile: int
) -> Tensor:
    out = base.new_empty((weights.shape[0], base.shape[0]))
    _routed_merge_out(base, deltas, tile_group, weights, scales, None, out, tile, 0)
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
    places: Tensor | None = None,
    shared: int = 0,
    out: Tensor | None = None,
    tile: int = 1024,
) -> Tensor:
    """Merge a flat model for one preference or for K at once, in one launch of a Triton kernel.

    Args:
        base: [N] float32, bfloat16 or float16, contiguous; N a multiple of `tile`.
        deltas: [E, N] of one of those dtypes, planes contiguous. Frozen. Or int8, or [E, N / 2] uint8 with two
            numbers of four bits in each, the first in the low half, each 8 more than its value; with scales.
        tile_group: [N / tile] int32, the row of the weights for each tile. Values must be in [0, G): they are
            read on the device only, and not checked.
        weights: [K, G, E] float32, contiguous; or [G, E] for one preference. With row coefficients behind the groups.
        scales: [E, N / group] float32, contiguous: what int8 or int4 deltas are multiplied by. A group is a power of
            two from 16 on and divides the tile.
        places: [M / tile, 5] int32, contiguous, for an output of M elements: for each of its tiles the tile of base and
            deltas that it is merged from, that one's number within its tensor, the elements of a row of that tensor,
            and the rows of the weights that hold its first and its last row's coefficients, negative if it has none.
            Read on the device only, and not checked. None: N elements in the order of the base.
        shared: 0 without row coefficients; else a power of two that divides the elements of a row of every
            tensor that has coefficients, from 16 on, or 1 where there is none.
        out: [K, M] (or [M], when the weights are [G, E]) of one of those dtypes, rows contiguous; it must
            overlap no input. Made in the base's dtype unless given; it must be given with places.
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
    _check(base, deltas, tile_group, many, scales, places, shared, tile)
    require(merge_kernel, base.device.type, INSTEAD)
    if out is None:
        if places is not None:
            raise ValueError("out: got None with places, expected the tensor to write to; make it first")
        merged: Tensor = torch.ops.paretofuse.routed_merge(base, deltas, tile_group, many, scales, tile)
        return merged[0] if single else merged
    target = out[None] if single else out
    _check_out(base, many, places, target, tile)
    torch.ops.paretofuse.routed_merge_out(
        base, deltas, tile_group, many, scales, places, target, tile, shared
    )
    return out


def bind_merge(
    base: Tensor,
    deltas: Tensor,
    tile_group: Tensor,
    weights: Tensor,
    out: Tensor,
    *,
    scales: Tensor | None = None,
    places: Tensor | None = None,
    shared: int = 0,
    tile: int = 1024,
) -> Callable[[], None]:
    """`routed_merge` into `out` [K, M], over and over: the weights [K, G, E] are rewritten where they lie in between.

    All is checked here, once, with its errors; a call then costs the host no more than the launch. It is no operator of
    torch: nothing tells autograd that `out` was written to.
    """
    _check(base, deltas, tile_group, weights, scales, places, shared, tile)
    _check_out(base, weights, places, out, tile)
    launch = _launch(base, deltas, tile_group, weights, scales, places, out, tile, shared)
    return launch.repeated()


def _check_out(base: Tensor, weights: Tensor, places: Tensor | None, out: Tensor, tile: int) -> None:
    """Raise TypeError or ValueError unless the outputs [K, M] fit the inputs of a merge."""
    length = base.numel() if places is None else len(places) * tile
    checks.check_tensor("out", out, checks.FLOATS, (weights.shape[0], length), base.device)
    checks.check_rows("out", out)
    checks.check_frozen("out", out)


def _check(
    base: Tensor,
    deltas: Tensor,
    tile_group: Tensor,
    weights: Tensor,
    scales: Tensor | None,
    places: Tensor | None,
    shared: int,
    tile: int,
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
    checks.check_deltas(deltas, scales, (experts, n), tile, base.device)
    if scales is not None:
        checks.check_contiguous("scales", scales)
    checks.check_tensor("tile_group", tile_group, (torch.int32,), (n // tile,), base.device)
    checks.check_tensor("weights", weights, (torch.float32,), tuple(weights.shape), base.device)
    checks.check_rows("base", base)
    checks.check_rows("tile_group", tile_group)
    checks.check_contiguous("weights", weights)
    checks.check_frozen("base", base)
    checks.check_frozen("weights", weights)
    if places is not None:
        checks.check_tensor("places", places, (torch.int32,), (len(places), 5), base.device)
        checks.check_contiguous("places", places)
    if shared and (places is None or (shared > 1 and (shared < SMALLEST_SHARED or shared & (shared - 1)))):
        raise ValueError(
            f"shared: got {shared} with places {'of none' if places is None else 'given'}, expected 0 or, with places, "
            "1 or a power of two from 16 on"
        )
