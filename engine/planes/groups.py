"""Groups of neighbouring elements that share one scale: what int8 and int4 planes have in common.

    value[i] = quantized[i] * scale[i // group]        scale = largest magnitude in the group / limit

Groups follow the tensor's memory, row after row; the last one may be shorter. A group is a power of two from 32 on and
divides the tile of 1024, so that a tile has whole groups.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from paretofuse.engine.layout import TILE
from paretofuse.engine.planes.memory import Memory
from paretofuse.engine.planes.plane import column_sums, row_sums
from paretofuse.kernels.reference import spread

SMALLEST = 32
"""Elements that the kernels take at a time: a step never crosses from one scale to the next."""

_BLOCK = 1 << 18
"""Elements that are quantized or widened at a time: whole groups, and little memory beside the tensor itself."""


@dataclass(frozen=True, eq=False)
class Quantized(ABC):
    """A plane of quantized numbers; the formats say how they are packed.

    Attributes:
        packed: the quantized numbers.
        scales: float32 [ceil(numel / group)], 0 for a group of zeros.
        group: elements of a group.
        shape: the tensor's.
        error: see `Plane`.
    """

    packed: Tensor
    scales: Tensor
    group: int
    shape: tuple[int, ...]
    error: float | None = None
    format: ClassVar[str]
    limit: ClassVar[int]
    """The largest quantized magnitude: as many below zero as above."""
    per_byte: ClassVar[int]
    """Numbers in a byte."""

    @staticmethod
    @abstractmethod
    def pack(quantized: Tensor) -> Tensor:
        """Whole numbers from -limit to limit, float32 [n], packed [ceil(n / per_byte)]."""

    @staticmethod
    @abstractmethod
    def unpack(packed: Tensor) -> Tensor:
        """The whole numbers, float32 [n], or one more."""

    @classmethod
    def encode(cls, delta: Tensor, group: int) -> Quantized:
        """Quantize a float32 delta, to nearest even.

        Raises:
            ValueError: a group that is no power of two from 32 to 1024.
        """
        if group < SMALLEST or group > TILE or group & (group - 1):
            raise ValueError(
                f"got groups of {group} elements, expected a power of two from {SMALLEST} to {TILE}"
            )
        packed, scales = [], []
        for block in delta.reshape(-1).split(_BLOCK):
            groups = F.pad(block, (0, -block.numel() % group)).view(-1, group)  # [groups, group]
            scale = groups.abs().amax(1) / cls.limit  # [groups]
            units = groups / scale.where(scale > 0, 1.0).unsqueeze(1)
            packed.append(cls.pack(units.round_().clamp_(-cls.limit, cls.limit).view(-1)[: block.numel()]))
            scales.append(scale)
        return cls(torch.cat(packed), torch.cat(scales), group, tuple(delta.shape))

    def tensors(self) -> Mapping[str, Tensor]:
        """Named as compressed-tensors names them."""
        return {"_packed": self.packed, "_scale": self.scales}

    def like(self, tensors: Mapping[str, Tensor]) -> Quantized:
        """See `Plane`."""
        return replace(self, packed=tensors["_packed"], scales=tensors["_scale"])

    def decode(self) -> Tensor:
        """Float32 of the tensor's shape."""
        values = self.scales.new_empty(math.prod(self.shape))
        for start, block in self._blocks():
            values[start : start + block.numel()] = block
        return values.view(self.shape)

    def _blocks(self) -> Iterator[tuple[int, Tensor]]:
        """The plane's flat blocks, float32, each with its first element's place."""
        numel, group = math.prod(self.shape), self.group
        for start in range(0, numel, _BLOCK):
            count = min(_BLOCK, numel - start)
            numbers = self.unpack(self.packed[start // self.per_byte : -(-(start + count) // self.per_byte)])
            groups = F.pad(numbers[:count], (0, -count % group)).view(-1, group)
            scales = self.scales[start // group : -(-(start + count) // group)]
            yield start, (groups * scales.unsqueeze(1)).view(-1)[:count]

    def add_to(self, merged: Tensor, weight: Tensor) -> None:
        """See `Plane`."""
        merged += spread(weight, self.shape) * self.decode()

    def inner(self, gradient: Tensor) -> Tensor:
        """See `Plane`."""
        return torch.dot(gradient.double().flatten(), self.decode().double().flatten())

    def inner_rows(self, gradient: Tensor) -> Tensor:
        """See `Plane`."""
        return row_sums(gradient, self.decode())

    def inner_columns(self, gradient: Tensor) -> Tensor:
        """See `Plane`."""
        return column_sums(gradient, self.decode())

    def memory(self) -> Memory:
        """See `Plane`."""
        return Memory(self.format, "F32", self.packed.data_ptr(), self.scales.data_ptr(), self.group)
