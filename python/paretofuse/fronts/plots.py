"""Pictures of fronts: a curve for 2 objectives, ternary heat maps for 3, parallel coordinates for more.

Needs matplotlib (the extra "plot").
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from paretofuse.engine.store.atomic import fresh_named
from paretofuse.fronts import curve, parallel, ternary
from paretofuse.fronts.arguments import other_fronts, single_models
from paretofuse.fronts.style import INK, legend_below, new_figure, wrapped

if TYPE_CHECKING:
    from paretofuse.fronts.front import Front


def check_path(path: str | os.PathLike[str]) -> None:
    """Raise ValueError unless a picture can be saved under this name, by its suffix."""
    formats = sorted(FigureCanvasAgg.get_supported_filetypes())
    if Path(path).suffix.lower().removeprefix(".") not in formats:
        raise ValueError(
            f"got picture {str(path)!r}, expected a name that ends in one of .{', .'.join(formats)}"
        )


def check_shape(objectives: int, metrics: int) -> None:
    """Raise ValueError where there is no picture for a front of so many objectives and metrics."""
    if objectives != 3 and metrics < 2:
        raise ValueError(
            f"got a front of one metric over {objectives} objectives, expected at least two metrics; "
            "plot front.values against front.preferences directly"
        )


def plot_front(
    front: Front,
    path: str | os.PathLike[str] | None = None,
    *,
    ax: Axes | None = None,
    points: Mapping[str, Sequence[float] | np.ndarray] | None = None,
    others: Mapping[str, Front] | None = None,
    label: str = "this front",
    title: str | None = None,
) -> Figure:
    """Draw a front; see Front.plot, which is the same.

    Raises:
        ValueError: points or others do not have this front's metrics, or there is no picture for its shape.
    """
    marked, fronts = single_models(front, points), other_fronts(front, others)
    objectives, metrics = front.preferences.shape[1], front.values.shape[1]
    check_shape(objectives, metrics)
    if objectives == 3:
        if ax is not None:
            raise ValueError(
                "got ax for 3 objectives, expected none: ternary heat maps need several axes; leave it out"
            )
        figure = ternary.draw(front, marked, fronts, label)
    else:
        kind = curve if objectives == 2 and metrics == 2 else parallel
        width, height = kind.size(front)
        figure, axes = _axes(ax, width, height)
        handles = kind.draw(front, axes, marked, fronts, label)
        legend_below(figure if ax is None else axes, handles, width)
    if title:
        if ax is None:
            lines = (wrapped(line, 0.75 * figure.get_figwidth()) for line in title.splitlines())
            figure.suptitle("\n".join(lines), fontsize=11, color=INK, x=0.02, ha="left")
        else:
            ax.set_title(title, loc="left", fontsize=11, color=INK)
    if path is not None:
        with fresh_named(path) as picture:
            figure.savefig(picture, dpi=160, bbox_inches="tight", facecolor="white")
    return figure


def _axes(ax: Axes | None, width: float, height: float) -> tuple[Figure, Axes]:
    if ax is None:
        figure = new_figure(width, height)
        return figure, figure.add_subplot()
    host = ax.get_figure(root=True)
    if host is None:
        raise ValueError("got ax without a figure, expected axes of one; use figure.add_subplot()")
    return host, ax
