"""What every format of a plane can do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from paretofuse.engine.planes.memory import Memory

_BLOCK = 1 << 16
"""Elements whose errors are measured at a time, in float64."""


Sums = Literal["whole", "row", "row and column"]
"""Which products of a gradient with planes are wanted: of the whole tensor, each row's, or each row's and column's."""


def sums_shape(by: Sums, rows: int, columns: int) -> tuple[int, ...]:
    """The shape of one plane's sums over a tensor of so many rows and columns."""
    return {"whole": (), "row": (rows,), "row and column": (rows + columns,)}[by]


class Plane(Protocol):
    """What one expert adds to one tensor: frozen numbers in one of the formats of this room.

    Attributes:
        format: "dense", "int8", "int4" or "lowrank".
        shape: the tensor's.
        error: relative error of the merged update, ||round(base + w plane) - base - w delta|| / ||w delta||, in the
            merged dtype; None where it was not measured. w = 1 / sqrt(P): one plane weighted so is as large as P unlike
            ones at equal weights 1 / P, and so is its error.
    """

    @property
    def format(self) -> str:
        """Its format."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's."""
        ...

    @property
    def error(self) -> float | None:
        """Of the merged update."""
        ...

    def tensors(self) -> Mapping[str, Tensor]:
        """What it holds, by the ending that a store adds to the tensor's name."""
        ...

    def like(self, tensors: Mapping[str, Tensor]) -> Plane:
        """The same plane of copies of its tensors (on another device)."""
        ...

    def decode(self) -> Tensor:
        """All its numbers, float32 of the tensor's shape."""
        ...

    def add_to(self, merged: Tensor, weight: Tensor) -> None:
        """The plain reference of a merge: merged += weight * plane, in place.

        Args:
            merged: float32 of the tensor's shape, contiguous.
            weight: float32 [], [rows] or, of a matrix, [rows + columns], as `kernels.reference.spread` takes it.
        """
        ...

    def inner(self, gradient: Tensor) -> Tensor:
        """The plain reference of the routing weights' gradient: <gradient, plane> in float64, []."""
        ...

    def inner_rows(self, gradient: Tensor) -> Tensor:
        """The same for each row of the tensor, float64 [rows]."""
        ...

    def inner_columns(self, gradient: Tensor) -> Tensor:
        """The same for each column of a matrix, float64 [columns]."""
        ...

    def memory(self) -> Memory:
        """Itself by address, for the C++ core."""
        ...


@dataclass(frozen=True)
class PlaneInfo:
    """What is worth telling of a plane: see `Plane`."""

    format: str
    nbytes: int
    error: float | None


def nbytes(plane: Plane) -> int:
    """Bytes of everything that a plane holds."""
    return sum(tensor.numel() * tensor.element_size() for tensor in plane.tensors().values())


def to(plane: Plane, device: torch.device) -> Plane:
    """The plane on a device; itself where it lies there already."""
    tensors = plane.tensors()
    if all(tensor.device == device for tensor in tensors.values()):
        return plane
    return plane.like({name: tensor.to(device) for name, tensor in tensors.items()})


def row_sums(gradient: Tensor, decoded: Tensor) -> Tensor:
    """sum over a row of gradient * decoded, for each row: float64 [rows]."""
    products = gradient.double() * decoded.double()
    return products.flatten(1).sum(1) if products.dim() > 1 else products.sum().view(1)


def column_sums(gradient: Tensor, decoded: Tensor) -> Tensor:
    """sum over a column of gradient * decoded, for each column of a matrix: float64 [columns]."""
    return (gradient.double() * decoded.double()).sum(0)


def memories(planes: Sequence[Plane | None]) -> list[Memory | None]:
    """Planes by address, for the C++ core; None stays None."""
    return [None if plane is None else plane.memory() for plane in planes]


def merged_tensor(
    base: Tensor, planes: Sequence[Plane | None], weights: Tensor, dtype: torch.dtype
) -> Tensor:
    """The plain reference of a merge: base + sum_j weights[j] * planes[j] in float32, rounded once.

    Args:
        base: any shape.
        planes: None where an expert leaves the tensor unchanged.
        weights: [P], [P, rows] or [P, rows + columns], each as `kernels.reference.spread` takes it.
        dtype: of the result.

    Returns:
        A new tensor of the base's shape.
    """
    merged = base.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    for weight, plane in zip(weights.to(torch.float32), planes, strict=True):
        if plane is not None:
            plane.add_to(merged, weight)
    return merged.to(dtype)


def merged_error(base: Tensor, delta: Tensor, decoded: Tensor, dtype: torch.dtype, weight: float) -> float:
    """The relative error of a merged update; see `Plane.error`.

    Args:
        base: the base tensor.
        delta: float32, what the expert adds, of the base's shape.
        decoded: float32, what the plane says that it adds.
        dtype: of the merged tensor.
        weight: of the plane.
    """
    wrong = size = 0.0
    blocks = (tensor.reshape(-1).split(_BLOCK) for tensor in (base, delta, decoded))
    for ours, exact, says in zip(*blocks, strict=True):
        wide, update = ours.float(), weight * exact.double()
        merged = (wide + weight * says).to(dtype)
        # Differences of near numbers: exact in float64.
        wrong += float((merged.double() - wide.double() - update).square().sum())
        size += float(update.square().sum())
    return math.sqrt(wrong / size) if size > 0 else 0.0
