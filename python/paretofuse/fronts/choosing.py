"""Which point of a front to take: the best in a metric, within bounds, or the knee."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from paretofuse.engine.evaluation.arguments import finite_bounds

if TYPE_CHECKING:
    from paretofuse.fronts.coefficients import CoefficientFront
    from paretofuse.fronts.front import Front


class Choice(NamedTuple):
    """One point of a front.

    Attributes:
        preference: the objectives' shares by name, as `engine.switch` and `engine.merge` take them.
        values: the metrics by name.
    """

    preference: dict[str, float]
    values: dict[str, float]


def choose_row(
    front: Front | CoefficientFront,
    at_most: Mapping[str, float],
    at_least: Mapping[str, float],
    best: str | None,
) -> int:
    """The point within bounds that is best in a metric, or the knee of the points within bounds.

    Raises:
        ValueError: a name is no metric of the front, a bound is not finite, or no point is within all bounds.
    """
    inside = np.ones(len(front.values), dtype=bool)
    for word, bounds, sign in (("at_most", at_most, 1.0), ("at_least", at_least, -1.0)):
        for name, limit in finite_bounds(word, bounds).items():
            values = front.values[:, column(front, name)]
            within = sign * values <= sign * limit
            if not within.any():
                edge = f"lowest {values.min():.6g}" if sign > 0 else f"highest {values.max():.6g}"
                raise ValueError(
                    f"got {word}={{{name!r}: {limit:g}}}, but no point of the front gets there ({edge}); loosen it, or "
                    "evaluate more points"
                )
            inside &= within
    if not inside.any():
        upper = [f"{name} <= {bound:g}" for name, bound in at_most.items()]
        lower = [f"{name} >= {bound:g}" for name, bound in at_least.items()]
        raise ValueError(
            f"got the bounds {', '.join(upper + lower)}, and no point of the front keeps all of them at once; "
            "loosen one, or evaluate more points"
        )
    rows = np.flatnonzero(inside)
    goods = front.values * np.where(front.directions, 1.0, -1.0)
    if best is None:
        return int(rows[knee(goods[rows], front.non_dominated()[rows])])
    # Of equally good points one that no other dominates, where there is one; of those the first.
    order = np.lexsort((~front.non_dominated()[rows], -goods[rows, column(front, best)]))
    return int(rows[order[0]])


def knee(goods: np.ndarray, kept: np.ndarray) -> int:
    """The row of the knee: the largest sum of metrics, each scaled to 0 at its worst and 1 at its best kept point.

    With two metrics it is the point that lies farthest beyond the straight line between the front's ends (Das, 1999).

    Args:
        goods: [P, M], larger is better.
        kept: [P] booleans, the points that count; where there are none, all do.
    """
    rows = np.flatnonzero(kept) if kept.any() else np.arange(len(goods))
    low, high = goods[rows].min(axis=0), goods[rows].max(axis=0)
    scaled = (goods[rows] - low) / np.where(high > low, high - low, 1.0)
    return int(rows[scaled.sum(axis=1).argmax()])


def column(front: Front | CoefficientFront, metric: str) -> int:
    """The column of a metric.

    Raises:
        ValueError: the front has none of that name.
    """
    if metric not in front.metrics:
        raise ValueError(f"got metric {metric!r}, expected one of {list(front.metrics)}")
    return front.metrics.index(metric)


def point(front: Front, row: int) -> Choice:
    """A row of the front by name."""
    return Choice(_named(front.objectives, front.preferences[row]), _named(front.metrics, front.values[row]))


def _named(names: Sequence[str], numbers: np.ndarray) -> dict[str, float]:
    return dict(zip(names, numbers.tolist(), strict=True))
