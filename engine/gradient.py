"""Gradients of the routing weights, by hooks on the live module's parameters.

    dLoss/dL[g, e] = sum over p in g of <dLoss/dW_p, D_e,p>

Each parameter's gradient is reduced to E numbers as soon as autograd has it, and freed: nothing of size E x N, and
never two full gradients, is held. The module stays an ordinary nn.Module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from paretofuse.engine import native
from paretofuse.engine.dtypes import TO_NAME
from paretofuse.kernels.reference import inner_reference


class GradientCollector:
    """Collects dLoss/dL [G, E] (float64) during backward passes.

    Args:
        parameters: the routed parameters by stored name.
        rows: each one's row in L.
        deltas: for each expert, its deltas by name; an absent one contributes zero.
        groups: G.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        rows: Mapping[str, int],
        deltas: Sequence[Mapping[str, Tensor]],
        groups: int,
    ) -> None:
        self._parameters = dict(parameters)
        self._rows = rows
        self._deltas = deltas
        device = next(iter(self._parameters.values())).device if self._parameters else torch.device("cpu")
        self._pending = torch.zeros(groups, len(deltas), dtype=torch.float64, device=device)
        self._routing_weights: Tensor | None = None
        self._scheduled = False
        for name, parameter in self._parameters.items():
            parameter.requires_grad_(True)
            parameter.register_post_accumulate_grad_hook(self._make_hook(name))

    def arm(self, routing_weights: Tensor) -> None:
        """From now on each backward pass through the module goes on into these routing weights [G, E]."""
        for parameter in self._parameters.values():
            parameter.requires_grad_(True)
        self._pending.zero_()
        self._scheduled = False
        self._routing_weights = routing_weights

    def disarm(self) -> None:
        """Forwards through the module record no graph for the routed parameters."""
        for parameter in self._parameters.values():
            parameter.requires_grad_(False)
        self._routing_weights = None

    def jacobian(self, losses: Sequence[Tensor]) -> Tensor:
        """dLoss_m/dL for each loss, float64 [M, G, E]; the routers' own gradients stay as they are."""
        weights, self._routing_weights = self._routing_weights, None
        rows = []
        try:
            for index, loss in enumerate(losses):
                self._pending.zero_()
                loss.backward(retain_graph=index + 1 < len(losses))
                rows.append(self._pending.clone())
        finally:
            self._pending.zero_()
            self._routing_weights = weights
        return torch.stack(rows)

    def _make_hook(self, name: str) -> Callable[[Tensor], None]:
        row = self._rows[name]
        deltas = [own.get(name) for own in self._deltas]

        def reduce(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            if gradient is None:
                return
            self._pending[row] += inner_products(gradient, deltas)
            if self._routing_weights is not None and not self._scheduled:
                # Runs once autograd has finished this pass: the routers see the sum over all parameters.
                self._scheduled = True
                torch.autograd.Variable._execution_engine.queue_callback(self._flush)

        return reduce

    def _flush(self) -> None:
        """Carry the collected sums into the routers' parameters."""
        self._scheduled = False
        if self._routing_weights is None:
            return
        gradient = self._pending.to(self._routing_weights.dtype)
        self._pending.zero_()
        torch.autograd.backward([self._routing_weights], [gradient], retain_graph=True)


def inner_products(gradient: Tensor, deltas: Sequence[Tensor | None]) -> Tensor:
    """<gradient, delta_e> for every expert, float64 [E]; None counts as zero. Reads the gradient once on the CPU."""
    present = next((delta for delta in deltas if delta is not None), None)
    if gradient.is_sparse:
        gradient = gradient.to_dense()
    if present is None or gradient.device.type != "cpu" or gradient.dtype not in TO_NAME:
        return inner_reference(gradient, deltas)
    gradient = gradient.contiguous()
    sums = native.inner(
        gradient.data_ptr(),
        [0 if delta is None else delta.data_ptr() for delta in deltas],
        gradient.numel(),
        grad_dtype=TO_NAME[gradient.dtype],
        delta_dtype=TO_NAME[present.dtype],
        threads=torch.get_num_threads(),
    )
    return torch.from_numpy(sums)
