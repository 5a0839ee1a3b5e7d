"""The methods' heavy passes in C++: masks and sums over mapped tensors of any size, in memory of a few chunks.

Every function gives what its plain definition in this room gives; see csrc/src/core/methods.h.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from paretofuse.engine.extension import _C, thread_count
from paretofuse.engine.layout import MERGED_DTYPES
from paretofuse.engine.methods.numbers import Numbers
from paretofuse.engine.methods.random import Key

Bits = npt.NDArray[np.uint8]
"""A mask with a bit for each element, the low ones first."""

_CODES = {name: code for code, name in enumerate(MERGED_DTYPES)}


@dataclass(frozen=True)
class Thinned:
    """Which elements of a difference stay (None for all), and the sums of all and of these elements' magnitudes."""

    mask: Bits | None
    before: float
    after: float


ALL = Thinned(None, 0.0, 0.0)


def can(numbers: Sequence[Numbers | None]) -> bool:
    """Whether these can be worked on here: not empty, and of the three dtypes that merges know."""
    return all(own is None or (own.dtype in _CODES and own.numel > 0) for own in numbers)


def keep_largest(model: Numbers, base: Numbers, first: int, count: int, threads: int | None) -> Thinned:
    """`count` of the difference's elements by magnitude, the largest first, after leaving out the `first` ones."""
    mask = _mask_for(base)
    sums = _C.keep_largest(
        _address(model),
        _address(base),
        base.numel,
        mask,
        first=first,
        count=count,
        threads=thread_count(threads),
        isa="",
    )
    return Thinned(mask, *sums)


def keep_drawn(model: Numbers, base: Numbers, key: Key, threshold: int, threads: int | None) -> Thinned:
    """Elements whose number is below the threshold."""
    mask = _mask_for(base)
    sums = _C.keep_drawn(
        _address(model), _address(base), base.numel, mask, key=key, threshold=threshold, threads=thread_count(threads),
        isa="",
    )  # fmt: skip
    return Thinned(mask, *sums)


def keep_ranked(
    model: Numbers, base: Numbers, columns: int, key: Key, low: float, rise: float, threads: int | None
) -> Thinned:
    """Elements whose number is below a threshold that rises with their rank in their row."""
    mask = _mask_for(base)
    sums = _C.keep_ranked(
        _address(model), _address(base), base.numel, mask, columns=columns, key=key, low=low, rise=rise,
        threads=thread_count(threads), isa="",
    )  # fmt: skip
    return Thinned(mask, *sums)


def merge_differences(
    base: Numbers,
    models: Sequence[Numbers],
    masks: Sequence[Bits | None],
    scales: Sequence[float],
    weights: Sequence[float],
    out: Numbers,
    *,
    elects: bool,
    normalizes: bool,
    scale: float,
    threads: int | None,
) -> None:
    """out = base + scale * sum_k mask_k scales_k weights_k (model_k - base), divided and elected as asked."""
    shares = [
        (*_address(model), mask, own, weight)
        for model, mask, own, weight in zip(models, masks, scales, weights, strict=True)
    ]
    _C.merge_differences(
        _address(base), shares, base.numel, _address(out), elects=elects, normalizes=normalizes, scale=scale,
        threads=thread_count(threads), isa="",
    )  # fmt: skip


def products(
    base: Numbers | None, models: Sequence[Numbers], columns: int, threads: int | None
) -> npt.NDArray[np.float64]:
    """Inner products of the models' rows (less the base's) with each other: [rows, K, K]."""
    addresses = [_address(model) for model in models]
    none = (0, 0)
    return _C.products(
        none if base is None else _address(base), addresses, models[0].numel, columns=columns,
        threads=thread_count(threads), isa="",
    )  # fmt: skip


def combine(
    models: Sequence[Numbers], coefficients: npt.NDArray[np.float64], out: Numbers, threads: int | None
) -> None:
    """out = sum_k c_k model_k, rounded once.

    Args:
        models: K tensors.
        coefficients: [K], or [rows, K] for one of each of the tensor's rows (of its last axis).
        out: where to write.
    """
    coefficients = coefficients[0] if len(coefficients) == 1 and coefficients.ndim == 2 else coefficients
    first, count = models[0], len(models)
    per_row = coefficients.ndim == 2
    weights = np.zeros(count) if per_row else coefficients
    # The kernel adds to a base, which here is the first model: that counts one less.
    less = np.eye(1, count)[0]
    rows = None
    columns = first.numel
    if per_row:
        columns = first.numel // len(coefficients)
        rows = np.ascontiguousarray((coefficients - less).T, np.float32)
    plan = _C.MergePlan(
        base=np.array([first.address], np.uint64),
        planes=_dense(models),
        lengths=np.array([first.numel], np.int64),
        rows=np.zeros(1, np.int64),
        columns=np.array([columns], np.int64),
        dtypes=np.array([[_CODES[first.dtype], _CODES[out.dtype]]], np.uint8),
        plane_count=count,
        row_count=1,
    )
    plan.run(
        np.ascontiguousarray((weights - (0 if per_row else less))[None, None], np.float32),
        np.array([[out.address]], np.uint64),
        row_weights=None if rows is None else np.array([[rows.ctypes.data]], np.uint64),
        threads=thread_count(threads),
        isa="",
    )


def _dense(models: Sequence[Numbers]) -> _C.Planes:
    """The models as dense planes [1, K]."""
    shape = (1, len(models))
    return _C.Planes(
        values=np.array([model.address for model in models], np.uint64).reshape(shape),
        factors=np.zeros(shape, np.uint64),
        sizes=np.zeros(shape, np.int64),
        formats=np.zeros(shape, np.uint8),
        dtypes=np.array([_CODES[model.dtype] for model in models], np.uint8).reshape(shape),
    )


def _mask_for(numbers: Numbers) -> Bits:
    return np.empty((numbers.numel + 7) // 8, np.uint8)


def _address(numbers: Numbers) -> tuple[int, int]:
    return numbers.address, _CODES[numbers.dtype]
