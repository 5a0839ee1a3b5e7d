"""Pictures: what is drawn is what the front holds, and labels do not hide each other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation

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
    assert "hollow: dominated" in [text.get_text() for text in figure.axes[0].texts]
    line = figure.axes[0].lines[0]
    np.testing.assert_array_equal(line.get_xydata(), values[::-1])  # in order of the preference
    assert len(full.get_offsets()) == 3


@pytest.mark.parametrize("seed", range(4))
def test_labels_do_not_overlap(seed: int) -> None:
    rng = np.random.default_rng(seed)
    points = {"base": [0.6, 0.6], "expert cola": [0.9, 0.3], "expert sst2": [0.3, 0.9]}
    points |= {"plain average": [0.75, 0.72], "task arithmetic": [0.76, 0.725], "best average": [0.75, 0.73]}
    points = {label: list(np.array(point) + rng.normal(0, 0.02, 2)) for label, point in points.items()}
    share = np.linspace(1, 0, 11)
    values = np.stack([0.3 + 0.6 * share**0.4, 0.3 + 0.6 * (1 - share) ** 0.4], axis=1)
    front = Front(np.stack([share, 1 - share], axis=1), values, ("cola", "sst2"), ("cola", "sst2"))
    figure = front.plot(points=points)
    renderer = figure.canvas.get_renderer()
    texts = [text for text in figure.axes[0].texts if isinstance(text, Annotation)]
    assert [text.get_text() for text in texts] == list(points)
    boxes = [text.get_window_extent(renderer) for text in texts]
    inside = figure.axes[0].get_window_extent(renderer).padded(2)
    for i, box in enumerate(boxes):
        assert inside.x0 <= box.x0 <= box.x1 <= inside.x1
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_ternary_has_a_panel_for_each_metric_and_marks_the_best() -> None:
    front = front_of(3, 5)
    figure = front.plot()
    panels = [ax for ax in figure.axes if any("best" in text.get_text() for text in ax.texts)]
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
    for name in ("paretofuse.fronts.plots", "paretofuse.fronts.labels"):
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
