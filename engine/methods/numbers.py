"""A tensor's numbers: as files hold them, and as NumPy computes with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from paretofuse.engine.layout import ITEM_SIZE

Floats = npt.NDArray[np.floating]
"""float32, or float64 where a tensor is stored so."""

_STORED = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
"""How NumPy sees what a file holds; it has no bfloat16."""

FLOATS = tuple(_STORED)
"""The dtypes that methods compute with."""


@dataclass(frozen=True)
class Numbers:
    """One tensor as it is stored.

    Attributes:
        dtype: its safetensors dtype.
        shape: its shape.
        data: its bytes, a flat uint8 array.
        drop: lets the system drop the pages of the bytes between two places, where they are mapped from a file.
    """

    dtype: str
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]
    drop: Callable[[int, int], None] | None = None

    @classmethod
    def empty(cls, dtype: str, shape: Sequence[int]) -> Numbers:
        """New memory for a tensor."""
        return cls(dtype, tuple(shape), np.empty(math.prod(shape) * ITEM_SIZE[dtype], np.uint8))

    @classmethod
    def of(cls, values: Floats, dtype: str) -> Numbers:
        """Floats, rounded to a dtype."""
        numbers = cls.empty(dtype, values.shape)
        numbers.store(values)
        return numbers

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def address(self) -> int:
        """Where its bytes lie."""
        return int(self.data.ctypes.data)

    @property
    def is_float(self) -> bool:
        """Whether methods can compute with it."""
        return self.dtype in _STORED

    def floats(self) -> Floats:
        """The numbers, shaped: float64 where they are stored so, else a float32 copy that is exact."""
        stored = self.data.view(_STORED[self.dtype]).reshape(self.shape)
        if self.dtype == "BF16":
            return (stored.astype(np.uint32) << 16).view(np.float32)
        return stored.astype(np.float64 if self.dtype == "F64" else np.float32)

    def store(self, values: Floats) -> None:
        """Write floats of this shape into the memory, each rounded to nearest even."""
        stored = self.data.view(_STORED[self.dtype]).reshape(self.shape)
        if self.dtype != "BF16":
            with np.errstate(over="ignore"):  # what no float16 can hold becomes infinite, as everywhere
                stored[...] = values
            return
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
        nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        stored[...] = np.where(nan, (bits >> 16) | np.uint32(0x40), rounded).reshape(self.shape)

    def slice(self, start: int, stop: int) -> Numbers:
        """Elements start to stop as a flat tensor of the same memory."""
        size = ITEM_SIZE[self.dtype]
        return Numbers(self.dtype, (stop - start,), self.data[start * size : stop * size])

    def release(self, start: int = 0, stop: int | None = None) -> None:
        """Say that the elements start to stop are not needed for now: mapped ones are read again when touched."""
        if self.drop is not None:
            size = ITEM_SIZE[self.dtype]
            self.drop(start * size, (self.numel if stop is None else stop) * size)

    def rounded_to(self, dtype: str) -> Numbers:
        """The same numbers in a dtype; itself where it has it."""
        return self if self.dtype == dtype else Numbers.of(self.floats(), dtype)


def promoted(dtypes: Sequence[str]) -> str:
    """The smallest dtype that holds numbers of all of these, as torch promotes floats."""
    kinds = set(dtypes)
    if len(kinds) == 1:
        return next(iter(kinds))
    return "F64" if "F64" in kinds else "F32"
