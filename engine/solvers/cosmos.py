"""COSMOS: linear scalarization plus a pull of the loss vector toward the preference's ray."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from paretofuse.engine.solvers.common import WeightedSolver

Align = Literal["inverse", "preference"]


@dataclass(frozen=True)
class COSMOS(WeightedSolver):
    """Descend r'l - strength * cos(t, l): alpha = r - strength * dcos/dl. Some alpha may be negative.

    The cosine keeps the losses of different preferences apart, which linear scalarization alone does not; no
    gradient beyond the losses' own is needed. Source: Ruchte and Grabocka, "Scalable Pareto front approximation for
    deep multi-objective learning", arXiv 2103.13392, eq. 8.

    Attributes:
        strength: the weight of the cosine (lambda), >= 0; 0 is linear scalarization.
        align: the ray t: "inverse" is 1 / r, where r_m l_m are equal as for EPO and a larger preference means a
            smaller loss; "preference" is r itself, as in the paper's formula.
    """

    strength: float = 1.0
    align: Align = "inverse"

    def __post_init__(self) -> None:
        check_alignment(self.strength, self.align)

    def weights(self, losses: np.ndarray, gram: np.ndarray, preference: np.ndarray) -> np.ndarray:
        """The preference less the cosine's gradient."""
        return np.asarray(preference - self.strength * cosine_gradient(losses, preference, self.align))


def cosine_gradient(losses: np.ndarray, preference: np.ndarray, align: Align) -> np.ndarray:
    """The gradient of cos(t, l) in the losses l [M], for the ray t of COSMOS.align; zero at l = 0."""
    if align == "preference":
        ray = preference
    elif (preference == 0).any():
        ray = (preference == 0).astype(
            np.float64
        )  # the limit of 1 / r: all loss belongs where nothing was asked for
    else:
        ray = preference.min() / preference
    ray = ray / np.linalg.norm(ray)
    length = float(np.linalg.norm(losses))
    if length == 0:
        return np.zeros(len(losses))
    unit = losses / length
    return np.asarray((ray - (ray @ unit) * unit) / length)


def check_alignment(strength: float, align: str) -> None:
    """Check COSMOS's options, which other solvers take too."""
    if not 0 <= strength < float("inf"):
        raise ValueError(f"got strength={strength}, expected a number >= 0")
    if align not in ("inverse", "preference"):
        raise ValueError(f'got align={align!r}, expected "inverse" or "preference"')
