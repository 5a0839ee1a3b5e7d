"""Flat memory: every tensor of one role and dtype in one buffer, each starting on a tile boundary.

A tile belongs to one group, so that one kernel launch merges a whole buffer. Model code sees views of the buffers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paretofuse.engine.build import Stack
from paretofuse.engine.dtypes import TO_TORCH
from paretofuse.engine.layout import TILE, TensorSpec, place, tile_groups


@dataclass(frozen=True)
class Bucket:
    """Tensors that share one flat buffer of `total` elements, each at its offset."""

    specs: tuple[TensorSpec, ...]
    offsets: tuple[int, ...]
    total: int

    def view(self, flat: Tensor) -> dict[str, Tensor]:
        """The tensors as views of a flat buffer [total]."""
        return {
            spec.name: flat[offset : offset + spec.numel].view(spec.shape)
            for spec, offset in zip(self.specs, self.offsets, strict=True)
        }


def buckets(specs: Sequence[TensorSpec]) -> list[Bucket]:
    """Group tensors by role and dtypes, and place them."""
    kinds: dict[tuple[str, str, str], list[TensorSpec]] = {}
    for spec in specs:
        kinds.setdefault((spec.role, spec.dtype, spec.delta_dtype), []).append(spec)
    result = []
    for members in kinds.values():
        offsets, total = place([spec.numel for spec in members])
        result.append(Bucket(tuple(members), tuple(offsets), total))
    return result


@dataclass(frozen=True)
class FlatInputs:
    """One bucket's inputs: base [N], deltas [E, N] and the row of each tile, int32 [N / TILE]."""

    bucket: Bucket
    base: Tensor
    deltas: Tensor
    tiles: Tensor


def flatten(stack: Stack, rows: Mapping[str, int], device: torch.device) -> tuple[Stack, list[FlatInputs]]:
    """Move a stack's merged tensors into flat buffers on a device.

    Returns:
        the same stack with its tensors as views of the buffers, so that nothing is held twice, and the buffers.
    """
    base = {spec.name: stack.base[spec.name].to(device) for spec in stack.layout.with_role("constant")}
    deltas: list[dict[str, Tensor]] = [{} for _ in stack.deltas]
    inputs = []
    for bucket in buckets(stack.layout.with_role("routed", "static")):
        first = bucket.specs[0]
        flat = torch.zeros(bucket.total, dtype=TO_TORCH[first.dtype], device=device)
        planes = torch.zeros(len(deltas), bucket.total, dtype=TO_TORCH[first.delta_dtype], device=device)
        for name, view in bucket.view(flat).items():
            base[name] = view.copy_(stack.base[name])
        for own, theirs, plane in zip(deltas, stack.deltas, planes, strict=True):
            own.update({n: v.copy_(theirs[n]) for n, v in bucket.view(plane).items() if n in theirs})
        lengths = [spec.numel for spec in bucket.specs]
        tiles = tile_groups(lengths, [rows[spec.name] for spec in bucket.specs], TILE)
        inputs.append(FlatInputs(bucket, flat, planes, torch.tensor(tiles, dtype=torch.int32, device=device)))
    heads = {o: {n: t.to(device) for n, t in own.items()} for o, own in stack.heads.items()}
    return Stack(stack.layout, base, tuple(deltas), heads), inputs


class FlatOutputs:
    """Outputs of K merges in flat buffers [K, N], a buffer for each bucket; `views[k]` maps names to tensors."""

    def __init__(self, specs: Sequence[TensorSpec], count: int, device: torch.device) -> None:
        self.buffers: dict[tuple[TensorSpec, ...], Tensor] = {}
        self.views: list[dict[str, Tensor]] = [{} for _ in range(count)]
        for bucket in buckets(specs):
            flat = torch.zeros(count, bucket.total, dtype=TO_TORCH[bucket.specs[0].dtype], device=device)
            self.buffers[bucket.specs] = flat
            for views, row in zip(self.views, flat, strict=True):
                views.update(bucket.view(row))
