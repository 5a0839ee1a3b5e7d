"""The routed gradient: what a loss says about the routing weights, from the gradient of the merged weights.

    dweights[g, e] = sum over t with tile_group[t // tile] = g of grad[t] * deltas[e, t]

    grad [N]   deltas [E, N]   tile_group [ceil(N / tile)]   partials [ceil(N / block), E]   dweights [G, E]

Two stages in a fixed order and without atomics, so the result is the same bits every time. Stage one reads
each gradient and each delta once and leaves one number for each block and expert; it takes one launch for
each bucket of gradients that becomes ready, which can be freed at once. Stage two adds the blocks of each
group, in float64, as a tree of two levels: pieces of at most SPAN blocks, a program each, then a group's pieces.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from paretofuse.kernels import checks
from paretofuse.kernels.launch import GradConfig, Launch, filled, grad_config
from paretofuse.kernels.numeric import unpack
from paretofuse.kernels.reference import block_products_reference
from paretofuse.kernels.triton_or_none import interpreted, jit, require, tl

MAX_BLOCK = 1024
"""Elements per partial sum: enough that partials cost 0.2 % of the traffic, few enough to stay in registers."""

SUM_BLOCKS, SUM_EXPERTS, SUM_THREADS = 64, 8, 128
"""The piece of `partials` that stage two adds at a time, and the threads that do so."""

SPAN = 1024
"""Blocks that one program of stage two adds: an embedding, or a whole model in one group, keeps every core busy."""


@jit
def partials_kernel(
    grad: tl.tensor,
    deltas: tl.tensor,
    scales: tl.tensor,
    partials: tl.tensor,
    n: tl.tensor,
    length: tl.tensor,
    experts: tl.tensor,
    delta_stride: tl.tensor,
    scale_stride: tl.tensor,
    BLOCK: tl.constexpr,
    E_CHUNK: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    GROUP: tl.constexpr,
    PACKED: tl.constexpr,
) -> None:
    """Grid: (B,). The block's gradient stays in registers while the experts' deltas stream past.

    A block is taken as [GROUPS, GROUP]: the elements of a group have one scale, which their sum is multiplied by.
    length is of a plane as stored: n, or half as many bytes.
    """
    GROUPS: tl.constexpr = BLOCK // GROUP
    block = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)  # [GROUPS]
    t = block * BLOCK + group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]  # [GROUPS, GROUP]
    stored = t
    if PACKED:
        stored = block * (BLOCK // 2) + group[:, None] * (GROUP // 2) + tl.arange(0, GROUP // 2)[None, :]
    g = tl.load(grad + t, mask=t < n, other=0.0).to(tl.float32)
    for first in range(0, experts, E_CHUNK):
        e = first + tl.arange(0, E_CHUNK)  # [E_CHUNK]
        delta = tl.load(
            deltas + e[:, None, None].to(tl.int64) * delta_stride + stored[None],
            mask=(stored < length)[None] & (e < experts)[:, None, None],
            other=0,
            eviction_policy="evict_first",
        )  # [E_CHUNK, GROUPS, GROUP or its half]
        sums = tl.sum(g[None] * unpack(delta, PACKED), 2)  # [E_CHUNK, GROUPS]
        if HAS_SCALES:
            place = block * GROUPS + group[None, :]  # [1, GROUPS]
            inside = (place * GROUP < n) & (e < experts)[:, None]
            sums *= tl.load(scales + e[:, None].to(tl.int64) * scale_stride + place, mask=inside, other=0.0)
        tl.store(partials + block * experts + e, tl.sum(sums, 1), mask=e < experts)


@jit
def segment_sums_kernel(
    values: tl.tensor,
    order: tl.tensor,
    starts: tl.tensor,
    out: tl.tensor,
    experts: tl.tensor,
    BLOCKS: tl.constexpr,
    EXPERTS: tl.constexpr,
) -> None:
    """Grid: (segments, ceil(experts / EXPERTS)). One segment of rows in `order`, `BLOCKS` of them at a time."""
    segment = tl.program_id(0)
    e = tl.program_id(1) * EXPERTS + tl.arange(0, EXPERTS)  # [EXPERTS]
    end = tl.load(starts + segment + 1)
    total = tl.zeros((BLOCKS, EXPERTS), tl.float64)
    for first in range(tl.load(starts + segment), end, BLOCKS):
        i = first + tl.arange(0, BLOCKS)  # [BLOCKS]
        row = tl.load(order + i, mask=i < end, other=0).to(tl.int64)
        inside = (i < end)[:, None] & (e < experts)[None, :]
        piece = tl.load(values + row[:, None] * experts + e[None, :], mask=inside, other=0.0)
        total += piece.to(tl.float64)
    sums = tl.sum(total, 0).to(out.dtype.element_ty)
    tl.store(out + segment.to(tl.int64) * experts + e, sums, mask=e < experts)


def partials_launch(
    grad: Tensor,
    deltas: Tensor,
    scales: Tensor | None,
    group: int,
    block: int,
    config: GradConfig,
    partials: Tensor | None = None,
) -> tuple[Tensor, Launch]:
    """Stage one and the partials that it fills, made unless given; all arguments already checked."""
    n, experts = grad.numel(), deltas.shape[0]
    if partials is None:
        partials = grad.new_empty((-(-n // block), experts), dtype=torch.float32)
    return partials, Launch(
        partials_kernel,
        (len(partials),),
        (
            grad, deltas, grad if scales is None else scales, partials, n, deltas.shape[1], experts,
            deltas.stride(0), 0 if scales is None else scales.stride(0),
        ),
        {
            "BLOCK": block, "E_CHUNK": config.e_chunk, "HAS_SCALES": scales is not None,
            "GROUP": min(group, block), "PACKED": deltas.dtype == torch.uint8,
        },
        config.threads,
    )  # fmt: skip


def sums_launch(values: Tensor, order: Tensor, starts: Tensor, dtype: torch.dtype) -> tuple[Tensor, Launch]:
    """One level of stage two and the sums [segments, E] that it fills; all arguments already checked."""
    segments, experts = len(starts) - 1, values.shape[1]
    out = values.new_empty((segments, experts), dtype=dtype)
    return out, Launch(
        segment_sums_kernel,
        (segments, -(-experts // SUM_EXPERTS)),
        (values, order, starts, out, experts),
        {"BLOCKS": SUM_BLOCKS, "EXPERTS": SUM_EXPERTS},
        SUM_THREADS,
    )


def run_sums(partials: Tensor, order: Tensor, pieces: Tensor, starts: Tensor) -> Tensor:
    """Stage two by the kernel: the sums of the pieces in float64, then those of the groups."""
    sums = filled(sums_launch(partials, order, pieces, torch.float64))
    inside = torch.arange(len(sums), dtype=torch.int32, device=sums.device)
    return filled(sums_launch(sums, inside, starts, torch.float32))


def by_triton(kernel: object, tensor: Tensor) -> bool:
    """Whether the kernel does it where the tensor lies: on the CPU the reference does, outside of Triton's interpreter.

    Raises:
        ImportError, ValueError: neither can.
    """
    if tensor.device.type != "cpu":
        require(kernel, tensor.device.type, "paretofuse.kernels.reference.routed_grad_reference")
        return True
    return interpreted(kernel)


@torch.library.custom_op("paretofuse::group_sums", mutates_args=(), device_types="cuda")
def _group_sums(partials: Tensor, order: Tensor, pieces: Tensor, starts: Tensor) -> Tensor:
    return run_sums(partials, order, pieces, starts)


@_group_sums.register_kernel("cpu")
def _(partials: Tensor, order: Tensor, pieces: Tensor, starts: Tensor) -> Tensor:
    if by_triton(segment_sums_kernel, partials):
        return run_sums(partials, order, pieces, starts)
    ends = pieces[starts.long()]  # where each group ends in `order`
    groups = torch.repeat_interleave(torch.arange(len(starts) - 1), ends.diff())
    sums = torch.zeros((len(starts) - 1, partials.shape[1]), dtype=torch.float64)
    return sums.index_add_(0, groups, partials.double()[order.long()]).float()


@_group_sums.register_fake
def _(partials: Tensor, order: Tensor, pieces: Tensor, starts: Tensor) -> Tensor:
    return partials.new_empty((starts.shape[0] - 1, partials.shape[1]))


@dataclass(frozen=True)
class GroupPlan:
    """Which blocks belong to which group; made once for a layout.

    Attributes:
        order: [B] int32, the blocks sorted by group.
        pieces: [Q + 1] int32, where each piece of at most SPAN blocks of one group begins in `order`.
        starts: [G + 1] int32, where each group begins among the pieces.
        block: elements per block.
    """

    order: Tensor
    pieces: Tensor
    starts: Tensor
    block: int


def plan_groups(tile_group: Tensor, groups: int, tile: int = 1024) -> GroupPlan:
    """Sort a layout's blocks by group, for `group_sums`.

    Args:
        tile_group: [T] integers in [0, groups); not checked.
        groups: G.
        tile: elements per tile, a power of two from 16 on.

    Raises:
        ValueError: the tile cannot be launched.
    """
    checks.check_tile(tile)
    block = min(tile, MAX_BLOCK)
    block_group = tile_group.cpu().repeat_interleave(tile // block).to(torch.int64)
    counts = torch.bincount(block_group, minlength=groups)  # blocks of each group
    each = (counts + SPAN - 1) // SPAN  # pieces of each group
    starts = torch.nn.functional.pad(each.cumsum(0), (1, 0))
    own = torch.repeat_interleave(torch.arange(groups), each)  # the group of each piece
    within = torch.arange(len(own)) - starts[own]
    first = counts.cumsum(0) - counts
    pieces = torch.cat([first[own] + within * SPAN, counts.sum()[None]])
    order = torch.argsort(block_group, stable=True)
    order, pieces, starts = (t.int().to(tile_group.device) for t in (order, pieces, starts))
    return GroupPlan(order, pieces, starts, block)


def grad_partials(
    grad: Tensor,
    deltas: Tensor,
    *,
    scales: Tensor | None = None,
    out: Tensor | None = None,
    tile: int = 1024,
) -> Tensor:
    """Stage one for one bucket: the products of each block of a gradient with each expert's delta, in one
    launch. It is no operator of torch: hooks call it, which no compiler sees.

    Args:
        grad: [N] float32, bfloat16 or float16, contiguous: a bucket, or one tensor's gradient flattened.
            Padding between its tensors must be finite, and zero there or in the deltas.
        deltas: [E, N] of one of those dtypes, planes contiguous (a slice of the flat planes will do).
            Or int8, or [E, ceil(N / 2)] uint8 for int4, with scales, as `routed_merge` takes them.
        scales: [E, ceil(N / group)] float32, contiguous: what int8 or int4 deltas are multiplied by.
        out: [ceil(N / block), E] float32, contiguous, block = min(tile, 1024): rows of the partials of all buckets,
            in layout order, as `group_sums` takes them. Made unless given.
        tile: elements per tile, a power of two from 16 on; a bucket begins on a tile boundary.

    Returns:
        `out`.

    Raises:
        TypeError, ValueError: a dtype, shape, stride or device does not fit.
    """
    checks.check_tile(tile)
    if deltas.ndim != 2:
        raise ValueError(
            f"deltas: got shape {tuple(deltas.shape)}, expected [E, N]; stack the experts' planes"
        )
    n, block = grad.numel(), min(tile, MAX_BLOCK)
    checks.check_tensor("grad", grad, checks.FLOATS, (n,), grad.device)
    checks.check_rows("grad", grad)
    checks.check_deltas(deltas, scales, (deltas.shape[0], n), tile, grad.device)
    shape = (-(-n // block), deltas.shape[0])
    if out is None:
        out = grad.new_empty(shape, dtype=torch.float32)
    else:
        checks.check_tensor("out", out, (torch.float32,), shape, grad.device)
        checks.check_contiguous("out", out)
    group = tile if scales is None else checks.group_of(n, scales.shape[1], tile)
    if by_triton(partials_kernel, grad):
        config = grad_config(deltas.element_size())
        return filled(partials_launch(grad, deltas, scales, group, block, config, out))
    return out.copy_(block_products_reference(grad, deltas, block, scales=scales, group=group))


def group_sums(partials: Tensor, plan: GroupPlan) -> Tensor:
    """Stage two: add the partial sums of each group, in float64 and in the plan's order.

    Args:
        partials: [B, E] float32, contiguous: the outputs of `grad_partials` of all buckets, concatenated.
        plan: of the same layout.

    Returns:
        [G, E] float32, the gradient of the routing weights.

    Raises:
        TypeError, ValueError: a dtype, shape, stride or device does not fit.
    """
    checks.check_tensor(
        "partials", partials, (torch.float32,), (len(plan.order), partials.shape[-1]), plan.order.device
    )
    checks.check_contiguous("partials", partials)
    by_triton(segment_sums_kernel, partials)  # raises where neither it nor the reference can
    sums: Tensor = torch.ops.paretofuse.group_sums(partials, plan.order, plan.pieces, plan.starts)
    return sums
