"""The kernels of `routed_rows`, and their launches: E + 1 products for a tile of rows, and the weights' gradient.

    y[m] = x[m] base^T + sum_e weights[m // P, e] * (x[m] deltas[e]^T) + bias[m // P]
    dweights[m, e] = <g[m], x[m] deltas[e]^T>                        g = dLoss/dy

m counts the M = B P rows of all preferences; see `routed_rows` for the shapes. Each plane is read once for a tile of
rows, whatever the rows' preferences, and products are summed in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paretofuse.kernels.launch import Launch, RowsConfig, dot_precision, rows_config
from paretofuse.kernels.numeric import dot, round_to
from paretofuse.kernels.triton_or_none import interpreted, jit, tl


@jit
def product(
    x: tl.tensor,
    plane: tl.tensor,
    m: tl.tensor,
    o: tl.tensor,
    rows: tl.tensor,
    outs: tl.tensor,
    ins: tl.tensor,
    stride_o: tl.tensor,
    stride_i: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    BM: tl.constexpr,
    BO: tl.constexpr,
    BI: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> tl.tensor:
    """The tile [BO, BM] of plane x^T, for rows m of x and outputs o, over inputs begin .. end.

    The plane is rounded to x's dtype.
    """
    total = tl.zeros((BO, BM), tl.float32)
    for start in range(begin, end, BI):
        i = start + tl.arange(0, BI)  # [BI]
        at = o[:, None].to(tl.int64) * stride_o + i[None, :].to(tl.int64) * stride_i  # [BO, BI]
        w = tl.load(plane + at, mask=(o < outs)[:, None] & (i < ins)[None, :], other=0.0)
        if plane.dtype.element_ty != x.dtype.element_ty:
            w = round_to(w.to(tl.float32), x.dtype.element_ty, INTERPRETED)
        xt = tl.load(
            x + m[None, :].to(tl.int64) * ins + i[:, None],
            mask=(m < rows)[None, :] & (i < ins)[:, None],
            other=0.0,
        )  # [BI, BM]
        total = dot(w, xt, total, PRECISION, INTERPRETED)
    return total


@jit
def rows_kernel(
    x: tl.tensor,
    base: tl.tensor,
    deltas: tl.tensor,
    weights: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    rows: tl.tensor,
    outs: tl.tensor,
    ins: tl.tensor,
    experts: tl.tensor,
    per: tl.tensor,
    stride_o: tl.tensor,
    stride_i: tl.tensor,
    delta_stride: tl.tensor,
    bias_stride: tl.tensor,
    piece: tl.tensor,
    BM: tl.constexpr,
    BO: tl.constexpr,
    BI: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """Grid: (ceil(rows / BM) * ceil(outs / BO), pieces). Row m of x has the preference m // per.

    A program takes `piece` of the inputs, a multiple of BI, and leaves y[piece]; the bias goes with a whole product.
    """
    row_tiles = tl.cdiv(rows, BM)
    m = (tl.program_id(0) % row_tiles) * BM + tl.arange(0, BM)  # [BM]
    o = (tl.program_id(0) // row_tiles) * BO + tl.arange(0, BO)  # [BO]
    b = (m // per).to(tl.int64)
    begin = tl.program_id(1) * piece
    end = tl.minimum(begin + piece, ins)
    total = product(
        x, base, m, o, rows, outs, ins, stride_o, stride_i, begin, end, BM, BO, BI, PRECISION, INTERPRETED
    )
    for e in range(0, experts):
        plane = deltas + tl.cast(e, tl.int64) * delta_stride
        part = product(
            x,
            plane,
            m,
            o,
            rows,
            outs,
            ins,
            stride_o,
            stride_i,
            begin,
            end,
            BM,
            BO,
            BI,
            PRECISION,
            INTERPRETED,
        )
        total += part * tl.load(weights + b * experts + e, mask=m < rows, other=0.0)[None, :]
    y_t = tl.trans(total)  # [BM, BO]
    inside = (m < rows)[:, None] & (o < outs)[None, :]
    if HAS_BIAS:
        y_t += tl.load(bias + b[:, None] * bias_stride + o[None, :], mask=inside, other=0.0).to(tl.float32)
    row = tl.program_id(1).to(tl.int64) * rows + m[:, None]
    y_at = y + row * outs + o[None, :]
    tl.store(y_at, round_to(y_t, y.dtype.element_ty, INTERPRETED), mask=inside)


@jit
def rows_weights_grad_kernel(
    grad: tl.tensor,
    x: tl.tensor,
    deltas: tl.tensor,
    partials: tl.tensor,
    rows: tl.tensor,
    outs: tl.tensor,
    ins: tl.tensor,
    experts: tl.tensor,
    stride_o: tl.tensor,
    stride_i: tl.tensor,
    delta_stride: tl.tensor,
    BM: tl.constexpr,
    BO: tl.constexpr,
    BI: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """Grid: (ceil(rows / BM) * ceil(outs / BO),). Leaves partials[output tile, e, m] of <grad[m], x[m] deltas[e]^T>."""
    row_tiles = tl.cdiv(rows, BM)
    m = (tl.program_id(0) % row_tiles) * BM + tl.arange(0, BM)  # [BM]
    out_tile = tl.program_id(0) // row_tiles
    o = out_tile * BO + tl.arange(0, BO)  # [BO]
    g = tl.load(
        grad + m[None, :].to(tl.int64) * outs + o[:, None],
        mask=(m < rows)[None, :] & (o < outs)[:, None],
        other=0.0,
    ).to(tl.float32)  # [BO, BM]
    for e in range(0, experts):
        plane = deltas + tl.cast(e, tl.int64) * delta_stride
        part = product(
            x, plane, m, o, rows, outs, ins, stride_o, stride_i, 0, ins, BM, BO, BI, PRECISION, INTERPRETED
        )
        row = (out_tile.to(tl.int64) * experts + e) * rows
        tl.store(partials + row + m, tl.sum(g * part, 0), mask=m < rows)


def rows_launch(
    x: Tensor,
    base: Tensor,
    deltas: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    config: RowsConfig,
    piece: int,
    precision: str,
) -> tuple[Tensor, Launch]:
    """The forward kernel and what it fills; all arguments already checked, x [B, P, I] contiguous.

    Args:
        x, base, deltas, weights, bias: as `routed_rows` takes them; a bias [B, O], with whole products only.
        config: one that the rule gives.
        piece: inputs of a program, from `piece_of`.
        precision: from `dot_precision`.

    Returns:
        y [1, M, O] in x's dtype; or, where the inputs are more than a piece, [pieces, M, O] float32 to be added.
    """
    (batch, per, ins), (experts, outs, _) = x.shape, deltas.shape
    pieces = max(1, -(-ins // piece))
    y = x.new_empty((pieces, batch * per, outs), dtype=x.dtype if pieces == 1 else torch.float32)
    return y, Launch(
        rows_kernel,
        (-(-batch * per // config.rows) * -(-outs // config.outs), pieces),
        (
            x, base, deltas, weights, weights if bias is None else bias, y, batch * per, outs, ins, experts, per,
            base.stride(0), base.stride(1), deltas.stride(0), 0 if bias is None else bias.stride(0), piece,
        ),
        {
            "BM": config.rows, "BO": config.outs, "BI": config.ins, "HAS_BIAS": bias is not None,
            "PRECISION": precision, "INTERPRETED": interpreted(rows_kernel),
            "num_warps": config.warps, "num_stages": config.stages,
        },
    )  # fmt: skip


def weights_grad_launch(
    grad: Tensor, x: Tensor, deltas: Tensor, config: RowsConfig, precision: str
) -> tuple[Tensor, Launch]:
    """The weights' gradient and its pieces [out tiles, E, M]; grad [B, P, O] and x [B, P, I] contiguous."""
    (batch, per, ins), (experts, outs, _) = x.shape, deltas.shape
    rows, out_tiles = batch * per, -(-outs // config.outs)
    partials = x.new_empty((out_tiles, experts, rows), dtype=torch.float32)
    return partials, Launch(
        rows_weights_grad_kernel,
        (-(-rows // config.rows) * out_tiles,),
        (grad, x, deltas, partials, rows, outs, ins, experts, deltas.stride(1), deltas.stride(2), deltas.stride(0)),
        {
            "BM": config.rows, "BO": config.outs, "BI": config.ins, "PRECISION": precision,
            "INTERPRETED": interpreted(rows_weights_grad_kernel),
            "num_warps": config.warps, "num_stages": config.stages,
        },
    )  # fmt: skip


def config_for(x: Tensor, *planes: Tensor) -> RowsConfig:
    """The configuration that the rule gives to x [B, P, I] and these planes."""
    plane = max(tensor.element_size() for tensor in planes)
    return rows_config(x.shape[0] * x.shape[1], x.element_size(), plane, dot_precision(x.dtype))
