"""MGDA: the steepest direction that descends every objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from paretofuse.engine.solvers.common import WeightedSolver
from paretofuse.engine.solvers.small import shortest_in_hull


@dataclass(frozen=True)
class MGDA(WeightedSolver):
    """Multiple-gradient descent: follow the shortest vector in the convex hull of the gradients.

    d = G' alpha with alpha = argmin `|G' alpha|^2` on the simplex. Every gradient then has `g_m' d >= |d|^2`, so a
    small step lowers each loss, and d = 0 exactly where the point is Pareto-stationary. It ends at some point of
    the front, near where it began: the preference is not heard. Source: Desideri, "Multiple-gradient descent
    algorithm (MGDA) for multiobjective optimization", 2012; normalization: Sener and Koltun, arXiv 1810.04650.

    Attributes:
        normalize: "none"; "gradient" divides each gradient by its length first, and "loss" by its loss, so that
            objectives of different scale count alike.
    """

    normalize: Literal["none", "gradient", "loss"] = "none"

    def __post_init__(self) -> None:
        if self.normalize not in ("none", "gradient", "loss"):
            raise ValueError(f'got normalize={self.normalize!r}, expected "none", "gradient" or "loss"')

    def weights(self, losses: np.ndarray, gram: np.ndarray, preference: np.ndarray) -> np.ndarray:
        """The weights of the shortest vector, divided by the normalizing scales."""
        scale = np.ones(len(losses))
        if self.normalize == "gradient":
            scale = np.sqrt(np.diag(gram))
        elif self.normalize == "loss":
            scale = np.abs(losses)
        scale = np.where(scale > 0, scale, 1.0)
        return shortest_in_hull(gram / np.outer(scale, scale)) / scale
