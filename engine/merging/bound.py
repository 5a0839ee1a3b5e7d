"""A stack where it lies: each device's backend and flat buffers, and its mergers.

A model split over devices is merged by each of them from its own flat buffers; the routing weights are all that
travels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from paretofuse.engine.layout import TensorSpec
from paretofuse.engine.merging.backends import (
    Merger,
    choose_backend,
    frugal_merger,
    native_merger,
    reference_merger,
    separate_outputs,
    triton_merger,
)
from paretofuse.engine.merging.flat import DenseDeltas, FlatInputs, FlatOutputs, flatten
from paretofuse.engine.stacking.sharding import Sharding
from paretofuse.engine.stacking.stack import Stack


class BoundStack:
    """A stack's tensors and what merges them.

    Args:
        stack: its tensors may lie on several devices.
        backend: "reference", "native" or "triton" for all devices, or None for each device's own.
        shardings: how tensors that are sharded over processes lie; the stack holds this process's shards.

    Attributes:
        stack: the same, where the Triton backend works as views of flat buffers.
        layout: its tensor table.
        rows: each merged tensor's row of the routing weights.
        places: each tensor's device.
        backends: each device's backend.
        flat: the flat buffers, for each device with the Triton backend.
        deltas: each merged tensor's planes as one dense tensor.
        shardings: as given.
    """

    def __init__(
        self, stack: Stack, backend: str | None, shardings: Mapping[str, Sharding] | None = None
    ) -> None:
        self.layout = stack.layout
        self.rows = self.layout.group_index
        self.places = {name: tensor.device for name, tensor in stack.base.items()}
        self.backends = {d: choose_backend(d, backend) for d in dict.fromkeys(self.places.values())}
        in_flat = {name: d for name, d in self.places.items() if self.backends[d] == "triton"}
        self.flat: list[FlatInputs] = []
        if in_flat:
            stack, self.flat = flatten(stack, self.rows, in_flat)
        self.stack = stack
        self.deltas = DenseDeltas(stack, self.flat)
        self.shardings = shardings or {}
        self._static: dict[str, Tensor] | None = None

    def merge(self, full: Tensor) -> list[dict[str, Tensor]]:
        """K new sets of all routed and static tensors at weights [K, G + 1, E], each tensor with its own storage."""
        specs = self.layout.with_role("routed", "static")
        if self.flat:
            flat = FlatOutputs(specs, len(full), self.places)
            self.merger(specs, flat, flat.views)(full)
            return [{name: view.clone() for name, view in views.items()} for views in flat.views]
        out = separate_outputs(specs, len(full), self.places)
        self.merger(specs, None, out)(full)
        return out

    def merger(
        self,
        specs: Sequence[TensorSpec],
        flat: FlatOutputs | None,
        out: Sequence[Mapping[str, Tensor]],
        *,
        once: bool = False,
    ) -> Merger:
        """Bind a merge of some tensors: on devices with the Triton backend into `flat`, on others into `out`.

        `once` says that it runs once and for all, so that the native backend lets mapped files' pages go.
        """
        native = frugal_merger if once else native_merger
        parts = []
        for device, backend in self.backends.items():
            here = [spec for spec in specs if self.places[spec.name] == device]
            if not here:
                continue
            if backend == "triton" and flat is not None:
                buffers = [f for f in self.flat if f.bucket.device == device]
                merge = triton_merger(buffers, flat, {spec.name for spec in here})
            else:
                maker = native if backend == "native" else reference_merger
                merge = maker(here, self.rows, self.stack, out)
            parts.append((device, merge))

        def merge_all(weights: Tensor) -> None:
            for device, merge in parts:
                merge(weights.to(device))

        return merge_all

    def static(self) -> dict[str, Tensor]:
        """The static tensors, merged when first asked for and then shared: never to be written to."""
        if self._static is None:
            specs = self.layout.with_role("static")
            full = torch.full(
                (1, len(self.layout.groups) + 1, len(self.layout.objectives)), self.layout.static_weight
            )
            out = FlatOutputs(specs, 1, self.places)
            self.merger(specs, out, out.views)(full)
            self._static = out.views[0]
        return self._static

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by name, shards as the DTensors that they are part of."""
        return {
            name: self.shardings[name].whole(tensor) if name in self.shardings else tensor
            for name, tensor in tensors.items()
        }
