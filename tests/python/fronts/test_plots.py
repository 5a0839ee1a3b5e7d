"""Pictures: what is drawn is what the front holds, and labels do not hide each other."""

from __future__ import annotations

import subprocess
import sys
from itertools import compress
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from paretofuse.engine.routing.preference import simplex_grid
from paretofuse.fronts.front import Front

NAMES = tuple("abcdefghijklmnop")


def front_of(objectives: int, points: int, metrics: int | None = None, maximize: bool = True) -> Front:
    grid = simplex_grid(objectives, points)
    mix = np.random.default_rng(objectives).uniform(0, 1, (objectives, metrics or objectives))
    sign = 1.0 if maximize else -1.0
    values = sign * np.sqrt(grid @ mix)
    return Front(grid, values, NAMES[:objectives], NAMES[: values.shape[1]], maximize)


SHAPES = [(2, 11, 2), (3, 5, 3), (3, 4, 2), (3, 4, 1), (5, 3, 5), (2, 5, 4), (12, 2, 12)]


@pytest.mark.parametrize(("objectives", "points", "metrics"), SHAPES)
@pytest.mark.parametrize("maximize", [True, False])
@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_every_kind_is_saved(
    tmp_path: Path, objectives: int, points: int, metrics: int, maximize: bool, suffix: str
) -> None:
    front = front_of(objectives, points, metrics, maximize)
    path = tmp_path / f"front.{suffix}"
    figure = front.plot(
        path,
        points={"base": front.values.mean(axis=0)},
        others={
            "soups": Front(front.preferences, front.values * 0.9, front.objectives, front.metrics, maximize)
        },
        title="A title",
    )
    assert isinstance(figure, Figure)
    assert path.stat().st_size > 3000


def drawn_offsets(figure: Figure) -> np.ndarray:
    return np.concatenate([np.asarray(part.get_offsets()) for part in figure.axes[0].collections])


def test_curve_draws_every_point_and_hollows_the_dominated() -> None:
    values = np.array([[1.0, 0.0], [0.4, 0.4], [0.5, 0.5], [0.0, 1.0]])
    grid = np.array([[1.0, 0.0], [0.6, 0.4], [0.5, 0.5], [0.0, 1.0]])
    figure = Front(grid, values, ("a", "b"), ("a", "b")).plot()
    full, hollow = figure.axes[0].collections
    np.testing.assert_array_equal(np.sort(drawn_offsets(figure), axis=0), np.sort(values, axis=0))
    np.testing.assert_array_equal(np.asarray(hollow.get_offsets()), [[0.4, 0.4]])
    assert hollow.get_facecolor()[0].tolist() == [1, 1, 1, 1]
    assert "dominated by another preference" in legend_of(figure)
    line = figure.axes[0].lines[0]
    np.testing.assert_array_equal(line.get_xydata(), values[::-1])  # in order of the preference
    assert len(full.get_offsets()) == 3


