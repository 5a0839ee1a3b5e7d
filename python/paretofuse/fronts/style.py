"""What all pictures of fronts share: colours, lines, marks, labels with the direction of better, the legend.

Colours: viridis for a scale and the Okabe-Ito palette for categories; both are safe for colour-blind readers.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

INK, GREY, PALE = "#222222", "#777777", "#dddddd"
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#B8A900", "#444444")
DASHES = ((0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))
MARKERS = "Ds^v<>Xph8"
SMALL = 8.5

_LETTER = 0.062
"""Inches of a letter of size SMALL, on average: lines are broken and columns counted by it, not measured."""
_LINE = 0.19
"""Inches of a line of the legend."""


def new_figure(width: float, height: float) -> Figure:
    """A figure of its own, made without pyplot, so that nothing global is touched and no display is needed."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def wrapped(text: str, inches: float, lines: int = 3) -> str:
    """Text broken into at most so many lines of a width; what does not fit ends in an ellipsis."""
    width = max(6, int(0.92 * inches / _LETTER))
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" …") or [text])


def with_direction(metric: str, larger: bool, inches: float) -> str:
    """An axis' label: the metric, and which way is better."""
    return wrapped(metric, inches) + f"\n({'higher' if larger else 'lower'} is better)"


def front_look(number: int) -> dict[str, Any]:
    """Colour and dashes of the other fronts, a look for each."""
    return {"color": OKABE_ITO[1 + number % (len(OKABE_ITO) - 1)], "ls": DASHES[number % len(DASHES)]}


def model_mark(number: int) -> dict[str, Any]:
    """The mark of a single model, a shape for each."""
    face = INK if number < len(MARKERS) else "white"
    return {"marker": MARKERS[number % len(MARKERS)], "color": INK, "mfc": face, "ls": "", "ms": 6}


def legend_below(place: Figure | Axes, handles: Sequence[Line2D], inches: float) -> None:
    """One legend for everything, under what is drawn, in as many columns as fit into the width.

    A figure of ours grows by the legend's lines; axes of the user's own figure get it below them.
    """
    if not handles:
        return
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = max(1, min(4, len(handles), int(inches / (longest * _LETTER + 0.6))))
    style: dict[str, Any] = {"fontsize": SMALL, "frameon": False, "ncols": columns, "labelcolor": INK}
    if isinstance(place, Figure):
        place.set_figheight(place.get_figheight() + _LINE * -(-len(handles) // columns))
        place.legend(handles=handles, loc="outside lower left", **style)
    else:
        place.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.0, -0.24), **style)


def plain(ax: Axes) -> None:
    """Two thin spines, a pale grid behind the data."""
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(GREY)
    ax.tick_params(labelsize=SMALL, color=GREY, labelcolor=INK)
    ax.grid(color=PALE, lw=0.5)
    ax.set_axisbelow(True)
