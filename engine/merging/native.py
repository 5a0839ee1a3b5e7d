"""The native CPU backend: the only caller of the C++ extension.

Everything goes by address, so that mapped files, NumPy arrays and tensors of any framework merge alike. The
caller keeps the memory alive, outputs apart from inputs and from each other, and the lengths right: addresses
cannot be checked. All calls release the GIL. They use `threads` threads; unless told, as many as this process
may use.

`isa` forces an instruction set ("avx512", "avx2", "neon", "scalar"); without it the environment variable
PARETOFUSE_ISA, read at each call, decides, and without that the best one of this machine. Results are the
same bits whatever the threads and the instruction set.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

try:
    from paretofuse import _C
except ImportError as error:
    raise ImportError(
        f"ParetoFuse's native extension could not be loaded ({error}). Build it with `pip install .` (or "
        "`pip install -e .` in a checkout), which needs a C++17 compiler with OpenMP"
    ) from error

_DTYPE_CODES = {"F32": 0, "BF16": 1, "F16": 2}


class MergePlan:
    """The table of a model's tensors; merges the whole model in one call.

    Args:
        base: address of each of the S base tensors.
        deltas: for each tensor the addresses of its E deltas; 0 where the expert leaves the tensor unchanged.
        lengths: elements of each tensor.
        rows: row of the weights that each tensor takes.
        base_dtypes: "F32", "BF16" or "F16" for each tensor, and so on in any mix.
        delta_dtypes: dtype of each tensor's deltas.
        out_dtypes: dtype of each merged tensor.
        experts: E.
        row_count: rows of the weights.

    Raises:
        ValueError: lists of different lengths, an unknown dtype, a row out of range, a null base.
    """

    def __init__(
        self,
        *,
        base: Sequence[int],
        deltas: Sequence[Sequence[int]],
        lengths: Sequence[int],
        rows: Sequence[int],
        base_dtypes: Sequence[str],
        delta_dtypes: Sequence[str],
        out_dtypes: Sequence[str],
        experts: int,
        row_count: int,
    ) -> None:
        count = len(base)
        for name, values in (
            ("deltas", deltas),
            ("lengths", lengths),
            ("rows", rows),
            ("base_dtypes", base_dtypes),
            ("delta_dtypes", delta_dtypes),
            ("out_dtypes", out_dtypes),
        ):
            if len(values) != count:
                raise ValueError(
                    f"{name}: got {len(values)} entries, expected {count}, one for each base tensor"
                )
        for s, row in enumerate(deltas):
            if len(row) != experts:
                raise ValueError(
                    f"deltas: got {len(row)} addresses for tensor {s}, expected {experts} (experts)"
                )
        dtypes = zip(base_dtypes, delta_dtypes, out_dtypes, strict=True)
        codes = [[_dtype_code(dtype) for dtype in trio] for trio in dtypes]
        self._shape = (row_count, experts)
        self._count = count
        self._plan = _C.MergePlan(
            base=np.asarray(base, np.uint64),
            deltas=np.asarray(deltas, np.uint64).reshape(count, experts),
            lengths=np.asarray(lengths, np.int64),
            rows=np.asarray(rows, np.int64),
            dtypes=np.asarray(codes, np.uint8).reshape(count, 3),
            experts=experts,
            row_count=row_count,
        )

    def run(
        self,
        weights: npt.NDArray[np.float32],
        out: Sequence[Sequence[int]] | npt.NDArray[np.uint64],
        *,
        threads: int | None = None,
        isa: str | None = None,
    ) -> str:
        """Write out[k][s] = base[s] + sum over e of weights[k, rows[s], e] * deltas[s][e], rounded once.

        Args:
            weights: [K, row_count, E], float32, C-contiguous. An expert with weight 0 is not read.
            out: addresses [K, S]; a uint64 array is taken as it is, so callers may keep one.
            threads: how many threads.
            isa: the instruction set, see the module.

        Returns:
            The name of the instruction set that ran.

        Raises:
            TypeError: weights of another dtype.
            ValueError: a wrong shape, an output that is null or overlaps its inputs, an unusable instruction
                set. Nothing has been written then.
        """
        if not isinstance(weights, np.ndarray) or weights.dtype != np.float32:
            got = weights.dtype if isinstance(weights, np.ndarray) else type(weights).__name__
            raise TypeError(f"weights: got {got}, expected a float32 NumPy array")
        if weights.shape[1:] != self._shape or not weights.flags.c_contiguous:
            rows, experts = self._shape
            raise ValueError(
                f"weights: got shape {weights.shape} (C-contiguous: {weights.flags.c_contiguous}), "
                f"expected a C-contiguous array (K, {rows}, {experts})"
            )
        table = np.ascontiguousarray(out, np.uint64)
        if table.shape != (len(weights), self._count):
            raise ValueError(
                f"out: got shape {table.shape}, expected {(len(weights), self._count)}: [K, tensors]"
            )
        return self._plan.run(weights, table, threads=_threads(threads), isa=isa or "")


def inner(
    grad: int,
    deltas: Sequence[int],
    length: int,
    *,
    grad_dtype: str,
    delta_dtype: str,
    threads: int | None = None,
    isa: str | None = None,
) -> npt.NDArray[np.float64]:
    """The inner products of one gradient with E deltas: float64 [E], the sums of grad[i] * delta[e][i].

    Args:
        grad: address of the gradient.
        deltas: addresses of the E deltas; 0 (unchanged) gives 0.
        length: elements of the gradient and of each delta.
        grad_dtype: "F32", "BF16" or "F16".
        delta_dtype: likewise.
        threads: how many threads; the result does not depend on it.
        isa: the instruction set, see the module; neither on this.

    Raises:
        ValueError: no deltas, a negative length, a null gradient, an unknown dtype or instruction set.
    """
    return _C.inner(
        grad,
        np.asarray(deltas, np.uint64),
        length,
        grad_dtype=_dtype_code(grad_dtype),
        delta_dtype=_dtype_code(delta_dtype),
        threads=_threads(threads),
        isa=isa or "",
    )


def copy(dst: int, src: int, nbytes: int, *, threads: int | None = None, isa: str | None = None) -> None:
    """Copy bytes with the stores that merges use: the yardstick of their speed. No overlap, please."""
    _C.copy(dst, src, nbytes, threads=_threads(threads), isa=isa or "")


def instruction_sets() -> dict[str, bool]:
    """Every instruction set there is code for, in order of preference: can this machine use it?"""
    return dict(_C.instruction_sets())


def chosen_isa(isa: str | None = None) -> str:
    """The instruction set that a call with this `isa` would use now.

    Raises:
        ValueError: it, or PARETOFUSE_ISA, names one that this machine lacks; the message lists those it has.
    """
    return _C.chosen_isa(isa or "")


def _threads(threads: int | None) -> int:
    if threads is not None:
        return threads
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _dtype_code(dtype: str) -> int:
    if dtype not in _DTYPE_CODES:
        raise ValueError(f"dtype: got {dtype!r}, expected one of {', '.join(_DTYPE_CODES)}")
    return _DTYPE_CODES[dtype]
