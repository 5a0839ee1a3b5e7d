"""The live module: an ordinary nn.Module whose weights a switch rewrites in place.

Its merged parameters are views of flat outputs, so a switch moves no pointer: CUDA graphs, captured addresses and
optimizer states of other parameters stay valid.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from paretofuse.engine.layout import Layout
from paretofuse.engine.merging.backends import Merger
from paretofuse.engine.merging.flat import FlatInputs
from paretofuse.engine.modules.bindings import Bindings
from paretofuse.engine.modules.gradient import GradientCollector
from paretofuse.engine.modules.routed.layers import RoutedAttention, RoutedLinear
from paretofuse.engine.planes.plane import Plane
from paretofuse.engine.stacking.sharding import shard
from paretofuse.engine.stacking.skeleton import stored_tensors


class LiveModule:
    """A module bound to its mergers.

    Args:
        module: the module; its merged tensors are the mergers' outputs.
        merge_routed: rewrites the routed tensors, from weights [1, G, P], [1, G + R, P] or [1, G + R + C, P]; static
            tensors are merged already.
        names: the routed tensors that it rewrites.
        layout: the tensor table.
        planes: for each expert, its planes by name.
        weights: the first routing weights, [1, G, P], [1, G + R, P] or [1, G + R + C, P].
        flat: the buffers of planes that the Triton kernels read where they lie, of routed tensors.
        mixes: the routing weights that a fused module's layers read, rewritten with every merge; one for
            each device.
        free: names of parameters that no merger writes and that users may replace (heads).
    """

    def __init__(
        self,
        module: nn.Module,
        merge_routed: Merger,
        names: Collection[str],
        layout: Layout,
        planes: tuple[dict[str, Plane], ...],
        weights: Tensor,
        *,
        flat: Sequence[FlatInputs] = (),
        mixes: Sequence[Tensor] = (),
        free: Collection[str] = (),
    ) -> None:
        self.module = module
        self._flat = flat
        self._mixes = mixes
        self.width = weights.shape[1]
        self._merge_routed = merge_routed
        self._layout = layout
        self._planes = planes
        stored = stored_tensors(module)
        self._routed = {name: stored[name] for name in names}
        # What training may change besides the routed weights (BatchNorm's statistics) starts anew at each switch.
        self._restored = [
            (tensor, tensor.clone())
            for name, tensor in stored.items()
            if name not in self._routed and not isinstance(tensor, nn.Parameter)
        ]
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        watched = {n: t for n, t in stored.items() if n not in free or not isinstance(t, nn.Parameter)}
        mixing = [part for part in module.modules() if isinstance(part, RoutedLinear | RoutedAttention)]
        self._bindings = Bindings(module, watched, mixing)
        self._versions = _version_counters(self._routed.values())
        self._weights = weights
        self.write(weights)

    @cached_property
    def collector(self) -> GradientCollector:
        """The gradient hooks, installed when first asked for."""
        parameters = {n: t for n, t in self._routed.items() if isinstance(t, nn.Parameter)}
        return GradientCollector(
            parameters, self._layout, self._planes, self.check, flat=self._flat, mixes=self._mixes
        )

    def check(self) -> None:
        """Raise ValueError where the module no longer holds the memory that is merged into."""
        self._bindings.check()

    def storages(self) -> list[torch.UntypedStorage]:
        """All the memory that a write fills; of tensors that share it one."""
        tensors = [shard(tensor) for tensor in (*self._routed.values(), *(own for own, _ in self._restored))]
        return list({s._cdata: s for s in (tensor.untyped_storage() for tensor in tensors)}.values())

    @torch.no_grad()
    def write(self, weights: Tensor) -> None:
        """Merge in place at weights [1, G, P].

        Raises:
            ValueError: the module no longer holds the memory that is merged into; nothing has been written.
        """
        self.check()
        self.rewrite(weights)
        self.rewritten(weights)

    def rewrite(self, weights: Tensor) -> None:
        """What a device does for a write: it waits for nothing and gives no value back, so a CUDA graph can hold it."""
        self._merge_routed(weights)
        for mix in self._mixes:
            mix.copy_(weights[0], non_blocking=True)
        if self._restored:
            torch._foreach_copy_([own for own, _ in self._restored], [start for _, start in self._restored])

    def rewritten(self, weights: Tensor) -> None:
        """What the host does for a write, once the device was asked for its part."""
        self._weights = weights
        # The mergers write behind autograd's back: a backward pass through a forward made before this switch must
        # fail rather than use the new weights, and autocast must not serve the old ones.
        torch.autograd.graph.increment_version(self._versions)
        torch.clear_autocast_cache()

    @torch.no_grad()
    def merge_again(self, width: int) -> None:
        """Merge what is merged already, by what weights [1, width, P] need: row coefficients of zero change nothing."""
        self.check()
        missing = max(0, width - self._weights.shape[1])
        self._merge_routed(torch.nn.functional.pad(self._weights, (0, 0, 0, missing)))

    def switch(self, weights: Tensor) -> None:
        """Merge in place for inference."""
        self.write(weights)
        self.disarm()

    def disarm(self) -> None:
        """From now on forwards record no graph for the routed parameters."""
        if "collector" in self.__dict__:
            self.collector.disarm()


def _version_counters(tensors: Iterable[Tensor]) -> list[Tensor]:
    """As few tensors as have the version counters of all: views of one flat output share a counter."""
    chosen: list[Tensor] = []
    rest = list(tensors)
    while rest:
        chosen.append(rest[0])
        before = [tensor._version for tensor in rest]
        torch.autograd.graph.increment_version(rest[:1])
        rest = [tensor for tensor, old in zip(rest, before, strict=True) if tensor._version == old]
    return chosen
