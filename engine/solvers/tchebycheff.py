"""Tchebycheff scalarization and its smooth version: the worst weighted loss leads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from paretofuse.engine.solvers.common import WeightedSolver


@dataclass(frozen=True)
class Tchebycheff(WeightedSolver):
    """Descend max_m r_m (l_m - z_m): alpha is r_m for the largest term and 0 elsewhere; ties share it.

    Reaches every point of a front, convex or not, with r_m (l_m - z_m) equal for all m; but it follows one gradient
    at a time, and zigzags. Source: Bowman, 1976; Miettinen, "Nonlinear multiobjective optimization", 1999, 3.4.

    Attributes:
        ideal: z, the best loss of each objective (utopia point); zeros if None.
    """

    ideal: Sequence[float] | None = None

    def weights(self, losses: np.ndarray, gram: np.ndarray, preference: np.ndarray) -> np.ndarray:
        """The preference where the weighted loss is largest."""
        terms = preference * (losses - _ideal(self.ideal, len(losses)))
        terms[preference == 0] = -np.inf
        worst = terms >= terms.max() - 1e-12 * abs(terms.max())
        return np.asarray(np.where(worst, preference, 0.0) / worst.sum())


@dataclass(frozen=True)
class SmoothTchebycheff(WeightedSolver):
    """Descend mu log sum_m exp(r_m (l_m - z_m) / mu): alpha_m = r_m softmax(r (l - z) / mu)_m.

    Within mu log M of the Tchebycheff value and smooth, so that all objectives are followed at once. A small mu is
    closer to Tchebycheff, a large one to linear scalarization. Objectives of preference 0 are left
    out. Source: Lin et al., "Smooth Tchebycheff scalarization for multi-objective optimization", arXiv 2402.19078.

    Attributes:
        smoothing: mu > 0, in units of r l.
        ideal: z, the best loss of each objective (utopia point); zeros if None.
    """

    smoothing: float = 0.1
    ideal: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.smoothing < float("inf"):
            raise ValueError(
                f"got smoothing={self.smoothing}, expected a number > 0; 0 is Tchebycheff itself"
            )

    def weights(self, losses: np.ndarray, gram: np.ndarray, preference: np.ndarray) -> np.ndarray:
        """The preference times the softmax of the weighted losses."""
        terms = preference * (losses - _ideal(self.ideal, len(losses))) / self.smoothing
        terms[preference == 0] = -np.inf
        share = np.exp(terms - terms.max())
        return np.asarray(preference * share / share.sum())


def _ideal(ideal: Sequence[float] | None, count: int) -> np.ndarray:
    point = np.zeros(count) if ideal is None else np.asarray(ideal, dtype=np.float64)
    if point.shape != (count,) or not np.isfinite(point).all():
        raise ValueError(f"got ideal={ideal}, expected {count} finite numbers, one for each objective")
    return point
