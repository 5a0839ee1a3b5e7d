"""Training layer by layer on the CPU: a linear layer's weight is merged when the layer runs, used, and forgotten.

    forward     W = W0 + sum_j L[g, j] D_j        y = x W^T + bias        W is freed
    backward    W once more for dx = dy W, freed; then dL[g, e] = <dy^T x, D_e>, or by row, and column, where they count

So a model's peak memory above its activations is base, deltas and one layer's weight. Base and deltas are read where
they lie, which may be files mapped from a store: nothing is stacked or copied, and their pages are handed back to the
system as soon as a layer has used them for the last time in a step.

The layers are those of `layers.py`; only the weight that they hold is another. The C++ core merges and
reduces, as it does for the live module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from paretofuse.engine.dtypes import TO_NAME
from paretofuse.engine.layout import MERGED_DTYPES, Spans, columns_of, rows_of
from paretofuse.engine.merging import native
from paretofuse.engine.modules.gradient import inner_products
from paretofuse.engine.planes.lowrank import LowRank, token_sums
from paretofuse.engine.planes.parts import part_of, parts_of, plane_from
from paretofuse.engine.planes.plane import Plane, Sums, memories, merged_tensor, sums_shape
from paretofuse.engine.planes.trained import factor_gradients_of_tokens
from paretofuse.engine.routing.weights import coefficients

Release = Callable[[], None]
"""Hands the pages of a layer's base and deltas back to the system, where they are mapped from a file."""


def _planes(
    values: Sequence[Tensor], factors: Sequence[Tensor], sizes: Sequence[int], shape: Sequence[int]
) -> list[Plane | None]:
    """Planes of the tensors that operators take: values, factors (empty where there are none) and group or rank."""
    parts = zip(values, factors, sizes, strict=True)
    return [plane_from(v, f, size, tuple(shape)) if v.numel() else None for v, f, size in parts]


def merged(base: Tensor, planes: Sequence[Plane | None], weights: Tensor, dtype: torch.dtype) -> Tensor:
    """base + sum_j weights[j] planes[j] in a new tensor, summed in float32 and rounded once.

    Args:
        base: contiguous, float32, bfloat16 or float16.
        planes: of the base's shape; None counts as zero.
        weights: [P], [P, rows] or [P, rows + columns] float32, as `coefficients` gives them.
        dtype: of the result.
    """
    out = torch.empty(base.shape, dtype=dtype)
    if out.numel() == 0:
        return out
    plan = native.MergePlan(
        base=[base.data_ptr()],
        planes=[memories(planes)],
        lengths=[base.numel()],
        rows=[0],
        columns=[columns_of(tuple(base.shape))],
        base_dtypes=[TO_NAME[base.dtype]],
        out_dtypes=[TO_NAME[dtype]],
        plane_count=len(planes),
        row_count=1,
    )
    given = np.ascontiguousarray(weights.detach().numpy(), np.float32)
    whole, sides = given, []
    if weights.dim() == 2:
        whole, sides = np.zeros(len(planes), np.float32), np.split(given, [rows_of(base.shape)], 1)
    own = [np.ascontiguousarray(side) for side in sides if side.size]
    tables = [[[side.ctypes.data]] for side in own] + [None, None]
    plan.run(
        whole.reshape(1, 1, -1),
        [[out.data_ptr()]],
        row_weights=tables[0],
        column_weights=tables[1],
        threads=torch.get_num_threads(),
    )
    return out


@torch.library.custom_op("paretofuse::layerwise_linear", mutates_args=(), device_types="cpu")
def _linear(
    x: Tensor,
    base: Tensor,
    values: Sequence[Tensor],
    factors: Sequence[Tensor],
    sizes: Sequence[int],
    weights: Tensor,
    bias: Tensor | None,
    transposed: bool,
    sketch_values: Sequence[Tensor],
    sketch_factors: Sequence[Tensor],
) -> Tensor:
    """x [M, I] -> [M, O]; base and planes are [O, I], or [I, O] if transposed.

    The sketches stand in for the planes in the gradient of the weights; where there are none, the planes themselves do.
    """
    weight = merged(base, _planes(values, factors, sizes, base.shape), weights, x.dtype)
    return F.linear(x, weight.T if transposed else weight, None if bias is None else bias.to(x.dtype))


