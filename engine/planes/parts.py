"""Planes taken apart and put together: for operators, which know tensors and numbers only, and for blocks of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from paretofuse.engine.layout import columns_of
from paretofuse.engine.planes.dense import Dense
from paretofuse.engine.planes.groups import Quantized
from paretofuse.engine.planes.int4 import Int4
from paretofuse.engine.planes.int8 import Int8
from paretofuse.engine.planes.lowrank import LowRank
from paretofuse.engine.planes.plane import Plane


def parts_of(plane: Plane) -> tuple[Tensor, Tensor, int]:
    """Values, factors (empty where there are none) and group or rank."""
    if isinstance(plane, Dense):
        return plane.values, plane.values.new_empty(0), 0
    if isinstance(plane, LowRank):
        return plane.a, plane.b, plane.rank
    assert isinstance(plane, Quantized)
    return plane.packed, plane.scales, plane.group


def plane_from(
    values: Tensor, factors: Tensor, size: int, shape: tuple[int, ...], error: float | None = None
) -> Plane:
    """The plane of these parts; the dtype of the values tells which format it is."""
    if size == 0:
        return Dense(values, error)
    if values.dtype == torch.int8:
        return Int8(values, factors, size, shape, error)
    if values.dtype == torch.uint8:
        return Int4(values, factors, size, shape, error)
    return LowRank(factors, values, shape, error)


def part_of(plane: Plane, first: int, last: int) -> Plane:
    """Rows first .. last of a plane, as a view; a quantized one whose groups do not end there is decoded."""
    columns = columns_of(plane.shape)
    shape = (last - first, *plane.shape[1:])
    if isinstance(plane, LowRank):
        return plane.part(first, last)
    if isinstance(plane, Quantized) and first * columns % plane.group == 0:
        start, stop = first * columns, last * columns
        packed = plane.packed[start // plane.per_byte : -(-stop // plane.per_byte)]
        scales = plane.scales[start // plane.group : -(-stop // plane.group)]
        return type(plane)(packed, scales, plane.group, shape)
    values = plane.values if isinstance(plane, Dense) else plane.decode()
    return Dense(values[first:last])
