"""What is good about a front beside its hypervolume: evenness, extent, and whether it follows the preference.

Values are [P, M]; `larger` says for each metric whether larger is better. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import moocore
import numpy as np

_EXACT_LIMIT = {6: 1000, 7: 400, 8: 200, 9: 100, 10: 60, 11: 45, 12: 40}
_EXACT_LIMIT_BEYOND = 20
"""Points above which the exact hypervolume of so many metrics takes more than about ten seconds (measured)."""


def exact_hypervolume(values: np.ndarray, ref: Sequence[float], larger: Sequence[bool]) -> float:
    """The hypervolume between the values and a reference point, exactly.

    Raises:
        ValueError: so many points that count, in so many metrics, that it would take minutes or years.
    """
    metrics = values.shape[1]
    signs = np.where(larger, 1.0, -1.0)
    inside = values[((values - np.asarray(ref)) * signs > 0).all(axis=1)]
    limit = _EXACT_LIMIT.get(metrics, _EXACT_LIMIT_BEYOND) if metrics > 5 else len(inside)
    if len(inside) > limit:
        inside = inside[moocore.is_nondominated(inside, maximise=list(larger))]
    if len(inside) > limit:
        raise ValueError(
            f"got {len(inside)} non-dominated points in {metrics} metrics, expected at most {limit} for an exact "
            "hypervolume; use hypervolume_estimate, which also says how far off it may be"
        )
    return float(moocore.hypervolume(inside, ref=list(ref), maximise=list(larger))) if len(inside) else 0.0


def estimate_hypervolume(
    values: np.ndarray, ref: Sequence[float], larger: Sequence[bool], samples: int = 100_000, seed: int = 0
) -> tuple[float, float]:
    """The hypervolume by Monte Carlo, and its standard error.

    The volume of a union of boxes (Karp, Luby and Madras, 1989; for hypervolume: Bringmann and Friedrich, 2010):
    draw a point's box in proportion to its volume, a place in it, and count the boxes that hold that place; the sum
    of all volumes times the mean of 1 / count is unbiased. Each term lies between 1 / P and 1 whatever the number
    of metrics, so the error stays small and can be trusted: the exact value lies within 2 errors in about 19 of 20
    cases, and the error falls with the root of `samples`; at the default it was 0.1 to 0.4 % of the value on fronts
    of 2 to 16 metrics. Sampling directions, as moocore's hv_approx does, was closer in up to 8 metrics on round
    fronts, but 14 and 170 times further off for one-sided points in 8 and 16 metrics, whose boxes are long and thin.

    Args:
        values: [P, M].
        ref: the reference point [M].
        larger: for each metric, whether larger is better.
        samples: places drawn.
        seed: of the places.

    Returns:
        The estimate and its standard error.
    """
    if samples < 2:
        raise ValueError(f"got samples={samples}, expected at least 2")
    sides = (values - np.asarray(ref)) * np.where(larger, 1.0, -1.0)
    sides = sides[(sides > 0).all(axis=1)]
    if len(sides) == 0:
        return 0.0, 0.0
    sides = sides[moocore.is_nondominated(sides, maximise=True)]
    log = np.log(sides).sum(axis=1)
    volumes = np.exp(log - log.max())  # relative to the largest box: products of many sides may underflow
    rng = np.random.default_rng(seed)
    terms = np.empty(samples)
    for start in range(0, samples, 4096):  # a block at a time keeps [block, P, M] in memory
        part = terms[start : start + 4096]
        chosen = rng.choice(len(sides), size=len(part), p=volumes / volumes.sum())
        places = rng.random((len(part), sides.shape[1])) * sides[chosen]
        part[:] = 1 / (places[:, None] <= sides[None]).all(axis=2).sum(axis=1)
    total = float(volumes.sum() * np.exp(log.max()))
    return total * float(terms.mean()), total * float(terms.std(ddof=1) / np.sqrt(samples))


def spacing(values: np.ndarray) -> float:
    """How unevenly the points lie (Schott, 1995): the standard deviation of the distance to the nearest other.

    Distances are sums of absolute differences, in the metrics' own units. 0 is even; also for fewer than 3 points.
    """
    if len(values) < 3:
        return 0.0
    gaps = np.abs(values[:, None] - values[None]).sum(axis=2)
    np.fill_diagonal(gaps, np.inf)
    return float(gaps.min(axis=1).std(ddof=1))


def spread(values: np.ndarray, span: Sequence[float] | None = None) -> float:
    """How far apart the points reach: the root mean square over metrics of (max - min) / span.

    Zitzler's maximum spread (2000) with each metric's share made comparable. A flat front, where every preference
    gives the same model, has 0; one that reaches as far as the span in every metric has 1.

    Args:
        values: [P, M].
        span: what counts as the whole extent of each metric, such as the distance between the experts; 1 if None.

    Raises:
        ValueError: a span that is not M positive numbers.
    """
    whole = np.ones(values.shape[1]) if span is None else np.asarray(span, dtype=np.float64)
    if whole.shape != values.shape[1:] or not (whole > 0).all():
        raise ValueError(f"got span={span}, expected {values.shape[1]} numbers > 0, one for each metric")
    return float(np.sqrt(np.mean((np.ptp(values, axis=0) / whole) ** 2)))


def rank_correlation(preferences: np.ndarray, values: np.ndarray, larger: Sequence[bool]) -> np.ndarray:
    """Whether asking for more gives more: Spearman's correlation of each objective's preference with its metric.

    Args:
        preferences: [P, E].
        values: [P, E], the metric of each objective in the same order.
        larger: for each metric, whether larger is better.

    Returns:
        [E] float64 in [-1, 1]; 1 where the metric always improves with the preference, 0 where either is constant.
    """
    signs = np.where(larger, 1.0, -1.0)
    return np.array(
        [_pearson(_ranks(r), _ranks(v)) for r, v in zip(preferences.T, (values * signs).T, strict=True)],
        dtype=np.float64,
    )


def non_dominated(values: np.ndarray, larger: Sequence[bool]) -> np.ndarray:
    """[P] booleans: no other point of [P, M] is as good everywhere and better somewhere; all of a tie count."""
    return np.asarray(moocore.is_nondominated(values, maximise=list(larger), keep_weakly=True), dtype=bool)


def share_non_dominated(values: np.ndarray, larger: Sequence[bool], repeats: bool = False) -> float:
    """The share of points that no other dominates.

    Args:
        values: [P, M].
        larger: for each metric, whether larger is better.
        repeats: whether a point equal to an earlier one counts again. It does not by default: a front where every
            preference gives the same model would otherwise look perfect.
    """
    return float(np.mean(moocore.is_nondominated(values, maximise=list(larger), keep_weakly=repeats)))


def _ranks(numbers: np.ndarray) -> np.ndarray:
    """Ranks from 0, equal numbers sharing the mean of theirs."""
    _, inverse, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray((ends - (counts + 1) / 2)[inverse])


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    length = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / length if length > 0 else 0.0
