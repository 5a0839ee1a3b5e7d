"""Gradients of the routing weights, by hooks on the live module's parameters.

    dLoss/dL[g, e] = sum over p in g of <dLoss/dW_p, D_e,p>
    dLoss/dS[row, e] = <dLoss/dW_p[row], D_e,p[row]>                       where rows have coefficients
    dLoss/dT[column, e] = <dLoss/dW_p[:, column], D_e,p[:, column]>        where columns have some

and of the factors of trained planes, as engine/planes/trained.py says. Layers that learn by sketches give the same sums
without dLoss/dW (`sketched.py`).

Each parameter's gradient is reduced to E numbers (for each row) as soon as autograd has it, and freed: nothing of size
E x N, and never two full gradients, is held. The module stays an ordinary nn.Module. On the GPU the reduction is the
Triton kernels': fixed order and no atomics, so the same bits every time.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from paretofuse.engine.dtypes import TO_NAME
from paretofuse.engine.layout import Layout, columns_of, rows_of
from paretofuse.engine.merging import native
from paretofuse.engine.merging.flat import FlatInputs
from paretofuse.engine.modules.kernel_sums import KernelSums
from paretofuse.engine.planes.lowrank import LowRank, token_sums
from paretofuse.engine.planes.plane import Plane, Sums, memories, sums_shape
from paretofuse.engine.planes.trained import (
    TrainedPlanes,
    factor_gradients,
    factor_gradients_of_tokens,
    trained_factors,
)
from paretofuse.engine.routing.weights import coefficients


class GradientCollector:
    """Collects dLoss/dL [G, P], or with coefficients of rows and columns [G + R + C, P], float64, in backward passes.

    Behind it go the gradients of all factors of trained planes, flat, in the order of `TrainedPlanes.factors`.

    Args:
        parameters: the routed parameters by stored name.
        layout: tells where in L each one's coefficients lie.
        planes: for each expert, its planes by name; an absent one contributes zero.
        check: called as a backward pass begins; what it raises ends the pass.
        flat: the buffers of planes that the Triton kernels read where they lie.
        mixes: routing weights [G, P] that a fused module reads by themselves, a leaf for each device.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        layout: Layout,
        planes: Sequence[Mapping[str, Plane]],
        check: Callable[[], None],
        *,
        flat: Sequence[FlatInputs] = (),
        mixes: Sequence[Tensor] = (),
    ) -> None:
        self._parameters = dict(parameters)
        self._layout = layout
        self._planes = planes
        self._factors = [f for own in planes for plane in own.values() for f in trained_factors(plane) or ()]
        ends = list(accumulate(factor.numel() for factor in self._factors))
        self._spans = {id(f): slice(end - f.numel(), end) for f, end in zip(self._factors, ends, strict=True)}
        self._leaves = [*self._parameters.values(), *mixes]
        device = self._leaves[0].device if self._leaves else torch.device("cpu")
        groups = len(layout.groups)
        self._kernels: dict[str, KernelSums] = {}
        for buffer in flat:
            own = {spec.name for spec in buffer.bucket.specs} & self._parameters.keys()
            if own:
                self._kernels.update(dict.fromkeys(own, KernelSums(buffer, groups, len(planes))))
        self._factor_sums = torch.zeros(ends[-1] if ends else 0, dtype=torch.float64, device=device)
        self._pending = torch.zeros(groups, len(planes), dtype=torch.float64, device=device)
        self._routing_weights: Tensor | None = None
        self._mix: Tensor | None = None
        self._trained: TrainedPlanes | None = None
        self._check = check
        self._pass: int | None = None
        self._suspended: dict[int, tuple[Tensor, Tensor]] = {}
        self._reached = False
        self._armed = True
        for name, parameter in self._parameters.items():
            parameter.requires_grad_(True)
            parameter.register_post_accumulate_grad_hook(
                self._hook(partial(GradientCollector._reduce, name=name))
            )
        for mix in mixes:
            mix.requires_grad_(True)
            mix.register_post_accumulate_grad_hook(self._hook(GradientCollector._take_mix))
        for factor in self._factors if mixes else []:  # which a fused module's layers read by themselves
            factor.register_post_accumulate_grad_hook(self._hook(GradientCollector._take_factor))

    def arm(self, routing_weights: Tensor, trained: TrainedPlanes | None = None) -> None:
        """From now on each backward pass through the module goes on into these routing weights, and trained planes."""
        for leaf in self._leaves:
            leaf.requires_grad_(True)
        self._armed = True
        if routing_weights.shape != self._pending.shape:  # rows have coefficients now, or columns
            self._pending = self._pending.new_zeros(routing_weights.shape)
        self._forget()
        self._routing_weights = routing_weights
        self._mix, self._trained = routing_weights.detach(), trained

    def disarm(self) -> None:
        """Forwards through the module record no graph for the routed parameters."""
        if not self._armed:  # as before most switches, which this would cost a third of their time
            return
        self._armed = False
        for leaf in self._leaves:
            leaf.requires_grad_(False)
        self._routing_weights = None

    def jacobian(self, losses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """dLoss_m/dL for each loss, float64 [M, *L.shape], and that of all factors of trained planes, float64 [M, N].

        The routers' and the planes' own gradients stay as they are.

        Raises:
            ValueError: there are no losses, one is no scalar or depends on no routed weight, or `check` says so.
        """
        if not losses:
            raise ValueError("got no losses, expected at least one scalar")
        for index, loss in enumerate(losses):
            if not isinstance(loss, Tensor):
                raise TypeError(f"loss {index} is a {type(loss).__name__}, expected a scalar tensor")
            if loss.dim() != 0 or not loss.requires_grad:
                raise ValueError(
                    f"loss {index} has shape {list(loss.shape)} and requires_grad={loss.requires_grad}; expected a "
                    "scalar computed by engine.module after engine.train_at(preference)"
                )
        self._check()
        weights, self._routing_weights = self._routing_weights, None
        rows = []
        try:
            for index, loss in enumerate(losses):
                self._forget()
                loss.backward(retain_graph=index + 1 < len(losses))
                if not self._reached:
                    raise ValueError(
                        f"loss {index} depends on no routed weight, expected one computed by the engine's module after "
                        "train_at; does it use another module, or only the output of frozen layers?"
                    )
                rows.append(self._take())
        finally:
            self._forget()
            self._routing_weights = weights
        return torch.stack([row for row, _ in rows]), torch.stack([factors for _, factors in rows])

    def _hook(self, act: Callable[[GradientCollector, Tensor], None]) -> Callable[[Tensor], None]:
        """A tensor's hook, which does not hold this collector.

        Python's garbage collector does not see that a tensor holds its hooks: a module whose tensors held what watches
        the module would never be freed, nor all that is merged.
        """
        own = weakref.ref(self)

        def hook(tensor: Tensor) -> None:
            if (collector := own()) is None:
                raise ValueError(
                    "got a backward pass through a module that the engine has let go of (unload, add_planes, or the "
                    "engine is gone), expected its present one; make the forward pass anew after engine.train_at"
                )
            act(collector, tensor)

        return hook

    def _reduce(self, parameter: Tensor, name: str) -> None:
        """Take a routed parameter's gradient."""
        gradient, parameter.grad = parameter.grad, None
        if gradient is None:
            return
        self._enter_pass()
        planes = [own.get(name) for own in self._planes]
        dense = gradient.to_dense() if gradient.is_sparse else gradient
        self._add_factors(name, planes, lambda b, a, weight: factor_gradients(b, a, dense, weight))
        by = self._sums(name)
        if name in self._kernels and by == "whole":
            self._kernels[name].add(name, dense)
        else:
            self._add(name, inner_products(dense, planes, by))

    def take_tokens(
        self, name: str, planes: Sequence[LowRank | None], *, transposed: bool
    ) -> Callable[[Tensor, Tensor], None]:
        """What reduces a linear layer's gradient without making that of its weight.

        Args:
            name: of the weight.
            planes: of low rank, in the place of its own; trained ones are its own.
            transposed: whether the weight lies as [I, O].

        Returns:
            Takes the layer's input [..., I] and the gradient of its output [..., O].
        """

        def reduce(x: Tensor, gradient: Tensor) -> None:
            self._enter_pass()
            with torch.autocast(x.device.type, enabled=False):
                tokens = tuple(torch.atleast_2d(t).flatten(0, -2).float() for t in (x, gradient))
                right, left = tokens[::-1] if transposed else tokens
                self._add_factors(
                    name, planes, lambda b, a, weight: factor_gradients_of_tokens(b, a, left, right, weight)
                )
                self._add(name, token_sums(planes, left, right, self._sums(name)))

        return reduce

    def _sums(self, name: str) -> Sums:
        """Which sums a tensor's coefficients want."""
        spans, width = self._layout.spans[name], len(self._pending)
        if spans.columns is not None and width >= spans.columns.stop:
            return "row and column"
        return "row" if spans.rows is not None and width >= spans.rows.stop else "whole"

    def _add(self, name: str, sums: Tensor) -> None:
        """Add what was found of one tensor's coefficients, [P], [P, rows] or [P, rows + columns]."""
        sums, spans = sums.to(self._pending.device), self._layout.spans[name]
        if sums.dim() == 2 and spans.rows is not None:
            rows, columns = sums.T.tensor_split([spans.rows.stop - spans.rows.start])
            self._pending[spans.rows] += rows
            if spans.columns is not None and len(columns):
                self._pending[spans.columns] += columns
            sums = rows.sum(0)
        self._pending[spans.group] += sums

    def _add_factors(
        self,
        name: str,
        planes: Sequence[Plane | None],
        gradients: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> None:
        """Add the gradients of the factors of one tensor's trained planes, made from B, A and the plane's weight."""
        trained = [(j, b_and_a) for j, plane in enumerate(planes) if (b_and_a := trained_factors(plane))]
        if not trained or self._mix is None:
            return
        weights = coefficients(self._mix, self._layout.spans[name])
        for j, (b, a) in trained:
            for factor, sums in zip((b, a), gradients(b, a, weights[j]), strict=True):
                self._factor_sums[self._spans[id(factor)]] += sums.flatten().to(self._factor_sums.device)

    def _take_factor(self, factor: Tensor) -> None:
        """What layers without a merged weight say about the factors of their trained planes."""
        gradient, factor.grad = factor.grad, None
        if gradient is not None:
            self._enter_pass()
            self._factor_sums[self._spans[id(factor)]] += gradient.flatten().to(self._factor_sums.device)

    def _take_mix(self, mix: Tensor) -> None:
        """What layers without a merged weight say about their routing weights."""
        gradient, mix.grad = mix.grad, None
        if gradient is not None:
            self._enter_pass()
            self._pending += gradient.to(self._pending.device)

    def _enter_pass(self) -> None:
        """Have the routers' backward run once autograd has finished this pass, on the sum over all parameters.

        Autograd tells of a pass's end only if it does not fail, and a pass may run inside of another (activation
        checkpointing). So each pass has sums of its own, by autograd's number for it: those of a failed pass are never
        carried on, and do not hold up the next one's.
        """
        self._reached = True
        current = torch._C._current_graph_task_id()
        if self._routing_weights is None or current == self._pass:
            return
        if self._pass is not None:
            self._suspended[self._pass] = self._take()
        self._pass = current
        if current in self._suspended:  # back from a pass inside of this one, which is scheduled already
            routing, factors = self._suspended.pop(current)
            self._pending += routing
            self._factor_sums += factors
        else:
            self._check()
            torch.autograd.Variable._execution_engine.queue_callback(partial(self._flush, current))

    def _forget(self) -> None:
        """Drop whatever was collected, by passes that failed too."""
        self._take()
        self._suspended.clear()
        self._pass, self._reached = None, False

    def _take(self) -> tuple[Tensor, Tensor]:
        """What was collected, float64 of L's shape and of all factors; collecting starts anew."""
        total, factors = self._pending.clone(), self._factor_sums.clone()
        self._pending.zero_()
        self._factor_sums.zero_()
        for sums in dict.fromkeys(self._kernels.values()):
            taken = sums.take()
            if taken is not None:
                total[: len(taken)] += taken.to(total.device)
        return total, factors

    def _flush(self, finished: int) -> None:
        """Carry the sums of a pass that has ended into the routers' parameters."""
        total: tuple[Tensor, Tensor] | None
        if finished == self._pass:
            total, self._pass = self._take(), None
        else:
            total = self._suspended.pop(finished, None)
        if self._routing_weights is None or total is None:
            return
        routing, factors = total
        if self._trained is not None:
            self._trained.take_gradient(factors, add=True)
        gradient = routing.to(self._routing_weights.dtype)
        torch.autograd.backward([self._routing_weights], [gradient], retain_graph=True)


def inner_products(gradient: Tensor, planes: Sequence[Plane | None], by: Sums = "whole") -> Tensor:
    """<gradient, plane_j> for every plane; None counts as zero. The CPU reads the gradient once for each kind of sum.

    Args:
        gradient: of the tensor's shape; a matrix's where sums by column are wanted.
        planes: of the tensor.
        by: which sums: "whole", "row", or "row and column".

    Returns:
        float64 [P], [P, rows] or [P, rows + columns].
    """
    if gradient.is_sparse:
        gradient = gradient.to_dense()
    if gradient.device.type != "cpu" or gradient.dtype not in TO_NAME or not any(planes):
        return torch.stack([_sums_of(plane, gradient.detach(), by) for plane in planes])
    gradient = gradient.contiguous()
    wanted: tuple[Literal["whole", "row", "column"], ...] = (
        ("row", "column") if by == "row and column" else (by,)
    )
    sums = [
        native.inner(
            gradient.data_ptr(),
            memories(planes),
            gradient.numel(),
            grad_dtype=TO_NAME[gradient.dtype],
            columns=columns_of(gradient.shape),
            by=each,
            threads=torch.get_num_threads(),
        )
        for each in wanted
    ]
    return torch.from_numpy(sums[0] if len(sums) == 1 else np.concatenate(sums, 1))


def _sums_of(plane: Plane | None, gradient: Tensor, by: Sums) -> Tensor:
    """One plane's by PyTorch, float64 [], [rows] or [rows + columns]."""
    if plane is None:
        shape = sums_shape(by, rows_of(gradient.shape), columns_of(gradient.shape))
        return gradient.new_zeros(shape, dtype=torch.float64)
    if by == "whole":
        return plane.inner(gradient)
    sums = plane.inner_rows(gradient)
    return sums if by == "row" else torch.cat([sums, plane.inner_columns(gradient)])
