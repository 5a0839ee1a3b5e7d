"""Training layer by layer on the CPU: a linear layer's weight is merged when the layer runs, used, and forgotten.

    forward     W = W0 + sum_e L[g, e] D_e        y = x W^T + bias        W is freed
    backward    W once more for dx = dy W, freed; then dL[g, e] = <dy^T x, D_e>

So a model's peak memory above its activations is base, deltas and one layer's weight. Base and deltas are read where
they lie, which may be files mapped from a store: nothing is stacked or copied, and their pages are handed back to the
system as soon as a layer has used them for the last time in a step.

The layers are those of `layers.py`; only the weight that they hold is another. The C++ core merges and
reduces, as it does for the live module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from paretofuse.engine.dtypes import TO_NAME
from paretofuse.engine.layout import MERGED_DTYPES
from paretofuse.engine.merging import native
from paretofuse.kernels.reference import merge_tensor_reference

Release = Callable[[], None]
"""Hands the pages of a layer's base and deltas back to the system, where they are mapped from a file."""


def merged(base: Tensor, deltas: Sequence[Tensor], weights: Tensor, dtype: torch.dtype) -> Tensor:
    """base + sum_e weights[e] deltas[e] in a new tensor, summed in float32 and rounded once.

    Args:
        base: contiguous, float32, bfloat16 or float16.
        deltas: one for each expert, each contiguous, of one dtype and the base's shape; an empty one counts as zero.
        weights: [E] float32.
        dtype: of the result.
    """
    out = torch.empty(base.shape, dtype=dtype)
    if out.numel() == 0:
        return out
    plan = native.MergePlan(
        base=[base.data_ptr()],
        deltas=[[_address(delta) for delta in deltas]],
        lengths=[base.numel()],
        rows=[0],
        base_dtypes=[TO_NAME[base.dtype]],
        delta_dtypes=[_dtype_of(deltas, base)],
        out_dtypes=[TO_NAME[dtype]],
        experts=len(deltas),
        row_count=1,
    )
    row = np.ascontiguousarray(weights.detach().numpy(), np.float32)
    plan.run(row.reshape(1, 1, -1), [[out.data_ptr()]], threads=torch.get_num_threads())
    return out


@torch.library.custom_op("paretofuse::layerwise_linear", mutates_args=(), device_types="cpu")
def _linear(
    x: Tensor,
    base: Tensor,
    deltas: Sequence[Tensor],
    weights: Tensor,
    bias: Tensor | None,
    transposed: bool,
) -> Tensor:
    """x [M, I] -> [M, O]; base and deltas are [O, I], or [I, O] if transposed."""
    weight = merged(base, deltas, weights, x.dtype)
    return F.linear(x, weight.T if transposed else weight, None if bias is None else bias.to(x.dtype))


@_linear.register_fake
def _(
    x: Tensor,
    base: Tensor,
    deltas: Sequence[Tensor],
    weights: Tensor,
    bias: Tensor | None,
    transposed: bool,
) -> Tensor:
    return x.new_empty((x.shape[0], base.shape[1 if transposed else 0]))


@torch.library.custom_op("paretofuse::layerwise_weights_grad", mutates_args=(), device_types="cpu")
def _weights_grad(grad: Tensor, x: Tensor, deltas: Sequence[Tensor], transposed: bool) -> Tensor:
    """<dLoss/dW, D_e> for every expert, float32 [E]; grad [M, O], x [M, I]."""
    with torch.autocast("cpu", enabled=False):
        left, right = (x, grad) if transposed else (grad, x)
        product = left.float().T @ right.float()  # dLoss/dW as W lies in memory
    sums = np.zeros(len(deltas)) if product.numel() == 0 else _inner(product, deltas)
    return torch.from_numpy(sums).float()


