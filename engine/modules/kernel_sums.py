"""Gradients of the routing weights by the Triton kernels, for one flat buffer of planes.

Stage one leaves a number for each tile and plane. A large tensor's gradient takes a launch as it arrives, and is let go
of. Small tensors are most of a model's tensors and next to none of its bytes: theirs are held until the sums are taken,
laid side by side and reduced in one launch, as their planes lie side by side at the buffer's start. Stage two adds the
tiles of each group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paretofuse.engine.layout import TILE, TensorSpec
from paretofuse.engine.merging.flat import Bucket, FlatInputs
from paretofuse.kernels.routed_grad import grad_partials, group_sums, plan_groups

HELD = 1 << 22
"""The most elements of small gradients that are held: 16 MB of float32."""


class KernelSums:
    """The sums of one flat buffer.

    Args:
        flat: the buffer, whose tiles name groups.
        groups: G.
        count: P, of which the buffer may hold some.
    """

    def __init__(self, flat: FlatInputs, groups: int, count: int) -> None:
        bucket, device = flat.bucket, flat.base.device
        self._stored = {spec.name: own for spec, own in flat.of_tensors()}
        self._flat = flat.stored
        self._first = {
            spec.name: offset // TILE for spec, offset in zip(bucket.specs, bucket.offsets, strict=True)
        }
        self._small = held_tensors(bucket)
        self._plan = plan_groups(flat.tiles, groups, TILE)
        self._partials = torch.zeros(  # [tiles, planes]
            len(flat.tiles), len(flat.stored.planes), dtype=torch.float32, device=device
        )
        self._shape = groups, count
        self._planes = torch.tensor(flat.stored.planes, device=device)
        longest = max((spec.numel for spec in self._small.values()), default=0)
        self._zeros = torch.zeros(max(longest, TILE), dtype=flat.base.dtype, device=device)
        self._held: dict[str, Tensor] = {}
        self._filled: set[str] = set()

    def add(self, name: str, gradient: Tensor) -> None:
        """Take one parameter's gradient, which nobody writes to any more."""
        if name in self._small:
            # Twice where a backward pass runs inside of another one (activation checkpointing).
            self._held[name] = self._held[name] + gradient if name in self._held else gradient
            return
        own, first = self._stored[name], self._first[name]
        rows = self._partials[first : first - (-gradient.numel() // TILE)]
        if name in self._filled:
            rows += grad_partials(gradient.reshape(-1), own.values, scales=own.scales, tile=TILE)
            return
        grad_partials(gradient.reshape(-1), own.values, scales=own.scales, out=rows, tile=TILE)
        self._filled.add(name)

    def take(self) -> Tensor | None:
        """The sums, float64 [G, P], or None where nothing was added; and start anew."""
        if not self._held and not self._filled:
            return None
        if self._held:
            self._reduce_held()
        total = torch.zeros(self._shape, dtype=torch.float64, device=self._partials.device)
        total[:, self._planes] = group_sums(self._partials, self._plan).double()
        self._partials.zero_()
        self._filled.clear()
        return total

    def _reduce_held(self) -> None:
        """Reduce all small gradients; those that have not come count as zero."""
        pieces = []
        for spec in self._small.values():
            gradient = self._held.get(spec.name)
            pieces.append(self._zeros[: spec.numel] if gradient is None else gradient.reshape(-1))
            if spec.numel % TILE:
                pieces.append(self._zeros[: -spec.numel % TILE])
        self._held.clear()
        whole = torch.cat(pieces)
        scales, values = self._flat.scales, self._flat.values
        per_byte = 2 if values.dtype == torch.uint8 else 1
        if scales is not None:
            scales = scales[:, : whole.numel() * scales.shape[1] // (len(self._partials) * TILE)]
        rows = self._partials[: whole.numel() // TILE]
        grad_partials(whole, values[:, : whole.numel() // per_byte], scales=scales, out=rows, tile=TILE)


def held_tensors(bucket: Bucket) -> dict[str, TensorSpec]:
    """The small tensors at a buffer's start whose gradients are held, by name: those within `HELD` elements."""
    first = zip(bucket.specs[: bucket.small], bucket.offsets, strict=False)
    return {spec.name: spec for spec, offset in first if offset + spec.numel <= HELD}
