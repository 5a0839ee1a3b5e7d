"""The live module: an ordinary nn.Module whose weights a switch rewrites in place.

Its merged parameters are views of flat outputs, so a switch moves no pointer: CUDA graphs, captured addresses and
optimizer states of other parameters stay valid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from paretofuse.engine.merging.backends import Merger
from paretofuse.engine.modules.gradient import GradientCollector
from paretofuse.engine.planes.plane import Plane
from paretofuse.engine.stacking.skeleton import stored_tensors


class LiveModule:
    """A module bound to its mergers.

    Args:
        module: the module; its merged tensors are the mergers' outputs.
        merge_routed: rewrites the routed tensors, from weights [1, G + 1, E].
        merge_static: writes the static tensors, once.
        rows: each routed tensor's row in the routing weights.
        planes: for each expert, its planes by name.
        weights: the first routing weights, [1, G + 1, E].
        deltas: the planes as one dense tensor of each parameter whose gradient the Triton kernels shall reduce.
        mixes: the routing weights [G, E] that a fused module's layers read, rewritten with every merge; one for
            each device.
    """

    @torch.no_grad()
    def __init__(
        self,
        module: nn.Module,
        merge_routed: Merger,
        merge_static: Merger,
        rows: Mapping[str, int],
        planes: tuple[dict[str, Plane], ...],
        weights: Tensor,
        *,
        deltas: Mapping[str, Tensor] | None = None,
        mixes: Sequence[Tensor] = (),
    ) -> None:
        self.module = module
        self._deltas = deltas or {}
        self._mixes = mixes
        self._groups = weights.shape[1] - 1
        self._merge_routed = merge_routed
        self._rows = rows
        self._planes = planes
        stored = stored_tensors(module)
        self._routed = {name: stored[name] for name in rows}
        merge_static(weights)
        # What training may change besides the routed weights (BatchNorm's statistics) starts anew at each switch.
        self._restored = [
            (tensor, tensor.clone())
            for name, tensor in stored.items()
            if name not in rows and not isinstance(tensor, nn.Parameter)
        ]
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        self.write(weights)

    @cached_property
    def collector(self) -> GradientCollector:
        """The gradient hooks, installed when first asked for."""
        parameters = {n: t for n, t in self._routed.items() if isinstance(t, nn.Parameter)}
        deltas = {name: delta for name, delta in self._deltas.items() if name in parameters}
        return GradientCollector(
            parameters, self._rows, self._planes, self._groups, deltas=deltas, mixes=self._mixes
        )

    @torch.no_grad()
    def write(self, weights: Tensor) -> None:
        """Merge in place at weights [1, G + 1, E]."""
        self._merge_routed(weights)
        for mix in self._mixes:
            mix.copy_(weights[0, :-1])
        for tensor, pristine in self._restored:
            tensor.copy_(pristine)
        # The mergers write behind autograd's back: a backward pass through a forward made before this switch must
        # fail rather than use the new weights, and autocast must not serve the old ones.
        torch.autograd.graph.increment_version(list(self._routed.values()))
        torch.clear_autocast_cache()

    def switch(self, weights: Tensor) -> None:
        """Merge in place for inference."""
        if "collector" in self.__dict__:
            self.collector.disarm()
        self.write(weights)
