"""Direct labels: text beside the thing it names, placed so that it hides neither data nor other text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.transforms import Bbox


def label_directly(
    ax: Axes,
    labels: list[tuple[str, np.ndarray, str]],
    curves: list[np.ndarray],
    marks: list[np.ndarray],
    size: float,
) -> None:
    """Write each label beside one of its anchors, where it covers least of marks, curves and earlier labels.

    Args:
        ax: drawn axes.
        labels: text, anchors [A, 2] in data coordinates and colour of each label.
        curves: what should stay visible, [P, 2] each.
        marks: single points, [2] each, that must not be hidden nor claimed by another point's label.
        size: of the letters, in points.
    """
    figure = ax.get_figure(root=True)
    if figure is None or not labels:
        return
    canvas: Any = figure.canvas if isinstance(figure.canvas, FigureCanvasAgg) else FigureCanvasAgg(figure)
    canvas.draw()  # lays the figure out, so that data map to their final pixels
    renderer, pixel = canvas.get_renderer(), figure.dpi / 72
    room = _Room(
        lines=np.concatenate([ax.transData.transform(_dense(curve)) for curve in curves]),
        marks=ax.transData.transform(np.array(marks).reshape(-1, 2)),
        inside=ax.get_window_extent(renderer),
    )
    for label, anchors, colour in labels:
        text = ax.annotate(
            label, tuple(anchors[0]), xytext=(0, 0), textcoords="offset points", fontsize=size, color=colour,
            zorder=8,
        )  # fmt: skip
        box = text.get_window_extent(renderer)
        spots: list[tuple[float, int, np.ndarray, np.ndarray, tuple[float, float], Bbox]] = []
        for anchor, at in zip(anchors, ax.transData.transform(anchors), strict=True):
            for reach in (6.0, 10.0, 16.0, 24.0, 36.0):
                for dx, dy in _offsets(reach, box.width / pixel, box.height / pixel):
                    low = at + np.array([dx, dy]) * pixel
                    spot = Bbox.from_bounds(low[0], low[1], box.width, box.height)
                    spots.append((room.cost(spot, at) + 0.3 * reach, len(spots), anchor, at, (dx, dy), spot))
        _, _, anchor, at, offset, spot = min(spots)
        text.xy = tuple(anchor)
        text.set_position(offset)
        room.taken.append(spot)
        near = np.clip(at, spot.min, spot.max)
        if np.hypot(*(near - at)) > 7 * pixel:  # not beside its point: a thin line leads there
            room.lines = np.vstack([room.lines, np.linspace(at, near, 12)])
            ends = ax.transData.inverted().transform([at, near])
            ax.plot(*ends.T, color=colour, lw=0.6, zorder=7, scalex=False, scaley=False)


@dataclass
class _Room:
    """What a label may hide, in pixels: points on lines [L, 2], marks [K, 2], the axes, earlier labels."""

    lines: np.ndarray
    marks: np.ndarray
    inside: Bbox
    taken: list[Bbox] = field(default_factory=list)

    def cost(self, spot: Bbox, at: np.ndarray) -> float:
        """How bad a label in `spot` for the point `at` would be."""
        wide = spot.padded(3)
        covered = ((self.lines >= wide.min) & (self.lines <= wide.max)).all(axis=1).sum()
        gaps = np.linalg.norm(np.clip(self.marks, spot.min, spot.max) - self.marks, axis=1)
        own = np.linalg.norm(np.clip(at, spot.min, spot.max) - at)
        foreign = np.linalg.norm(self.marks - at, axis=1) > 1
        hidden = (gaps < 7).sum()  # a mark, its own point's too, reaches about 6 pixels
        claimed = (foreign & (gaps < own + 4)).sum()
        overlaps = sum(wide.overlaps(other) for other in self.taken)
        way = np.linspace(at, np.clip(at, spot.min, spot.max), 12)
        crossed = sum(((way >= other.min) & (way <= other.max)).all(axis=1).any() for other in self.taken)
        leader = way[np.linalg.norm(way - at, axis=1) > 14]  # beyond the mark itself
        struck = (np.abs(leader[:, None] - self.lines).max(axis=2) < 5).any(axis=1).sum()
        low, high = np.subtract(self.inside.min, spot.min), np.subtract(spot.max, self.inside.max)
        outside = np.maximum(low, 0).sum() + np.maximum(high, 0).sum()
        return float(
            2 * covered
            + 20 * hidden
            + 12 * claimed
            + 100 * overlaps
            + 50 * crossed
            + 6 * struck
            + 5 * outside
        )


def _dense(curve: np.ndarray, between: int = 8) -> np.ndarray:
    where = np.linspace(0, len(curve) - 1, (len(curve) - 1) * between + 1)
    return np.column_stack([np.interp(where, np.arange(len(curve)), column) for column in curve.T])


def _offsets(reach: float, width: float, height: float) -> list[tuple[float, float]]:
    # From the point to the text's lower left corner, in points: right, left, above, below, four corners.
    return [
        (reach, -height / 2),
        (-reach - width, -height / 2),
        (-width / 2, reach),
        (-width / 2, -reach - height),
        (reach * 0.7, reach * 0.7),
        (-reach * 0.7 - width, reach * 0.7),
        (reach * 0.7, -reach * 0.7 - height),
        (-reach * 0.7 - width, -reach * 0.7 - height),
    ]
