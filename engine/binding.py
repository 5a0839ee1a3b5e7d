"""A stack where it lies: each device's backend and flat buffers, its mergers, and the modules made of its tensors.

A model split over devices is merged by each of them from its own flat buffers; the routing weights are all that
travels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from paretofuse.engine.build import Stack
from paretofuse.engine.flat import FlatInputs, FlatOutputs, Planes, flatten
from paretofuse.engine.fused import fuse, fused_layers
from paretofuse.engine.layerwise import LayerwiseWeight
from paretofuse.engine.layout import TensorSpec
from paretofuse.engine.live import LiveModule
from paretofuse.engine.merge import (
    Merger,
    choose_backend,
    frugal_merger,
    native_merger,
    reference_merger,
    separate_outputs,
    triton_merger,
)
from paretofuse.engine.mixed import MixedWeight, RoutedWeight, is_conv1d
from paretofuse.engine.sharding import Sharding, shard
from paretofuse.engine.skeleton import materialize, stored_tensors


class Binding:
    """What turns a stack's tensors into merged ones and into modules.

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
        planes: each merged tensor's deltas as one tensor.
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
        self.planes = Planes(stack, self.flat)
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

    def live(self, skeleton: nn.Module, weights: Tensor, *, fused: bool) -> LiveModule:
        """A module bound to its mergers; a fused one has merged tensors only where a layer cannot do without.

        Args:
            skeleton: the module's structure.
            weights: the first routing weights, [1, G + 1, E].
            fused: whether linear layers give way to those of `mixed.py`.
        """
        routed, static = self.layout.with_role("routed"), self.layout.with_role("static")
        known = {name: spec.name for name, spec in self.layout.by_name.items() if spec.role == "routed"}
        hidden = {n for names in fused_layers(skeleton, known).values() for n in names} if fused else set()
        merged = tuple(spec for spec in routed if spec.name not in hidden)
        out = FlatOutputs((*merged, *static), 1, self.places)
        state = dict(out.views[0])
        for spec in self.layout.with_role("constant"):
            state[spec.name] = self.stack.base[spec.name].clone()
        # The base's own tensors, held only until the layers are replaced.
        state.update({name: self.stack.base[name] for name in hidden})
        module = materialize(skeleton, self.whole(state), "the stacked tensors")
        mixes: dict[torch.device, Tensor] = {}
        if fused:
            mixes = {d: torch.zeros(weights[0, :-1].shape, device=d) for d in self.backends}
            module = fuse(module, fused_layers(module, known), partial(self._mixed_weight, mixes))
        # Parameters share the outputs' memory but are tensors of their own: write through them from now on.
        stored = {name: shard(tensor) for name, tensor in stored_tensors(module).items()}
        in_flat = {spec.name for flat in self.flat for spec in flat.bucket.specs}
        return LiveModule(
            module,
            self.merger(merged, out, [stored]),
            self.merger(static, out, [stored], once=True),
            {spec.name: self.rows[spec.name] for spec in merged},
            self.stack.deltas,
            weights,
            planes={spec.name: self.planes[spec.name] for spec in merged if spec.name in in_flat},
            mixes=tuple(mixes.values()),
        )

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

    def _mixed_weight(self, mixes: Mapping[torch.device, Tensor], layer: nn.Module, name: str) -> MixedWeight:
        """The weight of a fused layer, given the routing weights [G, E] on each device."""
        base, row = self.stack.base[name], self.rows[name]
        mix, transposed = mixes[base.device], is_conv1d(layer)
        if self.backends[base.device] == "native":
            deltas = [own.get(name) for own in self.stack.deltas]
            release = partial(self.stack.release, [name])
            return LayerwiseWeight(base, deltas, mix, row, transposed, release)
        planes = self.planes[name]
        if transposed:
            base, planes = base.T, planes.mT
        return RoutedWeight(base, planes, mix, row)

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by name, shards as the DTensors that they are part of."""
        return {
            name: self.shardings[name].whole(tensor) if name in self.shardings else tensor
            for name, tensor in tensors.items()
        }
