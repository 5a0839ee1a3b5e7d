"""A plane as the C++ core reads it: addresses and sizes. No torch."""

from __future__ import annotations

from typing import NamedTuple


class Memory(NamedTuple):
    """One plane by address; whoever holds it keeps the memory alive.

    Attributes:
        format: "dense", "int8", "int4" or "lowrank".
        dtype: "F32", "BF16" or "F16": of dense values, and of both low-rank factors.
        values: address of the values; of A [rank, columns] where it is of low rank. 0: the tensor is unchanged.
        factors: address of the float32 scales, or of B [rows, rank].
        size: elements of a group, or the rank.
    """

    format: str
    dtype: str
    values: int
    factors: int = 0
    size: int = 0