@_linear.register_fake
def _(
    x: Tensor,
    base: Tensor,
    values: Sequence[Tensor],
    factors: Sequence[Tensor],
    sizes: Sequence[int],
    weights: Tensor,
    bias: Tensor | None,
    transposed: bool,
    sketch_values: Sequence[Tensor],
    sketch_factors: Sequence[Tensor],
) -> Tensor:
    return x.new_empty((x.shape[0], base.shape[1 if transposed else 0]))


@torch.library.custom_op("paretofuse::layerwise_weights_grad", mutates_args=(), device_types="cpu")
def _weights_grad(
    grad: Tensor,
    x: Tensor,
    values: Sequence[Tensor],
    factors: Sequence[Tensor],
    sizes: Sequence[int],
    transposed: bool,
    by: str,
) -> Tensor:
    """<dLoss/dW, plane_j> for every plane, float32 [P], [P, rows] or [P, rows + columns]; grad [M, O], x [M, I].

    dLoss/dW = left^T right as W lies in memory; low-rank planes need no such product.
    """
    wanted = cast(Sums, by)
    with torch.autocast("cpu", enabled=False):
        left, right = (x.float(), grad.float()) if transposed else (grad.float(), x.float())
        planes = _planes(values, factors, sizes, (left.shape[1], right.shape[1]))
        sums = token_sums(planes, left, right, wanted)
        rest = [None if isinstance(plane, LowRank) else plane for plane in planes]
        if any(rest) and left.numel() and right.numel():
            sums += inner_products(left.T @ right, rest, wanted).float()
    return sums


@_weights_grad.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    values: Sequence[Tensor],
    factors: Sequence[Tensor],
    sizes: Sequence[int],
    transposed: bool,
    by: str,
) -> Tensor:
    rows, columns = (x, grad)[:: 1 if transposed else -1]
    shape = sums_shape(cast(Sums, by), rows.shape[1], columns.shape[1])
    return x.new_empty((len(values), *shape), dtype=torch.float32)


@torch.library.custom_op("paretofuse::layerwise_factors_grad", mutates_args=(), device_types="cpu")
def _factors_grad(
    grad: Tensor, x: Tensor, b: Tensor, a: Tensor, weight: Tensor, transposed: bool
) -> tuple[Tensor, Tensor]:
    """dLoss/dB and dLoss/dA of a trained plane, float32; grad [M, O], x [M, I], the plane's own coefficients."""
    with torch.autocast("cpu", enabled=False):
        left, right = (x.float(), grad.float()) if transposed else (grad.float(), x.float())
        return factor_gradients_of_tokens(b, a, left, right, weight)


