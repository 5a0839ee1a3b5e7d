"""What the losses of steps at ever other preferences say about the loss at equal preference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_MEMORY = 50.0
"""Steps after which an observation's weight has fallen to 1 / e."""

_FEWEST = 20
"""Steps of which the smoothed losses say something."""

_RIDGE = 1e-2
"""Holds the slopes at zero until there are preferences enough to tell them."""


class LossAtEqualPreference:
    """Each objective's loss at equal preference, smoothed over the last steps.

    A step's loss says as much about its preference as about the progress of training, so its running mean does not
    fall evenly. This is a local linear regression (Cleveland, 1979) of the losses on the preferences, weighted by a
    Gaussian around equal preference and exponentially by age; its value at equal preference is what is shown. It costs
    no pass of the model.

    Args:
        objectives: M.
    """

    def __init__(self, objectives: int) -> None:
        size = 1 + objectives
        self._products = np.zeros((size, size))  # [1 + M, 1 + M] weighted sums of x x', x = (1, r - 1 / M)
        self._targets = np.zeros((size, objectives))  # [1 + M, M] weighted sums of x l'
        # The squared distance of a uniform draw from the centre, on average; a quarter of it keeps those nearby.
        typical = (objectives - 1) / (objectives * (objectives + 1))
        self._width = max(typical / 4, 1e-12)

    def add(self, preference: np.ndarray, losses: np.ndarray) -> None:
        """Take a step's losses [M] at a preference [M]."""
        offset = preference - 1 / len(preference)
        x = np.concatenate([[1.0], offset])
        # At least a little weight: at the start, far preferences are all there is.
        weight = max(float(np.exp(-offset @ offset / (2 * self._width))), 1e-6)
        decay = np.exp(-1 / _MEMORY)
        self._products = decay * self._products + weight * np.outer(x, x)
        self._targets = decay * self._targets + weight * np.outer(x, losses)

    def value(self) -> np.ndarray:
        """The smoothed losses [M], after at least one `add`."""
        total = self._products[0, 0]
        ridge = np.diag([0.0, *[_RIDGE * self._width] * (len(self._products) - 1)])
        return np.asarray(np.linalg.solve(self._products / total + ridge, self._targets / total)[0])

    def state(self) -> dict[str, Any]:
        """Where it stands, JSON only."""
        return {"products": self._products.tolist(), "targets": self._targets.tolist()}

    def restore(self, state: Mapping[str, Sequence[Sequence[float]]]) -> None:
        """Continue from a state.

        Raises:
            ValueError: it is no such state.
        """
        products, targets = (np.array(state[name], dtype=np.float64) for name in ("products", "targets"))
        if products.shape != self._products.shape or targets.shape != self._targets.shape:
            raise ValueError(f"got sums of shapes {products.shape} and {targets.shape}")
        self._products, self._targets = products, targets


def divergence(records: Sequence[Mapping[str, float]], objectives: Sequence[str]) -> str | None:
    """A sentence for the user if at the end every loss at equal preference is half as large again as at the first step.

    What the first step's preference leans to may rise, but then what it leans from falls; a half is more than one
    batch's noise.

    Args:
        records: of all steps, as `pf.fit` returns them; of fewer than 20 nothing is said.
        objectives: their names.
    """
    if len(records) < _FEWEST:
        return None
    pairs = [(records[0][f"loss/{name}"], records[-1][f"equal/{name}"]) for name in objectives]
    if any(last <= first + 0.5 * abs(first) for first, last in pairs):
        return None
    told = ", ".join(
        f"{name} {first:.4g} to {last:.4g}" for name, (first, last) in zip(objectives, pairs, strict=True)
    )
    return (
        f"every loss rose, of the first step to the end at equal preference: {told}; the steps are too large for this "
        "model, give a smaller lr= (and row_lr=)"
    )
