"""Where to evaluate next: the point at which the hypervolume would grow most, as far as one can tell.

Each metric is a Gaussian process over the simplex of preferences, or over a box of coefficients. Of many candidates
that one is chosen whose optimistic prediction, mean + half a standard deviation, adds most hypervolume to what was
measured, as in SMS-EGO (Ponweiser et al., 2008). A front is smooth in the preference, so that a dozen points tell much
of the rest. In a box of many dimensions they tell little; most candidates are near the best points. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import moocore
import numpy as np

_CANDIDATES = 400
_LENGTHS = np.geomspace(0.1, 3.0, 8)
"""Distances over which a metric may change; the simplex's corners lie 1.4 apart, the box has edges of 1."""
_NOISES = (1e-6, 1e-4, 1e-2, 1e-1)
"""Shares of a metric's variance that may be noise."""
_OPTIMISM = 0.5
"""Standard deviations that a prediction is taken to be better than its mean."""
_STEP = 0.15
"""How far from a known point of a box its neighbours are drawn."""
_MARGIN = 0.1
"""Of a metric's range: how far below its worst value the reference point lies that nobody gave."""

Candidates = Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]
"""Known points [P, D], those that are not dominated [Q, D] and a generator -> points to choose from [K, D]."""


def next_point(
    points: np.ndarray,
    values: np.ndarray,
    pending: np.ndarray,
    candidates_of: Candidates,
    *,
    bounds: np.ndarray | None = None,
    ref: Sequence[float] | None = None,
    rng: np.random.Generator,
) -> np.ndarray:
    """The point to evaluate next.

    Args:
        points: [P, D], P >= 1: where something was measured.
        values: [P, M]: what, larger being better.
        pending: [Q, D]: where others are measuring; they are taken to find what is expected there.
        candidates_of: draws what to choose from.
        bounds: [M]: what a metric must reach for a point to count; -inf where it need not.
        ref: [M]: the hypervolume's reference point; somewhat below the worst of each metric if None.
        rng: for the candidates.

    Returns:
        [D] float64, one of the candidates.
    """
    spans = np.ptp(values, axis=0)
    spans[spans == 0] = 1.0
    scaled = (values - values.min(axis=0)) / spans  # [P, M], 0 at its worst
    floor = (
        np.full(values.shape[1], -_MARGIN) if ref is None else (np.asarray(ref) - values.min(axis=0)) / spans
    )
    least = np.full(values.shape[1], -np.inf) if bounds is None else (bounds - values.min(axis=0)) / spans
    processes = [Process(points, column) for column in scaled.T]
    if len(pending):
        believed = np.stack([process.predict(pending)[0] for process in processes], axis=1)
        points, scaled = np.vstack([points, pending]), np.vstack([scaled, believed])
        processes = [Process(points, column) for column in scaled.T]
    kept = moocore.is_nondominated(scaled, maximise=True)
    candidates = candidates_of(points, points[kept], rng)
    predicted = [process.predict(candidates) for process in processes]
    means = np.stack([mean for mean, _ in predicted], axis=1)
    errors = np.stack([error for _, error in predicted], axis=1)
    hoped = means + _OPTIMISM * errors
    short = np.clip(least - hoped, 0, None).sum(axis=1)
    counted = scaled[(scaled >= least).all(axis=1)]
    gains = np.array(
        [0.0 if lack > 0 else _gain(counted, point, floor) for point, lack in zip(hoped, short, strict=True)]
    )
    if gains.max() > 0:
        return np.asarray(candidates[gains.argmax()])
    # Nothing promises to help: come nearer to the bounds, or else look where least is known.
    return np.asarray(candidates[short.argmin() if short.min() > 0 else errors.sum(axis=1).argmax()])


class Process:
    """A Gaussian process over points with a squared exponential kernel, the likeliest of a few.

    Args:
        points: [P, D].
        values: [P].
    """

    def __init__(self, points: np.ndarray, values: np.ndarray) -> None:
        self._points = points
        self._mean, self._scale = float(values.mean()), float(values.std()) or 1.0
        target = (values - self._mean) / self._scale
        squares = _squares(points, points)
        best = -np.inf
        for length in _LENGTHS:
            kernel = np.exp(-squares / (2 * length**2))
            for noise in _NOISES:
                factor = np.linalg.cholesky(kernel + noise * np.eye(len(values)))
                solved = np.linalg.solve(factor, target)
                likelihood = -0.5 * float(solved @ solved) - float(np.log(np.diag(factor)).sum())
                if likelihood > best:
                    best, self._length, self._factor = likelihood, length, factor
                    self._weights = np.linalg.solve(factor.T, solved)

    def predict(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Means and standard deviations, [K] each."""
        kernel = np.exp(-_squares(points, self._points) / (2 * self._length**2))  # [K, P]
        left = np.linalg.solve(self._factor, kernel.T)
        spread = np.sqrt(np.clip(1 - np.square(left).sum(axis=0), 0, None))
        return self._mean + self._scale * (kernel @ self._weights), self._scale * spread


def simplex_candidates(known: np.ndarray, kept: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[K, E]: all over the simplex, near its edges, and between two known points; none of the known ones."""
    count = known.shape[1]
    inside = rng.dirichlet(np.ones(count), _CANDIDATES // 2)
    edges = rng.dirichlet(np.full(count, 0.3), _CANDIDATES // 4)
    return _new(np.vstack([inside, edges, _between(known, rng)]), known)


def box_candidates(known: np.ndarray, kept: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[K, D]: all over the unit box, near what is not dominated, and between two such; none of the known ones."""
    count = known.shape[1]
    inside = rng.random((_CANDIDATES // 4, count))
    near = kept[rng.integers(len(kept), size=_CANDIDATES)]
    moved = rng.random(near.shape) < 0.5  # about half of its coordinates
    near = np.clip(near + moved * rng.normal(0, _STEP, near.shape), 0, 1)
    return _new(np.vstack([inside, near, _between(kept, rng)]), known)


def _between(known: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Places on the lines between two known points."""
    pairs = rng.integers(len(known), size=(_CANDIDATES // 4, 2))
    share = rng.random((len(pairs), 1))
    return np.asarray(share * known[pairs[:, 0]] + (1 - share) * known[pairs[:, 1]])


def _new(found: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Those that are not known; all of them if none is new."""
    new = found[_squares(found, known).min(axis=1) > 1e-4]
    return new if len(new) else found


def _gain(values: np.ndarray, point: np.ndarray, floor: np.ndarray) -> float:
    """How much hypervolume a point would add."""
    if not (point > floor).all():
        return 0.0
    # What a point adds lies below it: only the parts of others below it matter.
    own = float(np.prod(point - floor))
    below = np.minimum(values, point)
    below = below[(below > floor).all(axis=1)]
    return own - (float(moocore.hypervolume(below, ref=floor, maximise=True)) if len(below) else 0.0)


def _squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared distances [A, B] between rows."""
    return np.asarray(np.square(a[:, None] - b[None]).sum(axis=2))