@_factors_grad.register_fake
def _(
    grad: Tensor, x: Tensor, b: Tensor, a: Tensor, weight: Tensor, transposed: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(b), torch.empty_like(a)


def sums_of(weights: Tensor, base: Tensor) -> Sums:
    """Which sums are the gradient of a weight's coefficients, as `coefficients` gives them."""
    if weights.dim() == 1:
        return "whole"
    return "row" if weights.shape[1] == rows_of(base.shape) else "row and column"


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, base, values, factors, sizes, weights, bias, transposed, *sketches = inputs
    ctx.save_for_backward(x, base, weights, *values, *factors, *sketches[0], *sketches[1])
    ctx.sizes, ctx.transposed = sizes, transposed
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, base, weights, *parts = ctx.saved_tensors
    count = len(ctx.sizes)
    planes = parts[:count], parts[count : 2 * count], ctx.sizes
    sketched = (len(parts) - 2 * count) // 2  # all planes or none
    a_and_b = parts[2 * count : 2 * count + sketched], parts[2 * count + sketched :]
    measured = (*a_and_b, [len(a) for a in a_and_b[0]]) if sketched else planes
    need_x, _, need_values, _, _, need_weights, need_bias, *_ = ctx.needs_input_grad
    grad, ops = grad.contiguous(), torch.ops.paretofuse
    value_grads: list[Tensor | None] = [None] * count
    factor_grads: list[Tensor | None] = [None] * count
    for j in (j for j in range(count) if need_values[j]):  # of a trained plane
        a, b = parts[j], parts[count + j]
        factor_grads[j], value_grads[j] = ops.layerwise_factors_grad(
            grad, x, b, a, weights[j], ctx.transposed
        )
    return (
        ops.layerwise_linear(grad, base, *planes, weights, None, not ctx.transposed, [], [])
        if need_x
        else None,
        None,
        value_grads,
        factor_grads,
        None,
        ops.layerwise_weights_grad(grad, x, *measured, ctx.transposed, sums_of(weights, base))
        if need_weights
        else None,
        grad.sum(0, dtype=torch.float32).to(ctx.bias_dtype) if need_bias else None,
        None,
        [None] * sketched,
        [None] * sketched,
    )


_linear.register_autograd(_backward, setup_context=_save)


class LayerwiseWeight:
    """A weight that is merged when it is used; a `paretofuse.engine.modules.routed.layers.MixedWeight`.

    Args:
        base: [O, I], or [I, O] if transposed; contiguous.
        planes: one for each expert, as the base lies; None where the expert leaves the weight unchanged.
        mix, spans: as `RoutedWeight` takes them.
        transposed: whether base and planes are [I, O], as transformers' Conv1D keeps them.
        release: called when base and planes were used for the last time in a pass.
        sketches: of the planes (engine/planes/sketch.py), which then stand in for them in the gradient of `mix`.
    """

    def __init__(
        self,
        base: Tensor,
        planes: Sequence[Plane | None],
        mix: Tensor,
        spans: Spans,
        transposed: bool,
        release: Release,
        sketches: Sequence[LowRank | None] = (),
    ) -> None:
        self.base, self.mix, self.spans, self.transposed = base, mix, spans, transposed
        self.planes = list(planes)
        self.sketches = sketches
        self._release = release
        none = base.new_empty(0)
        parts = [(none, none, 0) if plane is None else parts_of(plane) for plane in self.planes]
        self._parts = tuple([part[i] for part in parts] for i in range(3))
        # Trained planes are their own sketches; the gradients of their factors come with the planes.
        self._sketch_values = [none if own is None else own.a.detach() for own in sketches]
        self._sketch_factors = [none if own is None else own.b.detach() for own in sketches]

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
        weights = coefficients(self.mix, self.spans)
        tracked = weights.requires_grad and not torch.compiler.is_compiling()
        if tracked:  # its gradient is the last thing that the backward pass asks of base and deltas
            weights.register_hook(lambda gradient: self._release())
        y: Tensor = torch.ops.paretofuse.layerwise_linear(
            x.reshape(-1, ins).contiguous(), self.base, *self._parts, weights, bias, self.transposed,
            self._sketch_values, self._sketch_factors,
        )  # fmt: skip
        if not torch.compiler.is_compiling():
            self._release()
        return y.view(*x.shape[:-1], outs)

    def part(self, first: int, last: int) -> LayerwiseWeight:
        """The weight of outputs first .. last, as a view; not of a transposed weight."""
        planes = [None if plane is None else part_of(plane, first, last) for plane in self.planes]
        sketches = [None if own is None else own.part(first, last) for own in self.sketches]
        return LayerwiseWeight(
            self.base[first:last], planes, self.mix, self.spans.part(first, last), False, self._release, sketches,
        )  # fmt: skip

    def dense(self) -> Tensor:
        """[O, I], merged anew each time, for code that asks a layer for its weight."""
        weights = coefficients(self.mix, self.spans)
        weight = merged_tensor(self.base, self.planes, weights, self.base.dtype)
        return weight.T if self.transposed else weight
