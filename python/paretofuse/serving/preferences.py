"""Which preference a request gets: named, chosen by the front within bounds, or the default; and the grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from paretofuse.engine.routing.preference import as_preference
from paretofuse.fronts.front import Front


class Preferences:
    """Resolves preferences over the objectives of one engine.

    Attributes:
        objectives: their names.
        front: chooses within bounds; None where there is none.
        grid: preferences are moved to multiples of 1 / grid; None leaves them as they are.
        default: for requests that name none.

    Raises:
        ValueError: the front is over other objectives, or the grid is below 1.
    """

    def __init__(
        self, objectives: Sequence[str], front: Front | None = None, grid: int | None = None
    ) -> None:
        self.objectives = tuple(objectives)
        if front is not None and set(front.objectives) != set(self.objectives):
            raise ValueError(
                f"got a front over the objectives {list(front.objectives)}, expected those of the store, "
                f"{list(self.objectives)}; sweep this store"
            )
        if grid is not None and (isinstance(grid, bool) or not isinstance(grid, int) or grid < 1):
            raise ValueError(f"got grid={grid!r}, expected a whole number of at least 1, or None for no grid")
        self.front, self.grid = front, grid
        self.default = self.resolve(dict.fromkeys(self.objectives, 1 / len(self.objectives)))

    def resolve(self, wanted: Mapping[str, Any] | None) -> dict[str, float]:
        """The preference to use, every objective named.

        Args:
            wanted: shares by objective; or bounds, {"at_most": {metric: number}, "at_least": ..., "best": metric},
                which the front resolves; None takes the default.

        Raises:
            ValueError, TypeError: no preference, no point within the bounds, or bounds without a front.
        """
        if wanted is None:
            return dict(self.default)
        if is_bounds(wanted):
            wanted = self._chosen(wanted)
        return self._on_grid(as_preference(wanted, self.objectives))

    def _chosen(self, bounds: Mapping[str, Any]) -> dict[str, float]:
        if self.front is None:
            raise ValueError(
                "got bounds, which a front resolves, and this server has none; name the shares instead, or start it "
                "with --front front.csv, as `paretofuse sweep` writes it"
            )
        return self.front.choose(
            at_most=bounds.get("at_most"), at_least=bounds.get("at_least"), best=bounds.get("best")
        ).preference

    def _on_grid(self, numbers: np.ndarray) -> dict[str, float]:
        """By largest remainders, so that the shares still sum to 1."""
        if self.grid is not None:
            steps = numbers / numbers.sum() * self.grid  # [E]
            whole = np.floor(steps + 1e-9)
            left = round(self.grid - whole.sum())
            whole[np.argsort(whole - steps, kind="stable")[:left]] += 1
            numbers = whole / self.grid
        return dict(zip(self.objectives, numbers.tolist(), strict=True))


def is_bounds(wanted: Mapping[str, Any]) -> bool:
    """Whether a preference is given by bounds: an objective may be called "best", but its share is a number."""
    return any(isinstance(wanted.get(word), Mapping) for word in ("at_most", "at_least")) or isinstance(
        wanted.get("best"), str
    )


def from_words(text: str) -> dict[str, float]:
    """`news=0.7,poems=0.3`, as on the command line and in addresses.

    Raises:
        ValueError: it is not of that form.
    """
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = part.rpartition("=")
        try:
            share = float(number)
        except ValueError:
            name = ""
        if not name or name in shares:
            raise ValueError(
                f"got the preference {text[:200]!r}, expected each objective once, as in news=0.7,poems=0.3"
            )
        shares[name] = share
    return shares
