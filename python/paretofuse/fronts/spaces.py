"""What a search chooses from: preferences on the simplex, or coefficients in a box."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from paretofuse.engine.evaluation.growth import box_candidates, simplex_candidates

if TYPE_CHECKING:
    from paretofuse.engine.engine import Engine
    from paretofuse.fronts.coefficients import Coefficients


class Space(Protocol):
    """Where the points of a search lie.

    Attributes:
        kind: what a point is, for messages and columns.
        names: of a point's D numbers.
        interval: the least and the largest that each may be.
        starts: [S, D]: where a search begins.
        identity: tells it from other spaces of the same engine.
    """

    kind: str
    names: tuple[str, ...]
    interval: tuple[float, float]
    starts: np.ndarray
    identity: str

    def point(self, numbers: np.ndarray) -> np.ndarray:
        """The point [D] that drawn numbers [D] stand for, each within the interval."""

    def candidates(self, known: np.ndarray, kept: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Points to look at beside known ones, all scaled from the interval to 0 .. 1; as `growth.Candidates`."""

    def switch(self, engine: Engine, point: Sequence[float]) -> None:
        """Rewrite the live module for a point."""


class PreferenceSpace:
    """The preferences of an engine; a search begins at the experts and at equal shares.

    Args:
        objectives: its M objectives.
    """

    def __init__(self, objectives: Sequence[str]) -> None:
        corners = np.eye(len(objectives))
        self.kind = "preference"
        self.names = tuple(objectives)
        self.interval = (0.0, 1.0)
        self.starts = np.vstack([corners, corners.mean(axis=0)])
        self.identity = ""

    def point(self, numbers: np.ndarray) -> np.ndarray:
        """The numbers in proportion; equal shares where all are 0."""
        whole = numbers.sum()
        return np.asarray(numbers / whole if whole > 0 else np.full(len(numbers), 1 / len(numbers)))

    def candidates(self, known: np.ndarray, kept: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """All over the simplex."""
        return simplex_candidates(known, kept, rng)

    def switch(self, engine: Engine, point: Sequence[float]) -> None:
        """Rewrite the live module for a preference."""
        engine.switch(point)


class CoefficientSpace:
    """Coefficients between two numbers; a search begins at the experts, at equal shares and in the middle of the box.

    Args:
        layout: where they belong.
        low, high: the least and the largest.

    Raises:
        ValueError: they are not finite, or low is not below high.
    """

    def __init__(self, layout: Coefficients, low: float, high: float) -> None:
        plain = all(isinstance(n, int | float) and not isinstance(n, bool) for n in (low, high))
        if not (plain and np.isfinite([low, high]).all() and low < high):
            raise ValueError(f"got low={low!r} and high={high!r}, expected finite numbers, low below high")
        self._layout = layout
        self.kind = "coefficient"
        self.names = layout.names
        self.interval = (float(low), float(high))
        self.identity = f"{layout.identity}\n{self.interval}"
        count = len(layout.planes)
        alike = np.vstack([np.eye(count), np.full(count, 1 / count), np.full(count, (low + high) / 2)])
        starts = np.clip(np.tile(alike, len(layout.parts)), low, high)  # [P + 2, C P], the same in all parts
        self.starts = np.array(list(dict.fromkeys(map(tuple, starts.tolist()))))

    def point(self, numbers: np.ndarray) -> np.ndarray:
        """The numbers themselves."""
        return numbers

    def candidates(self, known: np.ndarray, kept: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """All over the box, most of them near the best points."""
        return box_candidates(known, kept, rng)

    def switch(self, engine: Engine, point: Sequence[float]) -> None:
        """Rewrite the live module for coefficients."""
        engine.switch(weights=self._layout.weights(point))
