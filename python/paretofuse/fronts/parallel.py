"""More objectives or metrics: parallel coordinates, an axis for each metric with its better end up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from paretofuse.fronts.style import (
    DASHES,
    GREY,
    INK,
    OKABE_ITO,
    SMALL,
    model_mark,
    with_direction,
)

if TYPE_CHECKING:
    from paretofuse.fronts.front import Front

_WIDEST = 17.0  # inches


def size(front: Front) -> tuple[float, float]:
    """Width and height in inches."""
    return min(1.2 + 1.5 * len(front.metrics), _WIDEST), 4.6


def draw(
    front: Front, ax: Axes, points: Mapping[str, np.ndarray], others: Mapping[str, Front], label: str
) -> list[Line2D]:
    """Draw into the axes; returns what the legend should hold."""
    signs = np.where(front.directions, 1.0, -1.0)
    every = np.vstack(
        [front.values, *[other.values for other in others.values()], *[p[None] for p in points.values()]]
    )
    worst, best = (every * signs).min(axis=0), (every * signs).max(axis=0)
    span = np.where(best > worst, best - worst, 1.0)

    def height(values: np.ndarray) -> np.ndarray:
        return np.asarray((values * signs - worst) / span)

    at, handles = np.arange(len(front.metrics)), []
    kept, mine = front.non_dominated(), f"{label}, " if others else ""
    faint = 0.45 if len(front) <= 16 else 0.22  # a hundred lines are a texture, not a reading
    for row, values in enumerate(front.values):
        leads = np.flatnonzero(front.preferences[row] >= front.preferences[row].max() - 1e-9)
        look = _look(int(leads[0])) if len(leads) == 1 else {"color": GREY, "ls": "-"}
        if front.preferences[row].max() < 1 - 1e-9:
            ax.plot(at, height(values), lw=0.9, alpha=faint, zorder=3, **look)
            continue
        name = f"{mine}all weight on {front.objectives[leads[0]]}"
        face = look["color"] if kept[row] else "white"
        (line,) = ax.plot(
            at, height(values), lw=2.2, marker="o", ms=5, mfc=face, zorder=5, label=name, **look
        )
        handles.append(line)
    if len(handles) < len(front):
        text = f"{mine}mixed, in the colour of the largest share"
        handles.append(Line2D([], [], color=GREY, lw=0.9, label=text))
    for number, (name, other) in enumerate(others.items()):
        lines = ax.plot(
            at,
            height(other.values).T,
            color=GREY,
            lw=0.8,
            ls=DASHES[number % len(DASHES)],
            alpha=1.5 * faint,
            zorder=2,
        )
        lines[0].set_label(name)
        handles.append(lines[0])
    for number, (name, point) in enumerate(points.items()):
        mark = {**model_mark(number), "ls": (0, (5, 2)), "lw": 1.2}
        handles += ax.plot(at, height(point), zorder=6, label=name, **mark)

    _scales(ax, front, signs * worst, signs * (worst + span))
    return handles


def _look(objective: int) -> dict[str, Any]:
    """Colour, and after eight colours dashes, of the lines that an objective leads."""
    turn = objective // len(OKABE_ITO)
    return {"color": OKABE_ITO[objective % len(OKABE_ITO)], "ls": ("-", *DASHES)[turn % (1 + len(DASHES))]}


def _scales(ax: Axes, front: Front, low: np.ndarray, high: np.ndarray) -> None:
    """The axes themselves: a line each with the values at its ends, and the metric's name below."""
    room = (size(front)[0] - 0.6) / len(front.metrics) - 0.1
    ax.set_xlim(-0.5, len(front.metrics) - 0.5)
    ax.set_ylim(-0.04, 1.04)
    for side in ax.spines.values():
        side.set_visible(False)
    ax.set_yticks([])
    ax.set_ylabel("up is better", fontsize=SMALL, color=INK)
    labels = zip(front.metrics, front.directions, low, strict=True)
    ax.set_xticks(
        range(len(front.metrics)),
        [f"{bottom:.4g}\n{with_direction(name, larger, room)}" for name, larger, bottom in labels],
        fontsize=SMALL, color=INK,
    )  # fmt: skip
    ax.tick_params(length=0)
    for column, top in enumerate(high):
        ax.axvline(column, color=GREY, lw=0.8, zorder=1)
        ax.text(column, 1.06, f"{top:.4g}", ha="center", va="bottom", fontsize=SMALL, color=INK)
