"""Flat memory: every tensor of one device, role and dtype in one buffer, each starting on a tile boundary.

A tile belongs to one group, so that one kernel launch merges a whole buffer. Model code sees views of the buffers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from paretofuse.engine.dtypes import TO_TORCH
from paretofuse.engine.layout import TILE, TensorSpec, place, tile_groups
from paretofuse.engine.planes.dense import Dense
from paretofuse.engine.planes.groups import Quantized
from paretofuse.engine.planes.lowrank import LowRank
from paretofuse.engine.planes.plane import Plane
from paretofuse.engine.planes.trained import trained_factors
from paretofuse.engine.stacking.stack import Stack, lasting


@dataclass(frozen=True)
class Bucket:
    """Tensors that share a flat buffer of `total` elements on a device, each at its offset, the `small` ones first."""

    device: torch.device
    specs: tuple[TensorSpec, ...]
    offsets: tuple[int, ...]
    total: int
    small: int

    def view(self, flat: Tensor) -> dict[str, Tensor]:
        """The tensors as views of a flat buffer [total]."""
        return {
            spec.name: flat[offset : offset + spec.numel].view(spec.shape)
            for spec, offset in zip(self.specs, self.offsets, strict=True)
        }


Kind = tuple[str, int]
"""How a tensor's planes lie: format and elements of a group. With one of low rank they stay where they are."""

DENSE: Kind = ("dense", 0)
LOWRANK: Kind = ("lowrank", 0)

SMALL = 1 << 16
"""Elements of the largest small tensor. Small ones lie side by side, so that one launch reduces all their gradients."""


def kind_of(planes: Sequence[Plane | None]) -> Kind:
    """How a tensor's planes shall lie: as they are, if all are of one format and group, or one is of low rank.

    Others become dense.
    """
    if any(isinstance(plane, LowRank) for plane in planes):
        return LOWRANK
    kinds = {(p.format, p.group) if isinstance(p, Quantized) else DENSE for p in planes if p is not None}
    return kinds.pop() if len(kinds) == 1 else DENSE


def buckets(
    specs: Sequence[TensorSpec], places: Mapping[str, torch.device], kinds: Mapping[str, Kind] | None = None
) -> list[Bucket]:
    """Group tensors by device, role, dtypes and kind, and place them, the small ones first.

    Args:
        specs: the tensors.
        places: the device of each, by name.
        kinds: how the planes of each lie, by name; dense unless told.
    """
    found: dict[tuple[torch.device, str, str, str, Kind], list[TensorSpec]] = {}
    for spec in specs:
        kind = (kinds or {}).get(spec.name, DENSE)
        found.setdefault((places[spec.name], spec.role, spec.dtype, spec.delta_dtype, kind), []).append(spec)
    result = []
    for (device, *_), members in found.items():
        members.sort(key=lambda spec: spec.numel > SMALL)
        offsets, total = place([spec.numel for spec in members])
        small = sum(spec.numel <= SMALL for spec in members)
        result.append(Bucket(device, tuple(members), tuple(offsets), total, small))
    return result


@dataclass(frozen=True)
class Stored:
    """Planes as a kernel reads them, of one tensor or of a whole bucket.

    Attributes:
        values: [E, N] floats or int8, or [E, N / 2] uint8 for int4.
        scales: [E, N / group] float32, or None.
        planes: which of all planes they are, E of them; the others leave the tensors unchanged.
    """

    values: Tensor
    scales: Tensor | None
    planes: tuple[int, ...]


