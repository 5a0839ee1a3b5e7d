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
    MergerMaker,
    choose_backend,
    frugal_merger,
    native_merger,
    reference_merger,
    separate_outputs,
    triton_merger,
)
from paretofuse.engine.merging.flat import (
    DENSE,
    LOWRANK,
    DenseDeltas,
    FlatInputs,
    FlatOutputs,
    Kind,
    flatten,
    kind_of,
)
from paretofuse.engine.merging.low_rank import is_merged_here, low_rank_merger
from paretofuse.engine.stacking.sharding import Sharding
from paretofuse.engine.stacking.stack import Stack, lasting, settled
from paretofuse.kernels.lowrank_merge import Factors


class BoundStack:
    """A stack's tensors and what merges them.

    Routed tensors take the routing weights [K, G, P], with coefficients of rows [K, G + R, P], of columns too
    [K, G + R + C, P]. Static tensors take each plane's static weight (`Layout.static_weights`).

    Args:
        stack: its tensors may lie on several devices; one that has a device of its own is put there.
        backend: "reference", "native" or "triton" for all devices, or None for each device's own.
        shardings: how tensors that are sharded over processes lie; the stack holds this process's shards.

    Attributes:
        stack: the same, where the Triton backend works as views of flat buffers.
        layout: its tensor table.
        rows: each routed tensor's row of the routing weights.
        places: each tensor's device.
        backends: each device's backend.
        flat: the flat buffers, for each device with the Triton backend.
        kinds: how the planes of each tensor lie in them.
        deltas: each merged tensor's planes as one dense tensor.
        shardings: as given.
        notes: what a user should know of it, a sentence each.
    """

    def __init__(
        self, stack: Stack, backend: str | None, shardings: Mapping[str, Sharding] | None = None
    ) -> None:
        self.layout = stack.layout
        self.rows = self.layout.group_index
        self._static_rows = {spec.name: 0 for spec in self.layout.with_role("static")}
        self._static_weights = torch.tensor([[self.layout.static_weights]], dtype=torch.float32)  # [1, 1, P]
        self.places = {name: stack.device or tensor.device for name, tensor in stack.base.items()}
        self.backends = {d: choose_backend(d, backend) for d in dict.fromkeys(self.places.values())}
        merged = self.layout.with_role("routed", "static")
        in_flat = {name: d for name, d in self.places.items() if self.backends[d] == "triton"}
        self.flat: list[FlatInputs] = []
        self.kinds: dict[str, Kind] = {}
        self.notes: tuple[str, ...] = ()
        if in_flat:
            given = {s.name: [own.get(s.name) for own in stack.planes] for s in merged if s.name in in_flat}
            self.kinds = {name: kind_of(planes) for name, planes in given.items()}
            in_flat = {name: in_flat[name] for name, kind in self.kinds.items() if kind != LOWRANK}
            decoded = {
                plane.format
                for name, planes in given.items()
                for plane in planes
                if plane is not None and self.kinds[name] == DENSE
            } - {"dense"}
            if decoded:
                self.notes = (
                    f"planes of the formats {', '.join(sorted(decoded))} were made dense where a tensor's planes are "
                    "not all int8 or all int4 of one group, as the Triton kernels read them: they take the memory of "
                    "dense ones",
                )
            stack, self.flat = flatten(stack, self.rows | self._static_rows, in_flat, self.kinds)
        self.stack = stack = settled(stack)
        self.deltas = DenseDeltas(stack, self.flat)
        self.shardings = shardings or {}
        self._static: dict[str, Tensor] | None = None
        self._factors: dict[tuple[str, ...], Factors] = {}

    @property
    def changed(self) -> frozenset[str]:
        """The routed tensors that a preference changes: some plane is not absent."""
        return frozenset(
            spec.name
            for spec in self.layout.with_role("routed")
            if any(spec.name in own for own in self.stack.planes)
        )

    def check_whole(self, what: str) -> None:
        """ValueError where the tensors are one process's shards, of which `what` is not possible."""
        if self.shardings:
            raise ValueError(
                f"got one process's shards of {next(iter(self.shardings))!r} and others, expected whole tensors for "
                f"{what}; stack the unsharded models for that"
            )

    @property
    def reads_rows(self) -> bool:
        """Whether what merges here reads row coefficients: all but one process's shards."""
        return not self.shardings

    def check_rows(self, width: int) -> None:
        """Check that what merges here reads routing weights [width, P].

        Raises:
            ValueError: they have row coefficients, and the tensors are shards.
        """
        if width <= len(self.layout.groups):
            return
        self.check_whole("row coefficients")

    @lasting()
    def merge(self, weights: Tensor) -> list[dict[str, Tensor]]:
        """K new sets of all routed and static tensors at weights [K, G, P], each tensor with its own storage."""
        routed, static = self.layout.with_role("routed"), self.layout.with_role("static")
        flat: FlatOutputs | None = None
        if "triton" in self.backends.values():
            flat = self.outputs((*routed, *static), len(weights))
            out = flat.views
        else:
            out = separate_outputs((*routed, *static), len(weights), self.places)
        self.routed_merger(routed, flat, out)(weights)
        self.merge_static(flat, out)
        if flat is None:
            return out
        # Each tensor its own storage, by few launches: a clone for each would be hundreds.
        own = [{name: torch.empty_like(view) for name, view in views.items()} for views in out]
        pairs = [(t, views[n]) for tensors, views in zip(own, out, strict=True) for n, t in tensors.items()]
        for device in self.backends:
            here = [pair for pair in pairs if pair[0].device == device]
            torch._foreach_copy_([to for to, _ in here], [view for _, view in here])
        return own

    def states(self, weights: Tensor, head: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """K new state dicts at weights [K, G, P], with an objective's own tensors; tied names share one tensor."""
        constants = {spec.name: self.stack.base[spec.name] for spec in self.layout.with_role("constant")}
        states = []
        for merged in self.merge(weights):
            state: dict[str, Tensor] = {}
            whole = self.whole({**merged, **{n: t.clone() for n, t in constants.items()}})
            for spec in self.layout.tensors:
                state.update(dict.fromkeys((spec.name, *spec.aliases), whole[spec.name]))
            for name, tensor in head.items():
                shared = self.layout.by_name.get(name)
                names = (name, *shared.aliases) if shared is not None else (name,)
                state.update(dict.fromkeys(names, tensor.clone()))
            states.append(state)
        return states

    def outputs(self, specs: Sequence[TensorSpec], count: int) -> FlatOutputs:
        """New memory for K merges of some tensors, laid out as the flat buffers are."""
        return FlatOutputs(specs, count, self.places, self.kinds)

    def routed_merger(
        self, specs: Sequence[TensorSpec], flat: FlatOutputs | None, out: Sequence[Mapping[str, Tensor]]
    ) -> Merger:
        """Bind a merge of some routed tensors.

        Args:
            specs: the tensors.
            flat: outputs, for devices with the Triton backend.
            out: outputs for the others; for each preference, the tensors by name.
        """
        return self._merger(specs, self.rows, native_merger, flat, out)

    def merge_static(self, flat: FlatOutputs | None, out: Sequence[Mapping[str, Tensor]]) -> None:
        """Merge all static tensors, once and for all: the pages of mapped files are let go of.

        Args: as `routed_merger`'s.
        """
        specs = self.layout.with_role("static")
        weights = self._static_weights.repeat(len(out), 1, 1)
        self._merger(specs, self._static_rows, frugal_merger, flat, out)(weights)

    def _merger(
        self,
        specs: Sequence[TensorSpec],
        rows: Mapping[str, int],
        native: MergerMaker,
        flat: FlatOutputs | None,
        out: Sequence[Mapping[str, Tensor]],
    ) -> Merger:
        """Each device's own merger, one after the other; first the files that the stack is mapped from are checked.

        The Triton kernels read no coefficients of columns: with those PyTorch merges.
        """
        parts: list[Merger] = []
        plain: list[Merger] = []
        for device, backend in self.backends.items():
            here = every = [spec for spec in specs if self.places[spec.name] == device]
            if not here:
                continue
            if backend == "triton" and flat is not None:
                buffers = [f for f in self.flat if f.bucket.device == device]
                small = [spec for spec in here if self.kinds[spec.name] != LOWRANK]
                parts.append(triton_merger(buffers, flat, small, rows, self.layout))
                here = [spec for spec in here if self.kinds[spec.name] == LOWRANK]
                thin = {
                    s.name: s for s in here if is_merged_here([own.get(s.name) for own in self.stack.planes])
                }
                parts.append(low_rank_merger(list(thin.values()), rows, self.stack, flat, self._factors))
                here = [
                    spec for spec in here if spec.name not in thin
                ]  # PyTorch's: quantized planes beside those of low rank
            maker = native if backend == "native" else reference_merger
            parts.append(maker(here, rows, self.stack, out))
            plain += parts[-1:] if backend == "native" else [reference_merger(every, rows, self.stack, out)]

        def merge_all(weights: Tensor) -> None:
            self.stack.check()
            self.check_rows(weights.shape[1])
            for merge in plain if weights.shape[1] > self.layout.widths[1] else parts:
                merge(weights)

        return merge_all

    @lasting()
    def static(self) -> dict[str, Tensor]:
        """The static tensors, merged when first asked for and then shared: never to be written to."""
        if self._static is None:
            out = self.outputs(self.layout.with_role("static"), 1)
            self.merge_static(out, out.views)
            self._static = out.views[0]
        return self._static

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by name, shards as the DTensors that they are part of."""
        return {
            name: self.shardings[name].whole(tensor) if name in self.shardings else tensor
            for name, tensor in tensors.items()
        }
