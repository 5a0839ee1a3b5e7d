"""Pictures of fronts: a curve for 2 objectives, ternary heat maps for 3, parallel coordinates for more.

Needs matplotlib (the extra "plot"). Figures are made without pyplot, so that nothing global is touched and no
display is needed. Colours: viridis for a scale and the Okabe-Ito palette for categories; both are safe for
colour-blind readers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.tri import Triangulation

from paretofuse.fronts.labels import label_directly

if TYPE_CHECKING:
    from paretofuse.fronts.front import Front

INK, GREY, PALE = "#222222", "#777777", "#dddddd"
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#B8A900", "#444444")
LINES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))
SMALL = 8.5


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
    title: str | None = None,
) -> Figure:
    """Draw a front; see Front.plot, which is the same.

    Raises:
        ValueError: points or others do not have this front's metrics, or there is no picture for its shape.
    """
    marked = {label: _point(front, label, values) for label, values in (points or {}).items()}
    fronts = dict(others or {})
    for label, other in fronts.items():
        if other.metrics != front.metrics:
            raise ValueError(
                f"got front {label!r} with metrics {list(other.metrics)}, expected {list(front.metrics)} "
                "as in the plotted one"
            )
    objectives, metrics = front.preferences.shape[1], front.values.shape[1]
    check_shape(objectives, metrics)
    if objectives == 3:
        if ax is not None:
            raise ValueError(
                "got ax for 3 objectives, expected none: ternary heat maps need several axes; leave it out"
            )
        figure = _ternary(front, marked, fronts, title)
    else:
        figure, axes = _axes(ax, (6.4, 4.6) if metrics == 2 else (min(1.9 + 1.35 * metrics, 13.0), 4.2))
        if objectives == 2 and metrics == 2:
            _curve(front, axes, marked, fronts)
        else:
            _parallel(front, axes, marked, fronts)
        if title:
            axes.set_title(
                title, loc="left", fontsize=11, color=INK, pad=12 if metrics == 2 and objectives == 2 else 28
            )
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160, bbox_inches="tight", facecolor="white")
    return figure


def _point(front: Front, label: str, values: Any) -> np.ndarray:
    point = np.asarray(values, dtype=np.float64)
    if point.shape != (len(front.metrics),) or not np.isfinite(point).all():
        raise ValueError(
            f"got {values} for point {label!r}, expected {len(front.metrics)} finite numbers, "
            f"one for each of {list(front.metrics)}"
        )
    return point


def _axes(ax: Axes | None, size: tuple[float, float]) -> tuple[Figure, Axes]:
    if ax is None:
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        return figure, figure.add_subplot()
    host = ax.get_figure(root=True)
    if host is None:
        raise ValueError("got ax without a figure, expected axes of one; use figure.add_subplot()")
    return host, ax


# Two objectives -----------------------------------------------------------------------------------------


def _curve(front: Front, ax: Axes, points: dict[str, np.ndarray], others: dict[str, Front]) -> None:
    share = front.preferences[:, 0]
    order = np.argsort(share, kind="stable")
    x, y = front.values[order].T
    share, kept = share[order], front.non_dominated()[order]
    scale = ScalarMappable(Normalize(0.0, 1.0), colormaps["viridis"])

    labels: list[tuple[str, np.ndarray, str]] = []
    for number, (label, other) in enumerate(others.items()):
        ordered = other.values[np.argsort(other.preferences[:, 0], kind="stable")]
        dash = LINES[1 + number % (len(LINES) - 1)]
        ax.plot(*ordered.T, color=GREY, lw=1.0, ls=dash, marker=".", ms=3, zorder=2)
        labels.append((label, ordered, GREY))

    ax.plot(x, y, color="#bbbbbb", lw=2.2, zorder=3, solid_capstyle="round")
    colours = scale.to_rgba(share)
    ax.scatter(x[kept], y[kept], s=46, c=colours[kept], edgecolors="white", linewidths=0.8, zorder=5)
    if not kept.all():
        ax.scatter(
            x[~kept], y[~kept], s=38, facecolors="white", edgecolors=colours[~kept], linewidths=1.4, zorder=4
        )
    for label, point in points.items():
        ax.plot(*point, ls="", marker="D", ms=5.5, color=INK, mec="white", mew=0.8, zorder=6)
        labels.append((label, point[None], INK))

    bar = ax.figure.colorbar(scale, ax=ax, pad=0.02, aspect=32, ticks=[0, 0.25, 0.5, 0.75, 1])
    bar.set_label(f"preference for {front.objectives[0]}", fontsize=SMALL, color=INK)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=SMALL, length=0)
    _plain(ax)
    ax.margins(0.09)
    for axis, name, larger in zip((ax.xaxis, ax.yaxis), front.metrics, front.directions, strict=True):
        axis.set_label_text(f"{name} ({'higher' if larger else 'lower'} is better)", fontsize=9.5, color=INK)
    if not kept.all():
        ax.text(
            1.0,
            1.01,
            "hollow: dominated",
            transform=ax.transAxes,
            ha="right",
            va="bottom",
            fontsize=SMALL,
            color=GREY,
        )
    curves = [np.column_stack([x, y])] + [other.values for other in others.values()]
    label_directly(ax, labels[len(others) :] + labels[: len(others)], curves, list(points.values()), SMALL)


def _plain(ax: Axes) -> None:
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(GREY)
    ax.tick_params(labelsize=SMALL, color=GREY, labelcolor=INK)
    ax.grid(color=PALE, lw=0.5)
    ax.set_axisbelow(True)


# Three objectives ---------------------------------------------------------------------------------------

_CORNERS = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, np.sqrt(0.75)]])


def _ternary(
    front: Front, points: dict[str, np.ndarray], others: dict[str, Front], title: str | None
) -> Figure:
    three = {
        "": front,
        **{label: other for label, other in others.items() if other.preferences.shape[1] == 3},
    }
    metrics = len(front.metrics)
    figure = Figure(figsize=(3.2 * metrics, 3.0 * len(three) + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(three) + 1, metrics, squeeze=False, height_ratios=[3.0] * len(three) + [0.7])
    for column, name in enumerate(front.metrics):
        larger = front.directions[column]
        every = np.concatenate([shown.values[:, column] for shown in three.values()])
        every = np.append(every, [point[column] for point in points.values()])
        low, high = float(every.min()), float(every.max())
        shades = colormaps["viridis"] if larger else colormaps["viridis_r"]
        norm = Normalize(low, high if high > low else low + 1.0)
        for row, (label, shown) in enumerate(three.items()):
            ax = grid[row, column]
            _triangle(ax, shown, column, shades, norm)
            if column == 0 and label:
                ax.text(-0.16, 0.45, label, rotation=90, ha="center", va="center", fontsize=9.5, color=INK)
        grid[0, column].set_title(
            f"{name} ({'higher' if larger else 'lower'} is better)", fontsize=9.5, color=INK, pad=6
        )
        grid[-1, column].axis("off")
        strip = grid[-1, column].inset_axes((0.1, 0.3, 0.8, 0.17))
        bar = figure.colorbar(ScalarMappable(norm, shades), cax=strip, orientation="horizontal")
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=SMALL, length=2, color=GREY)
        _levels_on_bar(bar.ax, {label: float(point[column]) for label, point in points.items()}, low, high)
    if title:
        figure.suptitle(title, fontsize=11, color=INK, x=0.02, ha="left")
    return figure


def _triangle(ax: Axes, front: Front, column: int, shades: Colormap, norm: Normalize) -> None:
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
    shares = " : ".join(f"{share:.2g}" for share in front.preferences[best])
    ax.text(
        0.5, -0.19, f"★ best {values[best]:.4g} at {shares}", ha="center", va="top", fontsize=SMALL, color=INK
    )
    for (cx, cy), name, ha, va, dy in zip(
        _CORNERS,
        front.objectives,
        ("left", "right", "center"),
        ("top", "top", "bottom"),
        (-0.06, -0.06, 0.06),
        strict=True,
    ):
        ax.text(
            cx - 0.04 if ha == "left" else cx + 0.04 if ha == "right" else cx,
            cy + dy,
            name,
            ha=ha,
            va=va,
            fontsize=SMALL,
            color=INK,
        )
    ax.set_xlim(-0.08, 1.08)
    ax.set_ylim(-0.3, 1.0)
    ax.set_aspect("equal")
    ax.axis("off")


def _levels_on_bar(ax: Axes, levels: dict[str, float], low: float, high: float) -> None:
    """Single models on the colour bar: a stroke each, labels in as many rows as they need."""
    if not levels or high <= low:
        return
    ends: list[float] = []
    for label, value in sorted(levels.items(), key=lambda item: item[1]):
        at = (value - low) / (high - low)
        for colour, width in (("white", 2.4), (INK, 1.2)):
            ax.plot([at, at], [0, 1], color=colour, lw=width, transform=ax.transAxes, clip_on=False)
        wide = 0.0205 * len(label) + 0.03  # of the bar's length, measured at this size and font
        start = float(np.clip(at - wide / 2, -0.1, 1.1 - wide))
        row = next((i for i, end in enumerate(ends) if start > end), len(ends))
        ends[row : row + 1] = [start + wide]
        ax.annotate(
            label, (start + wide / 2, 1), xycoords="axes fraction", xytext=(0, 3 + 10 * row),
            textcoords="offset points", ha="center", va="bottom", fontsize=7.5, color=INK,
            annotation_clip=False, in_layout=False,
        )  # fmt: skip


# More objectives ----------------------------------------------------------------------------------------


def _parallel(front: Front, ax: Axes, points: dict[str, np.ndarray], others: dict[str, Front]) -> None:
    signs = np.where(front.directions, 1.0, -1.0)
    every = np.vstack(
        [front.values, *[other.values for other in others.values()], *[p[None] for p in points.values()]]
    )
    worst, best = (every * signs).min(axis=0), (every * signs).max(axis=0)
    span = np.where(best > worst, best - worst, 1.0)

    def height(values: np.ndarray) -> np.ndarray:
        return np.asarray((values * signs - worst) / span)

    axis = np.arange(len(front.metrics))
    ends: list[tuple[float, str, str]] = []
    for number, (label, other) in enumerate(others.items()):
        dash = LINES[1 + number % (len(LINES) - 1)]
        ax.plot(axis, height(other.values).T, color=GREY, lw=0.6, ls=dash, alpha=0.6, zorder=2)
        ends.append((float(height(other.values)[:, -1].max()), label, GREY))

    objectives, kept = front.preferences.shape[1], front.non_dominated()
    lead, heavy = front.preferences.argmax(axis=1), front.preferences.max(axis=1) > 1 - 1e-9
    tied = (front.preferences >= front.preferences.max(axis=1, keepdims=True) - 1e-9).sum(axis=1) > 1
    for row, values in enumerate(front.values):
        colour = GREY if tied[row] or objectives > len(OKABE_ITO) else OKABE_ITO[lead[row]]
        strong = bool(heavy[row])
        ax.plot(
            axis, height(values), color=colour, lw=2.2 if strong else 0.9, alpha=1.0 if strong else 0.45,
            marker="o" if strong else None, ms=5, mec=colour, mfc=colour if kept[row] else "white",
            zorder=5 if strong else 3,
        )  # fmt: skip
        if strong and objectives <= len(OKABE_ITO):
            ends.append((float(height(values)[-1]), f"all {front.objectives[lead[row]]}", colour))
    for number, (label, point) in enumerate(points.items()):
        ax.plot(
            axis,
            height(point),
            color=INK,
            lw=1.3,
            ls=LINES[1 + number % (len(LINES) - 1)],
            marker="D",
            ms=4,
            zorder=6,
        )
        ends.append((float(height(point)[-1]), label, INK))

    ax.set_xlim(axis[0] - 0.1, axis[-1] + 0.1)
    ax.set_ylim(-0.04, 1.04)
    for side in ax.spines.values():
        side.set_visible(False)
    ax.set_yticks([])
    ax.set_xticks(axis, [""] * len(axis))
    ax.tick_params(length=0)
    for at, name in enumerate(front.metrics):
        ax.axvline(at, color=GREY, lw=0.8, zorder=1)
        low, high = signs[at] * worst[at], signs[at] * (worst[at] + span[at])
        ax.text(at, 1.06, f"{high:.4g}", ha="center", va="bottom", fontsize=SMALL, color=INK)
        ax.text(at, -0.06, f"{low:.4g}", ha="center", va="top", fontsize=SMALL, color=INK)
        better = "" if front.directions[at] else "\n(lower is better)"
        ax.text(at, -0.13, name + better, ha="center", va="top", fontsize=9, color=INK)
    if heavy.any():
        note = "up is better; thick: all weight on one objective"
        ax.text(axis[-1], 1.14, note, ha="right", va="bottom", fontsize=SMALL, color=GREY)
    for y, (end, label, colour) in zip(_spread([end for end, _, _ in ends]), ends, strict=True):
        ax.plot([axis[-1] + 0.02, axis[-1] + 0.16], [end, y], color=colour, lw=0.6, clip_on=False)
        ax.text(axis[-1] + 0.19, y, label, ha="left", va="center", fontsize=SMALL, color=colour)


def _spread(heights: list[float], gap: float = 0.055) -> list[float]:
    """Heights moved apart to at least `gap`, in the same order: a pass up, then a pass down."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    moved = [heights[i] for i in order]
    for i in range(1, len(moved)):
        moved[i] = max(moved[i], moved[i - 1] + gap)
    over = max(0.0, moved[-1] - 1.02) if moved else 0.0
    if over:
        moved[-1] -= over
        for i in range(len(moved) - 2, -1, -1):
            moved[i] = min(moved[i], moved[i + 1] - gap)
    placed = [0.0] * len(heights)
    for place, i in enumerate(order):
        placed[i] = moved[place]
    return placed
