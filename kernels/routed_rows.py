"""The routed linear layer with a preference for each row: many users' trade-offs in one batch.

    y[b] = x[b] base^T + sum_e weights[b, e] * (x[b] deltas[e]^T) + bias[b]

    x [B, P, I]   base [O, I]   deltas [E, O, I]   weights [B, E]   bias [B, O]   y [B, P, O]

P is whatever stands between, e.g. the positions of a sequence; M = B P rows in all. Each plane is read once for a
tile of rows, whatever the rows' preferences: a batch of B different preferences costs E + 1 dense products, not B
merges. Products are summed in float32 and rounded once. Where each preference has many rows, one merge costs less than
E more products: then each preference's weight is merged, some at a time, and cuBLAS multiplies (`launch.MERGED_WORK`
says from where on). Backward, with g = dLoss/dy:

    dx[b] = g[b] base + sum_e weights[b, e] * (g[b] deltas[e])       the same, read transposed
    dweights[b, e] = <g[b], x[b] deltas[e]^T>                        the products again, reduced on the spot
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paretofuse.kernels import checks
from paretofuse.kernels.few_rows import product
from paretofuse.kernels.launch import (
    MERGED_AT_ONCE,
    RowsConfig,
    dot_precision,
    filled,
    piece_of,
    rows_merge_first,
)
from paretofuse.kernels.layer_merge import merge_layer
from paretofuse.kernels.pieces import add_pieces_launch
from paretofuse.kernels.reference import routed_rows_reference
from paretofuse.kernels.routed_linear import check_linear
from paretofuse.kernels.rows_kernels import (
    config_for,
    rows_kernel,
    rows_launch,
    rows_weights_grad_kernel,
    weights_grad_launch,
)
from paretofuse.kernels.triton_or_none import interpreted, require

INSTEAD = "paretofuse.kernels.reference.routed_rows_reference"


def fused_rows(
    x: Tensor, base: Tensor, deltas: Tensor, weights: Tensor, bias: Tensor | None, config: RowsConfig
) -> Tensor:
    """y [B, P, O] by the kernel of E + 1 products: one launch, or two where the inputs are cut."""
    (batch, per, ins), outs = x.shape, base.shape[0]
    piece = piece_of(-(-batch * per // config.rows) * -(-outs // config.outs), ins, config.ins)
    whole = ins <= piece
    own = bias if whole else None
    y = filled(rows_launch(x, base, deltas, weights, own, config, piece, dot_precision(x.dtype)))
    return (y[0] if whole else filled(add_pieces_launch(y, bias, x.dtype, per))).view(batch, per, outs)


def merged_rows(x: Tensor, base: Tensor, deltas: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
    """y [B, P, O] by a merge for each preference; the planes are read once for `MERGED_AT_ONCE` of them."""
    y = x.new_empty((*x.shape[:2], base.shape[0]))
    for first in range(0, len(x), MERGED_AT_ONCE):
        some = slice(first, first + MERGED_AT_ONCE)
        mixed = merge_layer(base, deltas, weights[some], x.dtype).mT  # [K, I, O]
        if bias is None:
            torch.bmm(x[some], mixed, out=y[some])
        else:
            torch.baddbmm(bias[some, None].to(x.dtype), x[some], mixed, out=y[some])
    return y


def run_rows(x: Tensor, base: Tensor, deltas: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
    """y [B, P, O] by the way that its size asks for."""
    if rows_merge_first(x.shape[1], deltas.shape[0], x.dtype):
        with torch.autocast(x.device.type, enabled=False):
            return merged_rows(x, base, deltas, weights, bias)
    return fused_rows(x.contiguous(), base, deltas, weights, bias, config_for(x, base, deltas))


def run_weights_grad(grad: Tensor, x: Tensor, deltas: Tensor, config: RowsConfig | None = None) -> Tensor:
    """The weights' gradient [B, E] by the kernel, its pieces added in float64; by its rule if no configuration."""
    config = config or config_for(x, deltas)
    launched = weights_grad_launch(grad.contiguous(), x.contiguous(), deltas, config, dot_precision(x.dtype))
    pieces = filled(launched)
    batch, per, _ = x.shape
    sums = pieces.view(*pieces.shape[:2], batch, per).sum((0, 3), dtype=torch.float64)
    return sums.float().T.contiguous()


@torch.library.custom_op("paretofuse::routed_rows", mutates_args=(), device_types="cuda")
def _routed_rows(x: Tensor, base: Tensor, deltas: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
    return run_rows(x, base, deltas, weights, bias)


@_routed_rows.register_kernel("cpu")
def _(x: Tensor, base: Tensor, deltas: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
    if interpreted(rows_kernel):
        return run_rows(x, base, deltas, weights, bias)
    with torch.autocast("cpu", enabled=False):
        return routed_rows_reference(x, base, deltas, weights, bias, product=product)


@_routed_rows.register_fake
def _(x: Tensor, base: Tensor, deltas: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1], base.shape[0]))


