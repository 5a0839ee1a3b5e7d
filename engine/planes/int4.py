"""Int4 planes: half a byte for each element, and a scale for each group."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from paretofuse.engine.planes.groups import quantize, scaled
from paretofuse.engine.planes.memory import Memory
from paretofuse.engine.planes.plane import by_row

LIMIT = 7
"""The largest quantized magnitude: as many below zero as above."""


@dataclass(frozen=True, eq=False)
class Int4:
    """A plane of quantized numbers.

    Attributes:
        packed: uint8 [ceil(numel / 2)]: two elements to a byte, the first in the low half, each 8 more than its value.
            compressed-tensors packs them so.
        scales: float32 [ceil(numel / group)].
        group: elements of a group.
        shape: the tensor's.
        error: see `Plane`.
    """

    packed: Tensor
    scales: Tensor
    group: int
    shape: tuple[int, ...]
    error: float | None = None
    format = "int4"

    @classmethod
    def encode(cls, delta: Tensor, group: int = 32) -> Int4:
        """Quantize a float32 delta.

        Raises:
            ValueError: a group that is no power of two from 32 to 1024.
        """
        quantized, scales = quantize(delta, group, LIMIT)
        halves = (quantized + 8).to(torch.uint8)
        if halves.numel() % 2:
            halves = torch.cat([halves, halves.new_full((1,), 8)])
        packed = halves[0::2] | (halves[1::2] << 4)
        return cls(packed, scales, group, tuple(delta.shape))

    def tensors(self) -> Mapping[str, Tensor]:
        """Named as compressed-tensors names them."""
        return {"_packed": self.packed, "_scale": self.scales}

    def like(self, tensors: Mapping[str, Tensor]) -> Int4:
        """See `Plane`."""
        return Int4(tensors["_packed"], tensors["_scale"], self.group, self.shape, self.error)

    def decode(self) -> Tensor:
        """Float32 of the tensor's shape."""
        halves = torch.stack([self.packed & 15, self.packed >> 4], dim=1).view(-1)
        numel = math.prod(self.shape)
        return scaled(halves[:numel].float() - 8, self.scales, self.group).view(self.shape)

    def add_to(self, merged: Tensor, weight: Tensor) -> None:
        """See `Plane`."""
        merged += by_row(weight, self.shape) * self.decode()

    def inner(self, gradient: Tensor) -> Tensor:
        """See `Plane`."""
        return torch.dot(gradient.double().flatten(), self.decode().double().flatten())

    def memory(self) -> Memory:
        """See `Plane`."""
        return Memory("int4", "F32", self.packed.data_ptr(), self.scales.data_ptr(), self.group)
