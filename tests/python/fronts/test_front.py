"""Fronts: hypervolume and dominance against brute force, exact files, validation, and sweep."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paretofuse.engine.routing.preference import simplex_grid
from paretofuse.fronts.front import Front
from paretofuse.fronts.sweep import default_preferences, sweep

NAMES = ("cola", "sst2", "mnli", "qqp", "rte")


def front_of(values: np.ndarray, maximize: bool | tuple[bool, ...] = True) -> Front:
    points, metrics = values.shape
    shares = np.random.default_rng(points).dirichlet(np.ones(2), points)
    return Front(shares, values, ("a", "b"), NAMES[:metrics], maximize)


def brute_dominated(values: np.ndarray) -> np.ndarray:
    return np.array([any((other >= row).all() and (other > row).any() for other in values) for row in values])


def brute_hypervolume(values: np.ndarray, ref: np.ndarray) -> float:
    """Inclusion and exclusion over all subsets of boxes."""
    boxes = np.clip(values - ref, 0, None)
    return sum(
        (-1) ** (size + 1) * np.prod(boxes[list(chosen)].min(axis=0))
        for size in range(1, len(boxes) + 1)
        for chosen in itertools.combinations(range(len(boxes)), size)
    )


@pytest.mark.parametrize("metrics", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(3))
def test_hypervolume_and_dominance_are_brute_force(metrics: int, seed: int) -> None:
    values = np.random.default_rng(seed).uniform(-0.2, 1, (9, metrics)).round(1)  # rounded: ties do occur
    ref = np.full(metrics, 0.1)
    for signs, maximize in ((1, True), (-1, False)):
        front = front_of(signs * values, maximize)
        np.testing.assert_array_equal(front.non_dominated(), ~brute_dominated(values))
        assert front.hypervolume(signs * ref) == pytest.approx(brute_hypervolume(values, ref), abs=1e-12)


def test_metrics_may_differ_in_direction() -> None:
    values = np.random.default_rng(5).uniform(0, 1, (8, 2))
    mixed = front_of(values * [1, -1], (True, False))
    both = front_of(values)
    np.testing.assert_array_equal(mixed.non_dominated(), both.non_dominated())
    assert mixed.hypervolume([0, 0]) == pytest.approx(both.hypervolume(0))
    assert mixed.hypervolume({"sst2": 0, "cola": 0}) == mixed.hypervolume([0, 0])


def test_ties_are_not_dominated_and_filtered_keeps_the_hypervolume() -> None:
    front = front_of(np.array([[1.0, 0.0], [0.5, 0.5], [0.5, 0.5], [0.4, 0.5], [0.0, 1.0]]))
    assert front.non_dominated().tolist() == [True, True, True, False, True]
    kept = front.filtered()
    assert len(kept) == 4
    assert kept.hypervolume(0) == front.hypervolume(0)
    np.testing.assert_array_equal(kept.preferences, front.preferences[front.non_dominated()])


finite = st.floats(allow_nan=False, allow_infinity=False)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.tuples(st.floats(0, 1), finite, finite), min_size=1, max_size=6),
    names=st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=0, max_size=6),
        min_size=4,
        max_size=4,
        unique=True,
    ),
    maximize=st.sampled_from([True, False, (True, False)]),
)
def test_csv_is_an_exact_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[float, float, float]],
    names: list[str],
    maximize: bool | tuple[bool, ...],
) -> None:
    table = np.array(rows)
    shares = np.column_stack([table[:, 0], 1 - table[:, 0]])
    front = Front(shares, table[:, 1:], tuple(names[:2]), tuple(names[2:]), maximize)
    path = tmp_path_factory.mktemp("csv") / "front.csv"
    front.to_csv(path)
    again = Front.from_csv(path)
    assert again == front
    assert again.values.tobytes() == front.values.tobytes()
    assert list(path.parent.iterdir()) == [path]


def test_names_that_no_table_of_text_holds_are_refused(tmp_path: Path) -> None:
    shares = np.ones((1, 2)) / 2
    for objectives, metrics in ((("a\0", "b"), ("m", "n")), (("a", "b"), ("m", "\0"))):
        with pytest.raises(ValueError, match="without a zero byte; rename"):
            Front(shares, shares, objectives, metrics)
    broken = tmp_path / "broken.csv"
    broken.write_text("preference:" + "a" * 200_000 + "\n", encoding="utf-8")  # longer than csv reads a cell
    with pytest.raises(ValueError, match=r"broken\.csv', expected a CSV file that to_csv wrote"):
        Front.from_csv(broken)


def test_csv_makes_missing_parents(tmp_path: Path) -> None:
    front_of(np.ones((2, 2))).to_csv(tmp_path / "new" / "deep" / "f.csv")
    assert len(Front.from_csv(tmp_path / "new" / "deep" / "f.csv")) == 2


def test_csv_reads_well(tmp_path: Path) -> None:
    Front(np.array([[0.25, 0.75]]), np.array([[0.5, 3.0]]), ("a", "b"), ("acc", "ppl"), (True, False)).to_csv(
        tmp_path / "f.csv"
    )
    assert (tmp_path / "f.csv").read_text().splitlines() == [
        "preference:a,preference:b,maximize:acc,minimize:ppl",
        "0.25,0.75,0.5,3.0",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected columns"),
        ("a,b\n1,2\n", "expected columns"),
        ("preference:a,maximize:a,preference:b\n1,1,0\n", "expected columns"),
        ("preference:a,maximize:x\n1\n", "in row 2 .*expected 2 numbers"),
        ("preference:a,maximize:x\n1,0.5\n1,half\n", "in row 3"),
        ("preference:a,maximize:x\n1,nan\n", r"values\[0, 0\], expected finite"),
        ("preference:a,maximize:x\n", r"shape \(0, 1\)"),
        ("preference:a,maximize:x\n0.5,1\n", "got preference .* with sum 0.5"),
    ],
)
def test_broken_csv_is_a_clear_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "f.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        Front.from_csv(tmp_path / "f.csv")


def test_csv_of_a_spreadsheet_and_of_no_text(tmp_path: Path) -> None:
    front = front_of(np.eye(2))
    front.to_csv(tmp_path / "f.csv")
    (tmp_path / "marked.csv").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "f.csv").read_bytes())
    assert Front.from_csv(tmp_path / "marked.csv") == front
    (tmp_path / "f.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"got '.*f\.csv', expected a CSV file that to_csv wrote"):
        Front.from_csv(tmp_path / "f.csv")


def test_front_is_frozen_and_independent_of_its_input() -> None:
    values = np.zeros((2, 2))
    front = front_of(values)
    values[:] = 7
    assert front.values.sum() == 0
    with pytest.raises(ValueError, match="read-only"):
        front.values[0, 0] = 1
    with pytest.raises(TypeError, match="unhashable"):
        hash(front)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": np.zeros((3, 2))}, "2 preferences and 3 rows"),
        ({"values": np.zeros((2, 3))}, r"got values of shape \(2, 3\), expected \[P, 2\]"),
        ({"values": np.array([[0, 0], [0, np.inf]])}, r"got inf in values\[1, 1\]"),
        ({"preferences": np.zeros(2)}, r"got preferences of shape \(2,\)"),
        ({"preferences": np.ones((2, 2))}, "got preference .* with sum 2"),
        ({"preferences": np.array([[1, 0], [-1, 2]])}, "got -1 for objective 'a'"),
        ({"metrics": ("x", "x")}, "expected different names"),
        ({"maximize": (True, False, True)}, "got 3 entries in maximize"),
    ],
)
def test_validation(change: dict[str, object], message: str) -> None:
    right = {
        "preferences": np.eye(2), "values": np.zeros((2, 2)), "objectives": ("a", "b"),
        "metrics": ("x", "y"), "maximize": True,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        Front(**{**right, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize("ref", [[0.0], [0, 0, 0], [0, float("nan")], {"cola": 0}, {"cola": 0, "x": 1}])
def test_bad_reference_points(ref: object) -> None:
    with pytest.raises(TypeError, match="reference point"):
        front_of(np.ones((2, 2))).hypervolume("0")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reference point"):
        front_of(np.ones((2, 2))).hypervolume(ref)  # type: ignore[arg-type]


class Line:
    """An engine with a one-parameter module that holds the first share."""

    def __init__(self, objectives: int = 2) -> None:
        self.objectives = NAMES[:objectives]
        self.module = torch.nn.Linear(objectives, 1)
        self.switches = 0

    def switch(self, preference: list[float]) -> None:
        self.switches += 1
        with torch.no_grad():
            self.module.weight.copy_(torch.tensor([preference]))


def evaluate(module: torch.nn.Linear) -> list[float]:
    return (module.weight[0].double() ** 2).tolist()


def test_sweep_default_grid() -> None:
    front = sweep(Line(), evaluate, progress=False)
    np.testing.assert_array_equal(front.preferences, simplex_grid(2, 11))
    np.testing.assert_allclose(front.values, front.preferences**2, rtol=1e-6)
    assert (front.objectives, front.metrics, front.maximize) == (NAMES[:2], NAMES[:2], True)


def test_sweep_takes_preferences_in_any_form() -> None:
    given = [{"sst2": 0.25, "cola": 0.75}, (0.5, 0.5), torch.tensor([0.0, 1.0])]
    front = sweep(Line(), evaluate, given, maximize=False, progress=False)
    np.testing.assert_array_equal(front.preferences, [[0.75, 0.25], [0.5, 0.5], [0, 1]])
    assert front.maximize is False
    matrix = sweep(Line(), evaluate, torch.tensor([[0.5, 0.5]]), progress=False)
    np.testing.assert_array_equal(matrix.preferences, [[0.5, 0.5]])


def test_sweep_checks_every_preference_before_the_first_switch() -> None:
    engine = Line()
    with pytest.raises(ValueError, match="sum of 1"):
        sweep(engine, evaluate, [(0.5, 0.5), (0.5, 0.6)], progress=False)
    with pytest.raises(ValueError, match="no preferences"):
        sweep(engine, evaluate, [], progress=False)
    assert engine.switches == 0


def test_sweep_maximize_by_name() -> None:
    def metrics(module: torch.nn.Module) -> dict[str, float]:
        return {"accuracy": 0.5, "perplexity": 3.0}

    front = sweep(Line(), metrics, maximize={"perplexity": False, "accuracy": True}, progress=False)
    assert front.directions == (True, False)
    wrong = [
        ({"accuracy": True}, "got maximize for"),
        ({"accuracy": True, "perplexityy": False}, "got maximize for"),
        ([True] * 3, "got 3 entries"),
    ]
    for maximize, message in wrong:
        engine = Line()
        with pytest.raises(ValueError, match=message):
            sweep(engine, metrics, maximize=maximize, progress=False)  # type: ignore[arg-type]
        assert engine.switches == 1  # not after the whole sweep
    for flag in (np.True_, np.False_):
        assert sweep(Line(), metrics, maximize=flag, progress=False).maximize is bool(flag)  # type: ignore[arg-type]
    values, names = np.ones((2, 2)), ("perplexity", "accuracy")
    by_name = Front(np.eye(2), values, ("a", "b"), names, {"accuracy": True, "perplexity": False})  # type: ignore[arg-type]
    assert by_name.maximize == (False, True)


def test_sweep_tells_the_metrics_after_the_first_evaluation() -> None:
    engine, told = Line(), []
    sweep(
        engine, evaluate, progress=False, on_metrics=lambda metrics: told.append((metrics, engine.switches))
    )
    assert told == [(NAMES[:2], 1)]


def test_sweep_shows_progress_on_terminals(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep(Line(), evaluate, progress=True)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    sweep(Line(), evaluate, progress=True)
    assert "11/11" in capsys.readouterr().err
    sweep(Line(), evaluate, progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("objectives", [1, 2, 3, 4, 5, 8, 16])
def test_default_grids_stay_small_and_hold_the_corners(objectives: int) -> None:
    grid = default_preferences(objectives)
    assert 1 <= len(grid) <= 136
    np.testing.assert_allclose(grid.sum(axis=1), 1)
    assert {tuple(row) for row in np.eye(objectives)} <= {tuple(row) for row in grid}