@torch.library.custom_op("paretofuse::routed_rows_weights_grad", mutates_args=(), device_types="cuda")
def _weights_grad(grad: Tensor, x: Tensor, deltas: Tensor) -> Tensor:
    return run_weights_grad(grad, x, deltas)


@_weights_grad.register_kernel("cpu")
def _(grad: Tensor, x: Tensor, deltas: Tensor) -> Tensor:
    if interpreted(rows_weights_grad_kernel):
        return run_weights_grad(grad, x, deltas)
    with torch.autocast("cpu", enabled=False):
        parts = [(grad.float() * (x @ delta.to(x.dtype).T).float()).sum((1, 2)) for delta in deltas]
    return torch.stack(parts, dim=1)


@_weights_grad.register_fake
def _(grad: Tensor, x: Tensor, deltas: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], deltas.shape[0]), dtype=torch.float32)


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
        ops.routed_rows(grad, base.T, deltas.mT, weights, None) if need_x else None,
        None,
        None,
        ops.routed_rows_weights_grad(grad, x, deltas) if need_weights else None,
        grad.sum(1, dtype=torch.float32).to(ctx.bias_dtype) if need_bias else None,
    )


_routed_rows.register_autograd(_backward, setup_context=_save)


def _rows_of_rows(
    info: Any,
    in_dims: tuple[int | None, ...],
    x: Tensor,
    base: Tensor,
    deltas: Tensor,
    weights: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, int]:
    """Under torch.vmap: V batches of B rows are one batch of V B rows."""
    if in_dims[1] is not None or in_dims[2] is not None:
        raise ValueError(
            "got base or deltas that torch.vmap maps over, expected the same for all; use a loop"
        )

    def flat(tensor: Tensor, dim: int | None) -> Tensor:
        first = tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        return first.flatten(0, 1).contiguous()

    flat_bias = None if bias is None else flat(bias, in_dims[4])
    y: Tensor = torch.ops.paretofuse.routed_rows(
        flat(x, in_dims[0]), base, deltas, flat(weights, in_dims[3]), flat_bias
    )
    return y.unflatten(0, (info.batch_size, -1)), 0


_routed_rows.register_vmap(_rows_of_rows)


def routed_rows(
    x: Tensor, base: Tensor, deltas: Tensor, weights: Tensor, bias: Tensor | None = None
) -> Tensor:
    """A linear layer that gives each row of a batch its own mixed weight; differentiable in x, weights and bias.

    On CUDA and ROCm devices this is a Triton kernel of E + 1 products, or, where each preference has many rows, a merge
    for each; the operator's CPU implementation is the PyTorch reference. Under autocast, x is converted as `F.linear`
    would. Products of float32 are exact, or TF32 where `torch.set_float32_matmul_precision` says so.

    Args:
        x: [B, ..., I] float32, bfloat16 or float16.
        base: [O, I] of one of those dtypes, either dimension contiguous. Frozen, and rounded to x's dtype, or its
            mix with the deltas is.
        deltas: [E, O, I] of one of those dtypes, with the base's strides in its last two dimensions. Frozen, and
            rounded to x's dtype.
        weights: [B, E] float32, contiguous; one row for each preference in the batch.
        bias: [O], or [B, O] when it is mixed too, of one of those dtypes; or None.

    Returns:
        [B, ..., O] in x's dtype (in autocast's, under autocast).

    Raises:
        ImportError: the tensors are on a GPU and Triton is not installed.
        TypeError, ValueError: a dtype, shape, stride or device does not fit, or base or deltas want a gradient.
    """
    if x.ndim < 2:
        raise ValueError(
            f"x: got shape {tuple(x.shape)}, expected [B, ..., I]; use x[None] for a batch of one"
        )
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if bias is not None and bias.ndim == 1:
        bias = bias.expand(x.shape[0], -1)
    check_linear(x, base, deltas, None)
    batch, outs, ins = x.shape[0], *base.shape
    checks.check_tensor("weights", weights, (torch.float32,), (batch, deltas.shape[0]), x.device)
    checks.check_contiguous("weights", weights)
    if bias is not None:
        checks.check_tensor("bias", bias, checks.FLOATS, (batch, outs), x.device)
        checks.check_rows("bias", bias)
    if x.device.type != "cpu":
        require(rows_kernel, x.device.type, INSTEAD)
    between = x.shape[1:-1]
    y: Tensor = torch.ops.paretofuse.routed_rows(
        x.reshape(batch, between.numel(), ins), base, deltas, weights, bias
    )
    return y.view(batch, *between, outs)
