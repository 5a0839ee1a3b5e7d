"""Three objectives: for each metric a triangle of preferences, coloured by what the metric reaches there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.tri import Triangulation

from paretofuse.fronts.style import (
    GREY,
    INK,
    SMALL,
    legend_below,
    model_mark,
    new_figure,
    with_direction,
    wrapped,
)

if TYPE_CHECKING:
    from paretofuse.fronts.front import Front

_CORNERS = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, np.sqrt(0.75)]])
_PANEL = 3.2  # inches
_UNIT = 2.6  # inches of a side of the triangle
_LINE = 0.165  # inches from one line of small text to the next


def draw(front: Front, points: Mapping[str, np.ndarray], others: Mapping[str, Front], label: str) -> Figure:
    """A column for each metric, a row for each front; below, each metric's scale with a mark for each single model."""
    shown = {label: front, **{name: one for name, one in others.items() if one.preferences.shape[1] == 3}}
    metrics, scale_height = len(front.metrics), 0.55 + _LINE * len(points)
    corners = _corner_texts(front)
    above, below = _room(corners)
    row_height = _UNIT * (_CORNERS[2, 1] + above + below)
    figure = new_figure(_PANEL * metrics, row_height * len(shown) + scale_height + 0.9)  # the rest: titles
    heights = [row_height] * len(shown) + [scale_height]
    grid = figure.subplots(len(shown) + 1, metrics, squeeze=False, height_ratios=heights)
    for column, name in enumerate(front.metrics):
        larger = front.directions[column]
        every = np.concatenate([one.values[:, column] for one in shown.values()])
        every = np.append(every, [point[column] for point in points.values()])
        low, high = float(every.min()), float(every.max())
        shades = colormaps["viridis"] if larger else colormaps["viridis_r"]
        high = high if high > low else low + 1.0
        norm = Normalize(low, high)
        for row, (title, one) in enumerate(shown.items()):
            ax = grid[row, column]
            _triangle(ax, one, column, shades, norm, corners)
            if column == 0 and len(shown) > 1:
                ax.text(
                    -0.2,
                    0.45,
                    wrapped(title, 2.6),
                    rotation=90,
                    ha="center",
                    va="center",
                    fontsize=9.5,
                    color=INK,
                )
        text = with_direction(name, larger, _PANEL - 0.5)
        grid[0, column].set_title(text, fontsize=9.5, color=INK, pad=4)
        grid[-1, column].axis("off")
        strip = grid[-1, column].inset_axes((0.1, 0.3 / scale_height, 0.8, 0.12 / scale_height))
        bar = figure.colorbar(ScalarMappable(norm, shades), cax=strip, orientation="horizontal")
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=SMALL, length=2, color=GREY)
        bar.ax.locator_params(nbins=4)
        for number, point in enumerate(
            points.values()
        ):  # a row of its own for each, so that none hides another
            at = (float(point[column]) - low) / (high - low)
            top = 1.0 + (number + 0.7) * _LINE / 0.12
            bar.ax.plot([at, at], [0, top], color=INK, lw=0.7, transform=bar.ax.transAxes, clip_on=False)
            mark = {**model_mark(number), "ms": 5}
            bar.ax.plot(at, top, transform=bar.ax.transAxes, clip_on=False, mec="white", mew=0.5, **mark)
    handles = [
        Line2D(
            [], [], ls="", marker="*", ms=11, color="white", mec=INK, label="best preference for the metric"
        ),
        *(Line2D([], [], label=name, **model_mark(number)) for number, name in enumerate(points)),
    ]
    legend_below(figure, handles, _PANEL * metrics)
    return figure


def _triangle(
    ax: Axes, front: Front, column: int, shades: Colormap, norm: Normalize, corners: tuple[str, str, str]
) -> None:
    x, y = (front.preferences @ _CORNERS).T
    values = front.values[:, column]
    if np.linalg.matrix_rank(np.column_stack([x - x[0], y - y[0]]), tol=1e-9) == 2:
        mesh = Triangulation(x, y)
        ax.tripcolor(mesh, values, shading="gouraud", cmap=shades, norm=norm, rasterized=True)
    ax.scatter(x, y, s=9, c=shades(norm(values)), edgecolors="white", linewidths=0.5, zorder=3)
    outline = np.vstack([_CORNERS, _CORNERS[:1]])
    ax.plot(*outline.T, color=GREY, lw=0.7, zorder=2)
    best = int(np.argmax(values if front.directions[column] else -values))
    ax.plot(x[best], y[best], ls="", marker="*", ms=12, color="white", mec=INK, mew=1.0, zorder=4)

    above, below = _room(corners)
    shares = " : ".join(f"{share:.2g}" for share in front.preferences[best])
    floor = -below + _LINE / _UNIT
    for (cx, cy), text, ha, va in (
        ((-0.04, -0.06), corners[0], "left", "top"),
        ((1.04, -0.06), corners[1], "right", "top"),
        ((0.5, _CORNERS[2, 1] + 0.06), corners[2], "center", "bottom"),
        ((0.5, floor), f"★ {values[best]:.4g} at {shares}", "center", "center"),
    ):
        ax.text(cx, cy, text, ha=ha, va=va, fontsize=SMALL, color=INK)
    ax.set_xlim(-0.06, 1.06)
    ax.set_ylim(-below, _CORNERS[2, 1] + above)
    ax.set_aspect("equal")
    ax.axis("off")


def _corner_texts(front: Front) -> tuple[str, str, str]:
    """The objectives' names at the corners left, right and above; the lower two share the width between them."""
    left, right = (wrapped(name, _PANEL / 2 - 0.25) for name in front.objectives[:2])
    return left, right, wrapped(front.objectives[2], _PANEL - 0.4, 2)


def _room(corners: tuple[str, str, str]) -> tuple[float, float]:
    """Room above and below the triangle, in its sides' lengths: for the corners' names, and for what was best."""
    left, right, top = (text.count("\n") + 1 for text in corners)
    line = _LINE / _UNIT
    return 0.1 + line * top, 0.1 + line * (max(left, right) + 2)