@dataclass(frozen=True)
class FlatInputs:
    """One bucket's inputs: base [N], planes, and the row of each tile, int32 [N / TILE]."""

    bucket: Bucket
    base: Tensor
    stored: Stored
    tiles: Tensor

    def of_tensors(self) -> Iterator[tuple[TensorSpec, Stored]]:
        """Each tensor's planes, as views."""
        values, scales, planes = self.stored.values, self.stored.scales, self.stored.planes
        per_byte = 2 if values.dtype == torch.uint8 else 1
        group = TILE if scales is None else self.bucket.total // max(1, scales.shape[1])
        for spec, offset in zip(self.bucket.specs, self.bucket.offsets, strict=True):
            start, end = offset // per_byte, (offset + spec.numel + per_byte - 1) // per_byte
            own = None if scales is None else scales[:, offset // group : -(-(offset + spec.numel) // group)]
            yield spec, Stored(values[:, start:end], own, planes)


@lasting()
def flatten(
    stack: Stack,
    rows: Mapping[str, int],
    places: Mapping[str, torch.device],
    kinds: Mapping[str, Kind] | None = None,
) -> tuple[Stack, list[FlatInputs]]:
    """Copy a stack's merged tensors into flat buffers, those that `places` names, tensor by tensor.

    Args:
        stack: the stack.
        rows: each merged tensor's row of the routing weights.
        places: the device of each tensor that shall lie in a flat buffer.
        kinds: how the planes of each shall lie there; dense unless told.

    Returns:
        the same stack with these tensors as views of the buffers, so that nothing is held twice, and the buffers.
    """
    base = dict(stack.base)
    planes = [dict(own) for own in stack.planes]
    inputs = []
    specs = [s for s in stack.layout.with_role("routed", "static") if s.name in places]
    for bucket in buckets(specs, places, kinds):
        first, device = bucket.specs[0], bucket.device
        flat = torch.zeros(bucket.total, dtype=TO_TORCH[first.dtype], device=device)
        for name, view in bucket.view(flat).items():
            base[name] = view.copy_(stack.base[name])
        present = [j for j, own in enumerate(planes) if any(spec.name in own for spec in bucket.specs)] or [0]
        kind = (kinds or {}).get(first.name, DENSE)
        stored = _zeros(bucket.total, len(present), kind, TO_TORCH[first.delta_dtype], device, present)
        found = FlatInputs(bucket, flat, stored, _tiles(bucket, rows))
        for spec, own in found.of_tensors():
            for row, j in enumerate(present):
                if spec.name in planes[j]:
                    planes[j][spec.name] = _in_place(planes[j][spec.name], own, row, spec.shape)
            stack.release([spec.name])
        inputs.append(found)
    return replace(stack, base=base, planes=tuple(planes)), inputs


def _zeros(
    total: int, count: int, kind: Kind, dtype: torch.dtype, device: torch.device, planes: Sequence[int]
) -> Stored:
    """Planes of one kind that leave everything unchanged."""
    name, group = kind
    if kind == DENSE:
        return Stored(torch.zeros(count, total, dtype=dtype, device=device), None, tuple(planes))
    per_byte, stored = (2, torch.uint8) if name == "int4" else (1, torch.int8)
    values = torch.zeros(count, total // per_byte, dtype=stored, device=device)
    scales = torch.zeros(count, total // group, dtype=torch.float32, device=device)
    return Stored(values, scales, tuple(planes))


def _tiles(bucket: Bucket, rows: Mapping[str, int]) -> Tensor:
    """The row of each tile."""
    lengths = [spec.numel for spec in bucket.specs]
    tiles = tile_groups(lengths, [rows[spec.name] for spec in bucket.specs], TILE)
    return torch.tensor(tiles, dtype=torch.int32, device=bucket.device)


def _in_place(plane: Plane, stored: Stored, row: int, shape: tuple[int, ...]) -> Plane:
    """A plane whose numbers lie in a flat buffer, copied there."""
    values = stored.values[row]
    if stored.scales is not None:
        packed, scales = plane.tensors()["_packed"], plane.tensors()["_scale"]
        return plane.like({"_packed": values.copy_(packed), "_scale": stored.scales[row].copy_(scales)})
    view = values.view(shape)
    return Dense(view.copy_(plane.values if isinstance(plane, Dense) else plane.decode()), plane.error)


class FlatOutputs:
    """Outputs of K merges in flat buffers [K, N], a buffer for each bucket; `views[k]` maps names to tensors."""

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        count: int,
        places: Mapping[str, torch.device],
        kinds: Mapping[str, Kind] | None = None,
    ) -> None:
        self.buffers: dict[tuple[TensorSpec, ...], Tensor] = {}
        self.views: list[dict[str, Tensor]] = [{} for _ in range(count)]
        for bucket in buckets(specs, places, kinds):
            dtype = TO_TORCH[bucket.specs[0].dtype]
            # A merge fills all of it. Zeroing takes PyTorch's threads, which a forked process does not have.
            flat = torch.empty(count, bucket.total, dtype=dtype, device=bucket.device)
            self.buffers[bucket.specs] = flat
            for views, row in zip(self.views, flat, strict=True):
                views.update(bucket.view(row))


Deltas = Tensor | Sequence[Tensor | LowRank | None]
"""A tensor's planes: [P, *shape] where they lie as one tensor, else each where it lies; None where one leaves the
tensor unchanged."""


class DenseDeltas:
    """The planes of each tensor as one dense tensor [P, *shape], by stored name, for what reads nothing else.

    Views of the flat buffers where there are some; elsewhere stacked when first asked for, which copies them.
    """

    def __init__(self, stack: Stack, flat: Sequence[FlatInputs]) -> None:
        self._stack = stack
        self._found: dict[str, Tensor] = {}
        for inputs in flat:
            if inputs.stored.scales is None and len(inputs.stored.planes) == len(stack.planes):
                for spec, own in inputs.of_tensors():
                    self._found[spec.name] = (
                        own.values.unflatten(1, spec.shape) if spec.shape else own.values[:, 0]
                    )

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
        """As one tensor where there is one already, else dense and low-rank planes each where it lies; others are
        decoded."""
        given = [own.get(name) for own in self._stack.planes]
        low_rank = any(isinstance(plane, LowRank) for plane in given)
        if not low_rank and (
            name in self._found or any(plane is not None and not isinstance(plane, Dense) for plane in given)
        ):
            return self[name]
        return [_where_it_lies(plane) for plane in given]


def _where_it_lies(plane: Plane | None) -> Tensor | LowRank | None:
    if plane is None or isinstance(plane, LowRank):
        return plane
    return plane.values if isinstance(plane, Dense) else plane.decode()
