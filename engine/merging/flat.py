"""Flat memory: every tensor of one device, role and dtype in one buffer, each starting on a tile boundary.

A tile belongs to one group, so that one kernel launch merges a whole buffer. Model code sees views of the buffers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paretofuse.engine.dtypes import TO_TORCH
from paretofuse.engine.layout import TILE, TensorSpec, place, tile_groups
from paretofuse.engine.planes.dense import Dense
from paretofuse.engine.planes.plane import Plane
from paretofuse.engine.planes.trained import trained_factors
from paretofuse.engine.stacking.stack import Stack, lasting


@dataclass(frozen=True)
class Bucket:
    """Tensors that share one flat buffer of `total` elements on a device, each at its offset."""

    device: torch.device
    specs: tuple[TensorSpec, ...]
    offsets: tuple[int, ...]
    total: int

    def view(self, flat: Tensor) -> dict[str, Tensor]:
        """The tensors as views of a flat buffer [total]."""
        return {
            spec.name: flat[offset : offset + spec.numel].view(spec.shape)
            for spec, offset in zip(self.specs, self.offsets, strict=True)
        }


def buckets(specs: Sequence[TensorSpec], places: Mapping[str, torch.device]) -> list[Bucket]:
    """Group tensors by device, role and dtypes, and place them.

    Args:
        specs: the tensors.
        places: the device of each, by name.
    """
    kinds: dict[tuple[torch.device, str, str, str], list[TensorSpec]] = {}
    for spec in specs:
        kinds.setdefault((places[spec.name], spec.role, spec.dtype, spec.delta_dtype), []).append(spec)
    result = []
    for (device, *_), members in kinds.items():
        offsets, total = place([spec.numel for spec in members])
        result.append(Bucket(device, tuple(members), tuple(offsets), total))
    return result


@dataclass(frozen=True)
class FlatInputs:
    """One bucket's inputs: base [N], deltas [E, N] and the row of each tile, int32 [N / TILE]."""

    bucket: Bucket
    base: Tensor
    deltas: Tensor
    tiles: Tensor


@lasting()
def flatten(
    stack: Stack, rows: Mapping[str, int], places: Mapping[str, torch.device]
) -> tuple[Stack, list[FlatInputs]]:
    """Copy a stack's merged tensors into flat buffers, those that `places` names; planes become dense there.

    Args:
        stack: the stack.
        rows: each merged tensor's row of the routing weights.
        places: the device of each tensor that shall lie in a flat buffer.

    Returns:
        the same stack with these tensors as views of the buffers, so that nothing is held twice, and the buffers.
    """
    base = dict(stack.base)
    planes = [dict(own) for own in stack.planes]
    inputs = []
    for bucket in buckets(
        [s for s in stack.layout.with_role("routed", "static") if s.name in places], places
    ):
        first, device = bucket.specs[0], bucket.device
        flat = torch.zeros(bucket.total, dtype=TO_TORCH[first.dtype], device=device)
        deltas = torch.zeros(len(planes), bucket.total, dtype=TO_TORCH[first.delta_dtype], device=device)
        for name, view in bucket.view(flat).items():
            base[name] = view.copy_(stack.base[name])
        for own, theirs, delta in zip(planes, stack.planes, deltas, strict=True):
            own.update({n: _in_place(theirs[n], v) for n, v in bucket.view(delta).items() if n in theirs})
        lengths = [spec.numel for spec in bucket.specs]
        tiles = tile_groups(lengths, [rows[spec.name] for spec in bucket.specs], TILE)
        inputs.append(FlatInputs(bucket, flat, deltas, torch.tensor(tiles, dtype=torch.int32, device=device)))
    return Stack(stack.layout, base, tuple(planes), stack.heads), inputs


def _in_place(plane: Plane, view: Tensor) -> Dense:
    """A dense plane whose values lie in a flat buffer."""
    return Dense(view.copy_(plane.values if isinstance(plane, Dense) else plane.decode()), plane.error)


class FlatOutputs:
    """Outputs of K merges in flat buffers [K, N], a buffer for each bucket; `views[k]` maps names to tensors."""

    def __init__(self, specs: Sequence[TensorSpec], count: int, places: Mapping[str, torch.device]) -> None:
        self.buffers: dict[tuple[TensorSpec, ...], Tensor] = {}
        self.views: list[dict[str, Tensor]] = [{} for _ in range(count)]
        for bucket in buckets(specs, places):
            dtype = TO_TORCH[bucket.specs[0].dtype]
            # A merge fills all of it. Zeroing takes PyTorch's threads, which a forked process does not have.
            flat = torch.empty(count, bucket.total, dtype=dtype, device=bucket.device)
            self.buffers[bucket.specs] = flat
            for views, row in zip(self.views, flat, strict=True):
                views.update(bucket.view(row))


Deltas = Tensor | Sequence[Tensor | None]
"""A tensor's deltas, one for each expert: [P, *shape] where they lie as one tensor, else each where it lies; None where
an expert leaves the tensor unchanged."""


class DenseDeltas:
    """The planes of each tensor as one dense tensor [P, *shape], by stored name, for what reads nothing else.

    Views of the flat buffers where there are some; elsewhere stacked when first asked for, which copies them.
    """

    def __init__(self, stack: Stack, flat: Sequence[FlatInputs]) -> None:
        self._stack = stack
        self._found: dict[str, Tensor] = {}
        for inputs in flat:
            for spec, offset in zip(inputs.bucket.specs, inputs.bucket.offsets, strict=True):
                plane = inputs.deltas[:, offset : offset + spec.numel]
                self._found[spec.name] = plane.unflatten(1, spec.shape) if spec.shape else plane[:, 0]

    @lasting()
    def __getitem__(self, name: str) -> Tensor:
        """[P, *shape] in the deltas' dtype; zeros for experts that leave the tensor unchanged."""
        if name not in self._found:
            base, dtype = self._stack.base[name], TO_TORCH[self._stack.layout.by_name[name].delta_dtype]
            dense = base.new_zeros((len(self._stack.planes), *base.shape), dtype=dtype)
            for row, own in zip(dense, self._stack.planes, strict=True):
                if name in own:
                    row.copy_(own[name].decode())
            if any(trained_factors(own.get(name)) for own in self._stack.planes):
                return dense  # another one after the next step
            self._found[name] = dense
        return self._found[name]

    def where_they_lie(self, name: str) -> Deltas:
        """As one tensor where there is one already, else dense planes each where it lies; others are decoded."""
        given = [own.get(name) for own in self._stack.planes]
        if name in self._found or not all(plane is None or isinstance(plane, Dense) for plane in given):
            return self[name]
        return [plane.values if isinstance(plane, Dense) else None for plane in given]
