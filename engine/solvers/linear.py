"""Linear scalarization: the preference itself weighs the losses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paretofuse.engine.solvers.common import WeightedSolver


@dataclass(frozen=True)
class LinearScalarization(WeightedSolver):
    """Descend sum_m r_m l_m: alpha = r.

    Cheap and steady. It reaches only the convex part of a front: where the front bends inwards, every preference
    ends at one of the two sides. Source: Zadeh, "Optimality and non-scalar-valued performance criteria", 1963.
    """

    def weights(self, losses: np.ndarray, gram: np.ndarray, preference: np.ndarray) -> np.ndarray:
        """The preference."""
        return preference
