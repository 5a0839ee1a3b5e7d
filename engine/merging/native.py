"""The native CPU backend: the merging half of the C++ extension.

Everything goes by address, so that mapped files, NumPy arrays and tensors of any framework merge alike. The
caller keeps the memory alive, outputs apart from inputs and from each other, and the lengths right: addresses
cannot be checked. All calls release the GIL. They use `threads` threads; unless told, as many as this process
may use.

`isa` forces an instruction set ("avx512", "avx2", "neon", "scalar"); without it the environment variable
PARETOFUSE_ISA, read at each call, decides, and without that the best one of this machine. Results are the
same bits whatever the threads and the instruction set.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from paretofuse.engine.extension import _C, thread_count
from paretofuse.engine.planes.memory import Memory

_DTYPE_CODES = {"F32": 0, "BF16": 1, "F16": 2}
_FORMAT_CODES = {"dense": 0, "int8": 1, "int4": 2, "lowrank": 3}


class MergePlan:
    """The table of a model's tensors; merges the whole model in one call.

    Args:
        base: address of each of the S base tensors.
        planes: for each tensor its P planes, of any formats; None where an expert leaves it unchanged.
        lengths: elements of each tensor.
        rows: row of the weights that each tensor takes.
        base_dtypes: "F32", "BF16" or "F16" for each tensor.
        out_dtypes: dtype of each merged tensor.
        plane_count: P.
        row_count: rows of the weights.
        columns: elements of each tensor's own rows, for low-rank planes and coefficients of rows or columns; None
            where a tensor has none of these.

    Raises:
        ValueError: lists of different lengths, an unknown dtype or format, a row out of range, a null base, groups or
            ranks that do not fit.
    """

    def __init__(
        self,
        *,
        base: Sequence[int],
        planes: Sequence[Sequence[Memory | None]],
        lengths: Sequence[int],
        rows: Sequence[int],
        base_dtypes: Sequence[str],
        out_dtypes: Sequence[str],
        plane_count: int,
        row_count: int,
        columns: Sequence[int] | None = None,
    ) -> None:
        count = len(base)
        columns = lengths if columns is None else columns
        for name, values in (
            ("planes", planes),
            ("lengths", lengths),
            ("rows", rows),
            ("columns", columns),
            ("base_dtypes", base_dtypes),
            ("out_dtypes", out_dtypes),
        ):
            if len(values) != count:
                raise ValueError(
                    f"{name}: got {len(values)} entries, expected {count}, one for each base tensor"
                )
        for s, row in enumerate(planes):
            if len(row) != plane_count:
                raise ValueError(f"planes: got {len(row)} for tensor {s}, expected {plane_count}")
        codes = [[_dtype_code(dtype) for dtype in pair] for pair in zip(base_dtypes, out_dtypes, strict=True)]
        self._plan = _C.MergePlan(
            base=np.asarray(base, np.uint64),
            planes=_planes([plane for row in planes for plane in row], (count, plane_count)),
            lengths=np.asarray(lengths, np.int64),
            rows=np.asarray(rows, np.int64),
            columns=np.asarray(columns, np.int64),
            dtypes=np.asarray(codes, np.uint8).reshape(count, 2),
            plane_count=plane_count,
            row_count=row_count,
        )

    def run(
        self,
        weights: npt.NDArray[np.float32],
        out: Sequence[Sequence[int]] | npt.NDArray[np.uint64],
        *,
        row_weights: Sequence[Sequence[int]] | npt.NDArray[np.uint64] | None = None,
        column_weights: Sequence[Sequence[int]] | npt.NDArray[np.uint64] | None = None,
        threads: int | None = None,
        isa: str | None = None,
    ) -> str:
        """Write out[k][s] = base[s] + sum over p of weights[k, rows[s], p] * planes[s][p], rounded once.

        Args:
            weights: [K, row_count, P], float32, C-contiguous. A plane with weight 0 is not read.
            out: addresses [K, S]; a uint64 array is taken as it is, so callers may keep one.
            row_weights: addresses [K, S] of float32 [P, rows of the tensor], added to the weights row by row; 0 adds
                nothing.
            column_weights: addresses [K, S] of float32 [P, columns of the tensor], added to the sums of those column
                by column; 0 adds nothing. Planes of a tensor that has them are read whatever their weights.
            threads: how many threads.
            isa: the instruction set, see the module.

        Returns:
            The name of the instruction set that ran.

        Raises:
            TypeError: weights of another dtype.
            ValueError: a wrong shape, an output that is null or overlaps its inputs, an unusable instruction
                set. Nothing has been written then.
        """
        # What pybind11 would refuse without a word for people; the extension checks the shapes.
        if not isinstance(weights, np.ndarray) or weights.dtype != np.float32:
            got = weights.dtype if isinstance(weights, np.ndarray) else type(weights).__name__
            raise TypeError(f"weights: got {got}, expected a float32 NumPy array")
        if not weights.flags.c_contiguous:
            raise ValueError(
                f"weights: got shape {weights.shape}, not C-contiguous; expected it C-contiguous"
            )
        table = np.ascontiguousarray(out, np.uint64)
        own = [
            None if given is None else np.ascontiguousarray(given, np.uint64)
            for given in (row_weights, column_weights)
        ]
        return self._plan.run(
            weights,
            table,
            row_weights=own[0],
            column_weights=own[1],
            threads=thread_count(threads),
            isa=isa or "",
        )


def inner(
    grad: int,
    planes: Sequence[Memory | None],
    length: int,
    *,
    grad_dtype: str,
    columns: int | None = None,
    by: Literal["whole", "row", "column"] = "whole",
    threads: int | None = None,
    isa: str | None = None,
) -> npt.NDArray[np.float64]:
    """The inner products of one gradient with P planes: float64 [P], the sums of grad[i] * plane[p][i].

    By row, a sum for each row of the tensor: float64 [P, rows]. By column: float64 [P, columns].

    Args:
        grad: address of the gradient.
        planes: the P planes; None (unchanged) gives 0.
        length: elements of the gradient and of each plane.
        grad_dtype: "F32", "BF16" or "F16".
        columns: elements of one of the tensor's rows, for low-rank planes and for sums by row or column.
        by: what has a sum of its own.
        threads: how many threads; the result does not depend on it.
        isa: the instruction set, see the module; neither on this.

    Raises:
        ValueError: no planes, a negative length, a null gradient, an unknown dtype, instruction set or `by`, groups or
            ranks that do not fit.
    """
    return _C.inner(
        grad,
        _planes(planes, (len(planes),)),
        length,
        columns=length if columns is None else columns,
        by=by,
        grad_dtype=_dtype_code(grad_dtype),
        threads=thread_count(threads),
        isa=isa or "",
    )


def copy(dst: int, src: int, nbytes: int, *, threads: int | None = None, isa: str | None = None) -> None:
    """Copy bytes with the stores that merges use: the yardstick of their speed. No overlap, please."""
    _C.copy(dst, src, nbytes, threads=thread_count(threads), isa=isa or "")


def instruction_sets() -> dict[str, bool]:
    """Every instruction set there is code for, in order of preference: can this machine use it?"""
    return dict(_C.instruction_sets())


def chosen_isa(isa: str | None = None) -> str:
    """The instruction set that a call with this `isa` would use now.

    Raises:
        ValueError: it, or PARETOFUSE_ISA, names one that this machine lacks; the message lists those it has.
    """
    return _C.chosen_isa(isa or "")


def _planes(planes: Sequence[Memory | None], shape: tuple[int, ...]) -> _C.Planes:
    """The planes, field by field, in arrays of a shape."""
    absent = Memory("dense", "F32", 0)
    given = [absent if plane is None else plane for plane in planes]
    for plane in given:
        if plane.format not in _FORMAT_CODES:
            raise ValueError(f"format: got {plane.format!r}, expected one of {', '.join(_FORMAT_CODES)}")
    return _C.Planes(
        values=np.array([plane.values for plane in given], np.uint64).reshape(shape),
        factors=np.array([plane.factors for plane in given], np.uint64).reshape(shape),
        sizes=np.array([plane.size for plane in given], np.int64).reshape(shape),
        formats=np.array([_FORMAT_CODES[plane.format] for plane in given], np.uint8).reshape(shape),
        dtypes=np.array([_dtype_code(plane.dtype) for plane in given], np.uint8).reshape(shape),
    )


def _dtype_code(dtype: str) -> int:
    if dtype not in _DTYPE_CODES:
        raise ValueError(f"dtype: got {dtype!r}, expected one of {', '.join(_DTYPE_CODES)}")
    return _DTYPE_CODES[dtype]
