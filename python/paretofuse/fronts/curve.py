"""Two objectives: the front as a curve in the plane of its two metrics, coloured by the preference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.lines import Line2D

from paretofuse.fronts.style import INK, SMALL, front_look, model_mark, plain, with_direction, wrapped

if TYPE_CHECKING:
    from paretofuse.fronts.front import Front


def size(front: Front) -> tuple[float, float]:
    """Width and height in inches."""
    return 6.4, 4.6


def draw(
    front: Front, ax: Axes, points: Mapping[str, np.ndarray], others: Mapping[str, Front], label: str
) -> list[Line2D]:
    """Draw into the axes; returns what the legend should hold."""
    share = front.preferences[:, 0]
    order = np.argsort(share, kind="stable")
    x, y = front.values[order].T
    share, kept = share[order], front.non_dominated()[order]
    scale = ScalarMappable(Normalize(0.0, 1.0), colormaps["viridis"])
    colours = scale.to_rgba(share)
    middle = colormaps["viridis"](0.5)

    handles = [
        Line2D([], [], color="#bbbbbb", lw=2.2, marker="o", ms=7, mfc=middle, mec="white", label=label)
    ]
    ax.plot(x, y, color="#bbbbbb", lw=2.2, zorder=3, solid_capstyle="round")
    ax.scatter(x[kept], y[kept], s=46, c=colours[kept], edgecolors="white", linewidths=0.8, zorder=5)
    if not kept.all():
        ax.scatter(
            x[~kept], y[~kept], s=38, facecolors="white", edgecolors=colours[~kept], linewidths=1.4, zorder=4
        )
        text = "dominated by another preference"
        handles.append(
            Line2D([], [], ls="", marker="o", ms=6.5, mfc="white", mec=middle, mew=1.4, label=text)
        )
    for number, (name, other) in enumerate(others.items()):
        ordered = other.values[np.argsort(other.preferences[:, 0], kind="stable")]
        (line,) = ax.plot(*ordered.T, lw=1.2, marker=".", ms=4, zorder=2, label=name, **front_look(number))
        handles.append(line)
    for number, (name, point) in enumerate(points.items()):
        (line,) = ax.plot(*point, mec="white", mew=0.8, zorder=6, label=name, **model_mark(number))
        handles.append(line)

    bar = ax.figure.colorbar(scale, ax=ax, pad=0.02, aspect=32, ticks=[0, 0.25, 0.5, 0.75, 1])
    bar.set_label(wrapped(f"preference for {front.objectives[0]}", 3.4), fontsize=SMALL, color=INK)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=SMALL, length=0)
    plain(ax)
    ax.margins(0.09)
    for axis, name, larger, room in zip(
        (ax.xaxis, ax.yaxis), front.metrics, front.directions, (4.6, 3.4), strict=True
    ):
        axis.set_label_text(with_direction(name, larger, room), fontsize=9, color=INK)
    return handles if len(handles) > 1 else []
