"""The routed linear layer: a linear layer whose weight is mixed for the product and never kept.

    y[m, o] = sum_i x[m, i] W[o, i] + bias[o]        W[o, i] = base[o, i] + sum_e weights[e] * deltas[e, o, i]

    x [M, I]   base [O, I]   deltas [E, O, I]   weights [E]   bias [O]   y [M, O]

W is mixed in float32 and rounded once to x's dtype, like a merged model's weight. For few rows (as in generation) it is
mixed on the way into the product and lives in registers and shared memory only; the inner dimension is cut into
pieces, so that one row keeps a whole GPU busy. Many rows would mix it again for each tile of them: for those it is
merged into scratch by one launch (`layer_merge.py`), and cuBLAS multiplies (`launch.FUSED_ROWS` says from where on).
Backward, with g = dLoss/dy:

    dx = g W                          the same, with base and deltas read transposed
    dweights[e] = <g^T x, deltas[e]>  g^T x is built tile by tile and multiplied with each delta on the spot
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from paretofuse.kernels import checks
from paretofuse.kernels.launch import (
    FUSED_ROWS,
    Launch,
    LinearConfig,
    WeightsGradConfig,
    dot_precision,
    filled,
    linear_config,
    piece_of,
    weights_grad_config,
)
from paretofuse.kernels.layer_merge import merge_layer
from paretofuse.kernels.numeric import dot, round_to
from paretofuse.kernels.pieces import add_pieces_launch
from paretofuse.kernels.reference import inner_reference, routed_linear_reference
from paretofuse.kernels.triton_or_none import interpreted, jit, require, tl

INSTEAD = "paretofuse.kernels.reference.routed_linear_reference"


@jit
def add_deltas(
    mixed: tl.tensor,
    deltas: tl.tensor,
    weights: tl.tensor,
    at: tl.tensor,
    inside: tl.tensor,
    first: tl.tensor,
    experts: tl.tensor,
    delta_stride: tl.tensor,
    E_CHUNK: tl.constexpr,
) -> tl.tensor:
    """`mixed`, a piece of W, plus the weighted deltas of experts first .. first + E_CHUNK."""
    for j in tl.static_range(E_CHUNK):
        e = first + j
        plane = deltas + tl.cast(e, tl.int64) * delta_stride
        delta = tl.load(plane + at, mask=inside & (e < experts), other=0.0).to(tl.float32)
        mixed += tl.load(weights + e, mask=e < experts, other=0.0) * delta
    return mixed


@jit
def linear_kernel(
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
    stride_o: tl.tensor,
    stride_i: tl.tensor,
    delta_stride: tl.tensor,
    piece: tl.tensor,
    BM: tl.constexpr,
    BO: tl.constexpr,
    BI: tl.constexpr,
    E_CHUNK: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """Grid: (ceil(rows / BM) * ceil(outs / BO), pieces). Computes y^T = W x^T, so that mixed W is the register operand.

    A program takes `piece` of the inputs, a multiple of BI, and leaves y[piece]; the bias goes with a whole product.
    Neighbours share their tile of W, so L2 serves all but the first.
    """
    row_tiles = tl.cdiv(rows, BM)
    m = (tl.program_id(0) % row_tiles) * BM + tl.arange(0, BM)  # [BM]
    o = (tl.program_id(0) // row_tiles) * BO + tl.arange(0, BO)  # [BO]
    total = tl.zeros((BO, BM), tl.float32)
    begin = tl.program_id(1) * piece
    for start in range(begin, tl.minimum(begin + piece, ins), BI):
        i = start + tl.arange(0, BI)  # [BI]
        inside = (o < outs)[:, None] & (i < ins)[None, :]
        at = o[:, None].to(tl.int64) * stride_o + i[None, :].to(tl.int64) * stride_i  # [BO, BI]
        mixed = tl.load(base + at, mask=inside, other=0.0).to(tl.float32)
        if ONE_CHUNK:
            mixed = add_deltas(mixed, deltas, weights, at, inside, 0, experts, delta_stride, E_CHUNK)
        else:
            for first in range(0, experts, E_CHUNK):
                mixed = add_deltas(mixed, deltas, weights, at, inside, first, experts, delta_stride, E_CHUNK)
        xt = tl.load(
            x + m[None, :].to(tl.int64) * ins + i[:, None],
            mask=(m < rows)[None, :] & (i < ins)[:, None],
            other=0.0,
        )  # [BI, BM]
        total = dot(round_to(mixed, x.dtype.element_ty, INTERPRETED), xt, total, PRECISION, INTERPRETED)
    if HAS_BIAS:
        total += tl.load(bias + o, mask=o < outs, other=0.0).to(tl.float32)[:, None]
    row = tl.program_id(1).to(tl.int64) * rows + m[:, None]
    tl.store(
        y + row * outs + o[None, :],
        round_to(tl.trans(total), y.dtype.element_ty, INTERPRETED),
        mask=(m < rows)[:, None] & (o < outs)[None, :],
    )


@jit
def weights_grad_kernel(
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
    """Grid: (ceil(outs / BO) * ceil(ins / BI),). One tile of g^T x, reduced against every delta's tile."""
    in_tiles = tl.cdiv(ins, BI)
    tile = tl.program_id(0)
    o = (tile // in_tiles) * BO + tl.arange(0, BO)  # [BO]
    i = (tile % in_tiles) * BI + tl.arange(0, BI)  # [BI]
    product = tl.zeros((BO, BI), tl.float32)
    for start in range(0, rows, BM):
        m = start + tl.arange(0, BM)  # [BM]
        gt = tl.load(
            grad + m[None, :].to(tl.int64) * outs + o[:, None],
            mask=(m < rows)[None, :] & (o < outs)[:, None],
            other=0.0,
        )  # [BO, BM]
        xs = tl.load(
            x + m[:, None].to(tl.int64) * ins + i[None, :],
            mask=(m < rows)[:, None] & (i < ins)[None, :],
            other=0.0,
        )  # [BM, BI]
        product = dot(gt, xs, product, PRECISION, INTERPRETED)
    inside = (o < outs)[:, None] & (i < ins)[None, :]
    at = o[:, None].to(tl.int64) * stride_o + i[None, :].to(tl.int64) * stride_i
    for e in range(0, experts):
        plane = deltas + tl.cast(e, tl.int64) * delta_stride
        delta = tl.load(plane + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(partials + tile.to(tl.int64) * experts + e, tl.sum(tl.sum(product * delta, 1), 0))


def linear_launch(
    x: Tensor,
    base: Tensor,
    deltas: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    config: LinearConfig,
    piece: int,
    precision: str,
) -> tuple[Tensor, Launch]:
    """The forward kernel and what it fills; all arguments already checked, x [M, I] contiguous.

    Args:
        x, base, deltas, weights, bias: as `routed_linear` takes them; a bias with whole products only.
        config: one that the rule gives.
        piece: inputs of a program, from `piece_of`.
        precision: from `dot_precision`.

    Returns:
        y [1, M, O] in x's dtype; or, where the inputs are more than a piece, [pieces, M, O] float32 to be added.
    """
    (rows, ins), (experts, outs, _) = x.shape, deltas.shape
    one_chunk, pieces = experts <= config.e_chunk, max(1, -(-ins // piece))
    y = x.new_empty((pieces, rows, outs), dtype=x.dtype if pieces == 1 else torch.float32)
    return y, Launch(
        linear_kernel,
        (-(-rows // config.rows) * -(-outs // config.outs), pieces),
        (
            x, base, deltas, weights, bias if bias is not None else weights, y, rows, outs, ins, experts,
            base.stride(0), base.stride(1), deltas.stride(0), piece,
        ),
        {
            "BM": config.rows, "BO": config.outs, "BI": config.ins,
            "E_CHUNK": config.e_chunk if one_chunk else config.loop_chunk, "ONE_CHUNK": one_chunk,
            "HAS_BIAS": bias is not None, "PRECISION": precision, "INTERPRETED": interpreted(linear_kernel),
            "num_warps": config.warps, "num_stages": config.stages,
        },
    )  # fmt: skip


def fused_linear(
    x: Tensor, base: Tensor, deltas: Tensor, weights: Tensor, bias: Tensor | None, config: LinearConfig
) -> Tensor:
    """y [M, O] by the kernel that mixes the weight on the way: one launch, or two where the inputs are cut."""
    (rows, ins), outs = x.shape, base.shape[0]
    piece = piece_of(-(-rows // config.rows) * -(-outs // config.outs), ins, config.ins)
    whole = ins <= piece
    y = filled(
        linear_launch(
            x, base, deltas, weights, bias if whole else None, config, piece, dot_precision(x.dtype)
        )
    )
    return y[0] if whole else filled(add_pieces_launch(y, bias, x.dtype, rows))


def run_linear(x: Tensor, base: Tensor, deltas: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
    """y [M, O] by the way that its size asks for."""
    if x.shape[0] > FUSED_ROWS:
        with torch.autocast(x.device.type, enabled=False):
            mixed = merge_layer(base, deltas, weights[None], x.dtype)[0]
            return F.linear(x, mixed, None if bias is None else bias.to(x.dtype))
    plane = max(base.element_size(), deltas.element_size())
    config = linear_config(deltas.shape[0], x.element_size(), plane)
    return fused_linear(x.contiguous(), base, deltas, weights, bias, config)


def weights_grad_launch(
    grad: Tensor, x: Tensor, deltas: Tensor, config: WeightsGradConfig, precision: str
) -> tuple[Tensor, Launch]:
    """The weights' gradient and its tiles' sums [tiles, E]; grad [M, O] and x [M, I] contiguous."""
    (rows, ins), (experts, outs, _) = x.shape, deltas.shape
    tiles = -(-outs // config.outs) * -(-ins // config.ins)
    partials = x.new_empty((tiles, experts), dtype=torch.float32)
    return partials, Launch(
        weights_grad_kernel,
        (tiles,),
        (grad, x, deltas, partials, rows, outs, ins, experts, deltas.stride(1), deltas.stride(2), deltas.stride(0)),
        {
            "BM": config.rows, "BO": config.outs, "BI": config.ins, "PRECISION": precision,
            "INTERPRETED": interpreted(weights_grad_kernel),
            "num_warps": config.warps, "num_stages": config.stages,
        },
    )  # fmt: skip


def run_weights_grad(grad: Tensor, x: Tensor, deltas: Tensor, config: WeightsGradConfig) -> Tensor:
    """The weights' gradient [E] by the kernel, its tiles added in float64."""
    tiles = filled(weights_grad_launch(grad, x, deltas, config, dot_precision(x.dtype)))
    return tiles.sum(0, dtype=torch.float64).float()


@torch.library.custom_op("paretofuse::routed_linear", mutates_args=(), device_types="cuda")
def _routed_linear(x: Tensor, base: Tensor, deltas: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
    return run_linear(x, base, deltas, weights, bias)


@_routed_linear.register_kernel("cpu")
def _(x: Tensor, base: Tensor, deltas: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
    if interpreted(linear_kernel):
        return run_linear(x, base, deltas, weights, bias)
    return routed_linear_reference(x, base, deltas, weights, bias)


@_routed_linear.register_fake
def _(x: Tensor, base: Tensor, deltas: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], base.shape[0]))


@torch.library.custom_op("paretofuse::routed_linear_weights_grad", mutates_args=(), device_types="cuda")
def _weights_grad(grad: Tensor, x: Tensor, deltas: Tensor) -> Tensor:
    config = weights_grad_config(x.element_size())
    return run_weights_grad(grad.contiguous(), x.contiguous(), deltas, config)


@_weights_grad.register_kernel("cpu")
def _(grad: Tensor, x: Tensor, deltas: Tensor) -> Tensor:
    if interpreted(weights_grad_kernel):
        config = weights_grad_config(x.element_size())
        return run_weights_grad(grad.contiguous(), x.contiguous(), deltas, config)
    with torch.autocast("cpu", enabled=False):
        return inner_reference(grad.float().T @ x.float(), list(deltas)).float()


@_weights_grad.register_fake
def _(grad: Tensor, x: Tensor, deltas: Tensor) -> Tensor:
    return x.new_empty((deltas.shape[0],), dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, base, deltas, weights, bias = inputs
    ctx.save_for_backward(x, base, deltas, weights)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Base and deltas are frozen; the public function refuses them when they want a gradient."""
    x, base, deltas, weights = ctx.saved_tensors
    need_x, _, _, need_weights, need_bias = ctx.needs_input_grad
    ops = torch.ops.paretofuse
    return (
        ops.routed_linear(grad, base.T, deltas.mT, weights, None) if need_x else None,
        None,
        None,
        ops.routed_linear_weights_grad(grad, x, deltas) if need_weights else None,
        grad.sum(0, dtype=torch.float32).to(ctx.bias_dtype) if need_bias else None,
    )


_routed_linear.register_autograd(_backward, setup_context=_save)


def routed_linear(
    x: Tensor, base: Tensor, deltas: Tensor, weights: Tensor, bias: Tensor | None = None
) -> Tensor:
    """A linear layer with a mixed weight that is not kept; differentiable in x, weights and bias.

    On CUDA and ROCm devices a Triton kernel mixes the weight on the way into the product for up to 32 rows of x; for
    more it is merged first and freed after the product, as the operator's CPU implementation, the PyTorch reference,
    always does. Under autocast, x is converted as `F.linear` would. Products of float32 are exact, or TF32 where
    `torch.set_float32_matmul_precision` says so.

    Args:
        x: [..., I] float32, bfloat16 or float16.
        base: [O, I] of one of those dtypes, either dimension contiguous: pass GPT-2's Conv1D weight as `weight.T`.
            Frozen.
        deltas: [E, O, I] of one of those dtypes, with the base's strides in its last two dimensions
            (`deltas.mT` for Conv1D). Frozen.
        weights: [E] float32.
        bias: [O] of one of those dtypes, or None. Mix it beforehand; it is small.

    Returns:
        [..., O] in x's dtype (in autocast's, under autocast).

    Raises:
        ImportError: the tensors are on a GPU and Triton is not installed.
        TypeError, ValueError: a dtype, shape, stride or device does not fit, or base or deltas want a gradient.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    check_linear(x, base, deltas, bias)
    checks.check_tensor("weights", weights, (torch.float32,), (deltas.shape[0],), x.device)
    checks.check_rows("weights", weights)
    if x.device.type != "cpu":
        require(linear_kernel, x.device.type, INSTEAD)
    y: Tensor = torch.ops.paretofuse.routed_linear(x.reshape(-1, x.shape[-1]), base, deltas, weights, bias)
    return y.view(*x.shape[:-1], base.shape[0])


def check_linear(x: Tensor, base: Tensor, deltas: Tensor, bias: Tensor | None) -> None:
    """Raise TypeError or ValueError unless the tensors of a routed linear layer fit together."""
    if base.ndim != 2 or deltas.ndim != 3:
        raise ValueError(
            f"base, deltas: got shapes {tuple(base.shape)} and {tuple(deltas.shape)}, expected [O, I] and [E, O, I]"
        )
    outs, ins = base.shape
    checks.check_experts("deltas", deltas.shape[0])
    checks.check_tensor("x", x, checks.FLOATS, (*x.shape[:-1], ins), x.device)
    checks.check_tensor("base", base, checks.FLOATS, (outs, ins), x.device)
    checks.check_tensor("deltas", deltas, checks.FLOATS, (deltas.shape[0], outs, ins), x.device)
    if deltas.stride()[1:] != base.stride() or 1 not in base.stride():
        raise ValueError(
            f"base, deltas: got strides {base.stride()} and {deltas.stride()}, expected one layout for both with a "
            "contiguous dimension; make both contiguous, or both transposed"
        )
    if bias is not None:
        checks.check_tensor("bias", bias, checks.FLOATS, (outs,), x.device)
        checks.check_rows("bias", bias)
    checks.check_frozen("base", base)
    checks.check_frozen("deltas", deltas)
