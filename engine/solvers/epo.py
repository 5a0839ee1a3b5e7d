"""Exact Pareto optimal search: the point of the front where r_m l_m is equal for all objectives."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paretofuse.engine.solvers.common import WeightedSolver
from paretofuse.engine.solvers.small import maximize_on_simplex, shortest_in_hull


@dataclass(frozen=True)
class EPO(WeightedSolver):
    """Balance the weighted losses where they differ, then descend all of them.

    With q = r l / sum(r l), the imbalance is mu = sum_m q_m log(M q_m), zero on the ray where all r_m l_m are
    equal, and a_m = r_m (log(M q_m) - mu) is along its gradient in the losses. C holds the gradients' inner
    products. The weights are::

        mu > tolerance:  max beta' C a           subject to
                         (C beta)_m >= 0         for the worst objectives, argmax r l; for all if C a <= 0
                         (C beta)_m >= (C a)_m   for the others with (C a)_m <= 0 (controlled ascent)
        otherwise:       max sum_m (C beta)_m    subject to (C beta)_m >= 0 for all

    over beta on the simplex. Reaches convex and non-convex parts of a front. Objectives of preference 0 have no
    place on the ray and are left out, so a one-hot preference descends its objective alone. The shortest vector in
    the hull of the gradients meets every constraint, so the program always has a solution; where rounding says
    otherwise (at Pareto-stationary points) that vector is taken.

    Source: Mahapatra and Rajan, "Multi-task learning with user preferences: gradient descent with controlled
    ascent in Pareto optimization", ICML 2020, and arXiv 2010.06313.

    Attributes:
        tolerance: the imbalance mu below which all losses descend together.
    """

    tolerance: float = 1e-4

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < float("inf"):
            raise ValueError(f"got tolerance={self.tolerance}, expected a number >= 0")

    def weights(self, losses: np.ndarray, gram: np.ndarray, preference: np.ndarray) -> np.ndarray:
        """beta on the simplex; 0 where the preference is 0.

        Raises:
            ValueError: a loss is negative; rays start at zero loss.
        """
        if (losses < 0).any():
            worst = int(np.argmin(losses))
            raise ValueError(
                f"got loss {losses[worst]:g} of objective {worst}, expected losses >= 0 for EPO; "
                'add a constant to it, or use method="stch" with its ideal point'
            )
        alpha = np.zeros(len(losses))
        used = np.flatnonzero(preference > 0)
        alpha[used] = self._solve(losses[used], gram[np.ix_(used, used)], preference[used])
        return alpha

    def _solve(self, losses: np.ndarray, gram: np.ndarray, preference: np.ndarray) -> np.ndarray:
        scale = float(np.max(np.diag(gram)))
        if len(losses) == 1 or scale <= 0:
            return np.asarray(preference / preference.sum())
        gram = gram / scale  # the programs' tolerances are for inner products around 1
        weighted = preference * losses
        imbalance, anchor = imbalance_of(weighted, preference)
        if imbalance > self.tolerance:
            pull = gram @ anchor  # how fast each loss falls along the direction that balances
            bound = np.zeros(len(losses))
            if (pull > 0).any():
                # Balancing lowers some loss. Those that it raises may rise as fast as by it, no faster; those that it
                # lowers are free, except the worst: they never rise, or the imbalance would be paid for by them.
                bound = np.where(pull > 0, -np.inf, pull)
                bound[weighted >= weighted.max() * (1 - 1e-12)] = 0.0
            beta = maximize_on_simplex(pull, gram, bound)
        else:
            beta = maximize_on_simplex(gram.sum(axis=0), gram, np.zeros(len(losses)))
        return shortest_in_hull(gram) if beta is None else beta


def imbalance_of(weighted: np.ndarray, preference: np.ndarray) -> tuple[float, np.ndarray]:
    """EPO's imbalance mu >= 0 and its anchor a [M], for weighted losses r l [M] >= 0; both zero if all are zero."""
    total = float(weighted.sum())
    if total <= 0:
        return 0.0, np.zeros(len(weighted))
    share = len(weighted) * weighted / total
    log = np.log(np.maximum(share, 1e-12))  # a loss of exactly zero pulls hard, but not without bound
    imbalance = float((share * log).sum()) / len(weighted)
    return imbalance, preference * (log - imbalance)