@_weights_grad.register_fake
def _(grad: Tensor, x: Tensor, deltas: Sequence[Tensor], transposed: bool) -> Tensor:
    return x.new_empty((len(deltas),), dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, base, deltas, weights, bias, transposed = inputs
    ctx.save_for_backward(x, base, weights, *deltas)
    ctx.transposed = transposed
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, base, weights, *deltas = ctx.saved_tensors
    need_x, _, _, need_weights, need_bias, _ = ctx.needs_input_grad
    grad, ops = grad.contiguous(), torch.ops.paretofuse
    return (
        ops.layerwise_linear(grad, base, deltas, weights, None, not ctx.transposed) if need_x else None,
        None,
        [None] * len(deltas),
        ops.layerwise_weights_grad(grad, x, deltas, ctx.transposed) if need_weights else None,
        grad.sum(0, dtype=torch.float32).to(ctx.bias_dtype) if need_bias else None,
        None,
    )


_linear.register_autograd(_backward, setup_context=_save)


class LayerwiseWeight:
    """A weight that is merged when it is used; a `paretofuse.engine.modules.routed.layers.MixedWeight`.

    Args:
        base: [O, I], or [I, O] if transposed; contiguous.
        deltas: one for each expert, as the base lies; None where the expert leaves the weight unchanged.
        mix: [G, E] float32, the routing weights of the whole model; rewritten in place.
        row: the weight's row of `mix`.
        transposed: whether base and deltas are [I, O], as transformers' Conv1D keeps them.
        release: called when base and deltas were used for the last time in a pass.
    """

    def __init__(
        self,
        base: Tensor,
        deltas: Sequence[Tensor | None],
        mix: Tensor,
        row: int,
        transposed: bool,
        release: Release,
    ) -> None:
        self.base, self.mix, self.row, self.transposed = base, mix, row, transposed
        self.deltas = list(deltas)
        self._release = release
        self._given = [base.new_empty(0) if delta is None else delta for delta in self.deltas]

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """[..., I] -> [..., O], differentiable in x, the routing weights and the bias.

        Raises:
            ValueError: x is not float32, bfloat16 or float16 of I columns.
        """
        if torch.is_autocast_enabled("cpu"):
            x = x.to(torch.get_autocast_dtype("cpu"))
        outs, ins = self.base.shape[::-1] if self.transposed else self.base.shape
        if x.shape[-1] != ins or TO_NAME.get(x.dtype) not in MERGED_DTYPES:
            raise ValueError(
                f"got an input of shape {list(x.shape)} and {x.dtype} to a routed linear layer, expected [..., {ins}] "
                "of float32, bfloat16 or float16"
            )
        weights = self.mix[self.row]
        tracked = weights.requires_grad and not torch.compiler.is_compiling()
        if tracked:  # its gradient is the last thing that the backward pass asks of base and deltas
            weights.register_hook(lambda gradient: self._release())
        y: Tensor = torch.ops.paretofuse.layerwise_linear(
            x.reshape(-1, ins).contiguous(), self.base, self._given, weights, bias, self.transposed
        )
        if not torch.compiler.is_compiling():
            self._release()
        return y.view(*x.shape[:-1], outs)

    def part(self, first: int, last: int) -> LayerwiseWeight:
        """The weight of outputs first .. last, as a view; not of a transposed weight."""
        deltas = [None if delta is None else delta[first:last] for delta in self.deltas]
        return LayerwiseWeight(self.base[first:last], deltas, self.mix, self.row, False, self._release)

    def dense(self) -> Tensor:
        """[O, I], merged anew each time, for code that asks a layer for its weight."""
        weight = merge_tensor_reference(self.base, self.deltas, self.mix[self.row], self.base.dtype)
        return weight.T if self.transposed else weight


def _address(delta: Tensor) -> int:
    return delta.data_ptr() if delta.numel() else 0


def _dtype_of(deltas: Sequence[Tensor], base: Tensor) -> str:
    present = next((delta for delta in deltas if delta.numel()), base)
    return TO_NAME[present.dtype]


def _inner(gradient: Tensor, deltas: Sequence[Tensor]) -> np.ndarray:
    return native.inner(
        gradient.data_ptr(),
        [_address(delta) for delta in deltas],
        gradient.numel(),
        grad_dtype=TO_NAME[gradient.dtype],
        delta_dtype=_dtype_of(deltas, gradient),
        threads=torch.get_num_threads(),
    )