def legend_of(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def text_boxes(figure: Figure) -> list[tuple[str, Bbox]]:
    """Every text that a picture shows, with the pixels it takes."""
    figure.canvas.draw()
    texts: list[Text] = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
    for ax in figure.findobj(Axes):
        texts += [*ax.texts, ax.title, ax._left_title]
        for axis in (ax.xaxis, ax.yaxis) if ax.axison else ():
            low, high = sorted(axis.get_view_interval())
            inside = [low <= place <= high for place in axis.get_majorticklocs()]
            texts += [axis.label, *compress(axis.get_majorticklabels(), inside)]
    renderer = figure.canvas.get_renderer()
    return [(text.get_text(), text.get_window_extent(renderer)) for text in texts if text.get_text().strip()]


LONG = (
    "sentiment of film reviews (accuracy)",
    "topics of news articles, BBC corpus (accuracy)",
    "emotions of tweets in five languages (accuracy)",
    *(f"accuracy on the held-out examples of task {number}" for number in range(4, 9)),
)


def long_front(objectives: int, metrics: tuple[str, ...] | None = None) -> Front:
    front = front_of(objectives, 4 if objectives < 8 else 2, len(metrics) if metrics else None)
    return Front(front.preferences, front.values, LONG[:objectives], metrics or LONG[:objectives])


@pytest.mark.parametrize("objectives", [2, 3, 5, 8])
@pytest.mark.parametrize("short", [False, True])
def test_no_text_on_another_and_all_on_the_page(objectives: int, short: bool) -> None:
    front = long_front(objectives)
    if short:
        front = Front(front.preferences, front.values, NAMES[:objectives], NAMES[:objectives], False)
    near = front.values.mean(axis=0)
    points = {
        name: near + 0.001 * i for i, name in enumerate(("base", "plain average of the experts", "TIES"))
    }
    others = {
        "rewarded soups": Front(
            front.preferences, front.values * 0.9, front.objectives, front.metrics, front.maximize
        )
    }
    figure = front.plot(points=points, others=others, title="A title over it all")
    boxes = text_boxes(figure)
    page = figure.bbox.padded(1)
    for number, (text, box) in enumerate(boxes):
        assert page.x0 <= box.x0 <= box.x1 <= page.x1, text
        assert page.y0 <= box.y0 <= box.y1 <= page.y1, text
        for other, taken in boxes[:number]:
            assert not Bbox.intersection(box.padded(-1), taken.padded(-1)), f"{text!r} on {other!r}"


@pytest.mark.parametrize("objectives", [2, 3, 8])
def test_no_text_on_data(objectives: int) -> None:
    """Names stand in the legend and beside the axes: no text box holds a drawn point."""
    front = long_front(objectives)
    figure = front.plot(points={"base": front.values.mean(axis=0)})
    boxes = text_boxes(figure)
    for ax in figure.axes:
        marks = [
            np.column_stack(line.get_data()) for line in ax.lines if line.get_transform() == ax.transData
        ]
        marks += [np.asarray(part.get_offsets()) for part in ax.collections if len(part.get_offsets())]
        for pixel in ax.transData.transform(np.vstack([m for m in marks if m.size] or [np.empty((0, 2))])):
            assert not [text for text, box in boxes if box.contains(*pixel)]


@pytest.mark.parametrize("objectives", [2, 3, 8])
def test_one_legend_names_everything_and_axes_say_which_way_is_better(objectives: int) -> None:
    front = long_front(objectives)
    points = {"base": front.values.mean(axis=0), "TIES": front.values.min(axis=0)}
    others = {"rewarded soups": Front(front.preferences, front.values, front.objectives, front.metrics)}
    figure = front.plot(points=points, others=others, label="ours")
    assert len(figure.legends) == 1
    told = " ".join(text.replace("\n", " ") for text, _ in text_boxes(figure))
    for name in ("base", "TIES", "rewarded soups", "ours"):
        assert name in told
    assert told.count("(higher is better)") == objectives
    markers = {tuple(h.get_marker()) for h in figure.legends[0].legend_handles if h.get_label() in points}
    assert len(markers) == 2


def test_ternary_has_a_panel_for_each_metric_and_marks_the_best() -> None:
    front = front_of(3, 5)
    figure = front.plot()
    panels = [ax for ax in figure.axes if any("★" in text.get_text() for text in ax.texts)]
    assert len(panels) == 3
    for column, ax in enumerate(panels):
        best = front.values[:, column].max()
        assert any(f"{best:.4g}" in text.get_text() for text in ax.texts)


def test_ternary_of_preferences_on_a_line_still_draws() -> None:
    grid = simplex_grid(2, 4) @ np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    figure = Front(grid, grid, NAMES[:3], NAMES[:3]).plot()
    assert len(figure.axes) >= 3


def test_parallel_draws_a_line_for_each_preference_with_the_best_on_top() -> None:
    front = front_of(4, 3, maximize=False)
    ax = front.plot().axes[0]
    curves = [line.get_ydata() for line in ax.lines if len(line.get_ydata()) == 4]
    assert len(curves) == len(front)
    for row, curve in zip(front.values, curves, strict=True):
        np.testing.assert_allclose(curve, (front.values.max(0) - row) / np.ptp(front.values, axis=0))


def test_constant_metrics_draw() -> None:
    for objectives in (2, 3, 4):
        grid = simplex_grid(objectives, 3)
        Front(grid, np.ones_like(grid), NAMES[:objectives], NAMES[:objectives]).plot()


def test_draws_into_given_axes_and_leaves_pyplot_alone() -> None:
    figure = Figure()
    FigureCanvasAgg(figure)
    left, _ = figure.subplots(1, 2)
    assert front_of(2, 5).plot(ax=left) is figure
    assert len(left.lines) == 1
    code = (
        "import sys; import numpy as np; from paretofuse.fronts.front import Front; "
        "Front(np.eye(2), np.eye(2), ('a', 'b'), ('a', 'b')).plot(); "
        "sys.exit('matplotlib.pyplot' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_missing_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    for name in [f"paretofuse.fronts.{name}" for name in ("plots", "curve", "ternary", "parallel", "style")]:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr("paretofuse.fronts.plots", raising=False)
    with pytest.raises(ImportError, match=r"paretofuse\[plot\]"):
        front_of(2, 3).plot()


def test_pictures_make_missing_parents(tmp_path: Path) -> None:
    front_of(2, 3).plot(tmp_path / "new" / "deep" / "front.png")
    assert (tmp_path / "new" / "deep" / "front.png").stat().st_size > 0


def test_what_does_not_fit_is_an_error() -> None:
    front = front_of(2, 3)
    with pytest.raises(ValueError, match="for point 'base', expected 2 finite numbers"):
        front.plot(points={"base": [1, 2, 3]})
    with pytest.raises(ValueError, match="got front 'other' with metrics"):
        front.plot(others={"other": front_of(3, 3)})
    with pytest.raises(ValueError, match="at least two metrics"):
        front_of(2, 3, 1).plot()
    with pytest.raises(ValueError, match="ternary"):
        front_of(3, 3).plot(ax=Figure().subplots())
