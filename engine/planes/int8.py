"""Int8 planes: one byte for each element, and a scale for each group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from paretofuse.engine.planes.groups import quantize, scaled
from paretofuse.engine.planes.memory import Memory
from paretofuse.engine.planes.plane import by_row

LIMIT = 127
"""The largest quantized magnitude: as many below zero as above."""


@dataclass(frozen=True, eq=False)
class Int8:
    """A plane of quantized numbers.

    Attributes:
        packed: int8 [numel].
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
    format = "int8"

    @classmethod
    def encode(cls, delta: Tensor, group: int = 1024) -> Int8:
        """Quantize a float32 delta.

        Raises:
            ValueError: a group that is no power of two from 32 to 1024.
        """
        quantized, scales = quantize(delta, group, LIMIT)
        return cls(quantized.to(torch.int8), scales, group, tuple(delta.shape))

    def tensors(self) -> Mapping[str, Tensor]:
        """Named as compressed-tensors names them."""
        return {"_packed": self.packed, "_scale": self.scales}

    def like(self, tensors: Mapping[str, Tensor]) -> Int8:
        """See `Plane`."""
        return Int8(tensors["_packed"], tensors["_scale"], self.group, self.shape, self.error)

    def decode(self) -> Tensor:
        """Float32 of the tensor's shape."""
        return scaled(self.packed, self.scales, self.group).view(self.shape)

    def add_to(self, merged: Tensor, weight: Tensor) -> None:
        """See `Plane`."""
        merged += by_row(weight, self.shape) * self.decode()

    def inner(self, gradient: Tensor) -> Tensor:
        """See `Plane`."""
        return torch.dot(gradient.double().flatten(), self.decode().double().flatten())

    def memory(self) -> Memory:
        """See `Plane`."""
        return Memory("int8", "F32", self.packed.data_ptr(), self.scales.data_ptr(), self.group)
