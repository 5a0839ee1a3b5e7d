"""Products whose inner dimension was cut into pieces, so that few rows keep a whole GPU busy.

    y[m, o] = sum_s pieces[s, m, o] + bias[m // per, o]

    pieces [S, M, O] float32   bias [O], or [B, O] with M = B per   y [M, O]

In float32 in a fixed order, without atomics, and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paretofuse.kernels.launch import Launch
from paretofuse.kernels.numeric import round_to
from paretofuse.kernels.triton_or_none import interpreted, jit, tl

BLOCK, THREADS = 512, 128
"""Sums of one program, and its threads: 16 bytes each of a piece at a time."""


@jit
def add_pieces_kernel(
    pieces: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    total: tl.tensor,
    outs: tl.tensor,
    count: tl.tensor,
    per: tl.tensor,
    bias_stride: tl.tensor,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """Grid: (ceil(total / BLOCK),). total is M O, count S."""
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = t < total
    sums = tl.zeros((BLOCK,), tl.float32)
    for s in range(0, count):
        sums += tl.load(pieces + tl.cast(s, tl.int64) * total + t, mask=inside, other=0.0)
    if HAS_BIAS:
        own = bias + (t // outs // per).to(tl.int64) * bias_stride + t % outs
        sums += tl.load(own, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + t, round_to(sums, y.dtype.element_ty, INTERPRETED), mask=inside)


def add_pieces_launch(
    pieces: Tensor, bias: Tensor | None, dtype: torch.dtype, per: int
) -> tuple[Tensor, Launch]:
    """The kernel and the y [M, O] that it fills; all arguments already checked."""
    count, rows, outs = pieces.shape
    y = pieces.new_empty((rows, outs), dtype=dtype)
    return y, Launch(
        add_pieces_kernel,
        (-(-y.numel() // BLOCK),),
        (
            pieces, pieces if bias is None else bias, y, y.numel(), outs, count, per,
            bias.stride(0) if bias is not None and bias.ndim == 2 else 0,
        ),
        {
            "BLOCK": BLOCK, "HAS_BIAS": bias is not None, "INTERPRETED": interpreted(add_pieces_kernel),
        },
        THREADS,
    )  # fmt: skip
