"""Dense planes: a number for each element, in float32, bfloat16 or float16."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from paretofuse.engine.dtypes import TO_NAME
from paretofuse.engine.planes.memory import Memory
from paretofuse.engine.planes.plane import column_sums, row_sums
from paretofuse.kernels.reference import spread


@dataclass(frozen=True, eq=False)
class Dense:
    """A plane as it is.

    Attributes:
        values: of the tensor's shape; contiguous.
        error: see `Plane`.
    """

    values: Tensor
    error: float | None = None
    format = "dense"

    @classmethod
    def encode(cls, delta: Tensor, dtype: torch.dtype) -> Dense:
        """Round a float32 delta to a dtype."""
        return cls(delta.to(dtype).contiguous())

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's."""
        return tuple(self.values.shape)

    def tensors(self) -> Mapping[str, Tensor]:
        """The values, under the tensor's own name."""
        return {"": self.values}

    def like(self, tensors: Mapping[str, Tensor]) -> Dense:
        """See `Plane`."""
        return Dense(tensors[""], self.error)

    def decode(self) -> Tensor:
        """Float32 of the tensor's shape."""
        return self.values.float()

    def add_to(self, merged: Tensor, weight: Tensor) -> None:
        """See `Plane`."""
        merged += spread(weight, self.shape) * self.values.float()

    def inner(self, gradient: Tensor) -> Tensor:
        """See `Plane`."""
        return torch.dot(gradient.double().flatten(), self.values.double().flatten())

    def inner_rows(self, gradient: Tensor) -> Tensor:
        """See `Plane`."""
        return row_sums(gradient, self.decode())

    def inner_columns(self, gradient: Tensor) -> Tensor:
        """See `Plane`."""
        return column_sums(gradient, self.decode())

    def memory(self) -> Memory:
        """See `Plane`."""
        return Memory("dense", TO_NAME[self.values.dtype], self.values.data_ptr())
