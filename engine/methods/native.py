"""The methods' heavy passes in C++: masks and sums over mapped tensors of any size, in memory of a few chunks.

Every function gives what its plain definition in this room gives; see csrc/src/core/methods.h.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from paretofuse.engine.extension import _C, thread_count
from paretofuse.engine.layout import MERGED_DTYPES
from paretofuse.engine.methods.numbers import Numbers
from paretofuse.engine.methods.random import Key

Bits = npt.NDArray[np.uint8]
"""A mask with a bit for each element, the low ones first."""

SLICE = 1 << 20
"""Elements that whole passes work on before the pages of mapped tensors are let go."""

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
    model.release()
    return Thinned(mask, *sums)


def keep_drawn(model: Numbers, base: Numbers, key: Key, threshold: int, threads: int | None) -> Thinned:
    """Elements whose number is below the threshold."""
    mask = _mask_for(base)
    sums = _C.keep_drawn(
        _address(model), _address(base), base.numel, mask, key=key, threshold=threshold, threads=thread_count(threads),
        isa="",
    )  # fmt: skip
    model.release()
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
    model.release()
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
    for start, stop in _slices(base.numel, SLICE, [base, *models]):
        cut = base.slice(start, stop)
        shares = [
            (
                *_address(model.slice(start, stop)),
                None if mask is None else mask[start // 8 : -(-stop // 8)],
                own,
                weight,
            )
            for model, mask, own, weight in zip(models, masks, scales, weights, strict=True)
        ]
        _C.merge_differences(
            _address(cut), shares, cut.numel, _address(out.slice(start, stop)), elects=elects, normalizes=normalizes,
            scale=scale, threads=thread_count(threads), isa="",
        )  # fmt: skip


def products(
    base: Numbers | None, models: Sequence[Numbers], columns: int, threads: int | None
) -> npt.NDArray[np.float64]:
    """Inner products of the models' rows (less the base's) with each other: [rows, K, K]."""
    numel, inputs = models[0].numel, [*models, *([] if base is None else [base])]
    whole = columns == numel
    found = []
    for start, stop in _slices(numel, SLICE if whole else -(-SLICE // columns) * columns, inputs):
        found.append(
            _C.products(
                (0, 0) if base is None else _address(base.slice(start, stop)),
                [_address(model.slice(start, stop)) for model in models],
                stop - start,
                columns=stop - start if whole else columns,
                threads=thread_count(threads),
                isa="",
            )
        )
    summed: npt.NDArray[np.float64] = np.sum(found, axis=0) if whole else np.concatenate(found)
    return summed


def combine(
    models: Sequence[Numbers], coefficients: npt.NDArray[np.float64], out: Numbers, threads: int | None
) -> None:
    """out = sum_k c_k model_k, rounded once.

    Args:
        models: K tensors.
        coefficients: [K], or [rows, K] for one of each of the tensor's rows (of its last axis).
        out: where to write.
    """
    by_row = coefficients.ndim == 2 and len(coefficients) > 1
    columns = models[0].numel // len(coefficients) if by_row else 1
    step = -(-SLICE // columns) * columns
    for start, stop in _slices(models[0].numel, step, models):
        own = coefficients[start // columns : stop // columns] if by_row else coefficients.reshape(-1)
        _combine([model.slice(start, stop) for model in models], own, out.slice(start, stop), threads)


def _combine(
    models: Sequence[Numbers], coefficients: npt.NDArray[np.float64], out: Numbers, threads: int | None
) -> None:
    """The same of a slice. The kernel adds to a base, which here is the first model: that counts one less."""
    first, count = models[0], len(models)
    less = np.eye(1, count)[0]
    rows, weights, columns = None, coefficients - less, first.numel
    if coefficients.ndim == 2:
        rows, weights = np.ascontiguousarray(weights.T, np.float32), np.zeros(count)
        columns = first.numel // len(coefficients)
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
        np.ascontiguousarray(weights[None, None], np.float32),
        np.array([[out.address]], np.uint64),
        row_weights=None if rows is None else np.array([[rows.ctypes.data]], np.uint64),
        threads=thread_count(threads),
        isa="",
    )


def _slices(numel: int, step: int, inputs: Sequence[Numbers]) -> Iterator[tuple[int, int]]:
    """Starts and ends of slices; each one's inputs are let go before the next."""
    for start in range(0, numel, step):
        stop = min(numel, start + step)
        yield start, stop
        for own in inputs:
            own.release(start, stop)


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
