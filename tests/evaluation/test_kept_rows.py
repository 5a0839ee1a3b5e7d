"""Sweeps that are cut short: rows are kept as they come, the same call goes on, and no row of another model counts."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import paretofuse as pf
from paretofuse.engine.engine import Engine
from paretofuse.fronts.front import Front
from tests.training.test_fit import Point


def line() -> Engine:
    return pf.stack(Point(0, 0), {"x": Point(2, 0), "y": Point(0, 2)})


class Evaluation:
    """Counts its calls, and fails at some of them."""

    def __init__(self, failing: int | None = None, error: type[BaseException] = RuntimeError) -> None:
        self.calls, self.failing, self.error = 0, failing, error

    def __call__(self, module: nn.Module) -> dict[str, float]:
        self.calls += 1
        if self.calls == self.failing:
            raise self.error("no more memory")
        return {"x": float(module.w[0]), "y": float(module.w[1])}


GRID = pf.simplex_grid(2, 11)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failure_at_point_nine_keeps_eight_and_the_same_call_goes_on(
    tmp_path: Path, error: type[BaseException]
) -> None:
    out = tmp_path / "deep" / "front.csv"
    with pytest.raises(error) as told:
        pf.sweep(line(), Evaluation(9, error), GRID, out=out, progress=False)
    assert "front.partial.csv" in "".join(getattr(told.value, "__notes__", ["front.partial.csv"]))
    partial = out.with_name("front.partial.csv")
    assert not out.exists()
    rows = list(csv.reader(partial.read_text().splitlines()))
    assert rows[0] == ["preference:x", "preference:y", "value:x", "value:y", "model"]
    assert len(rows) == 9
    second = Evaluation()
    front = pf.sweep(line(), second, GRID, out=out, progress=False)
    assert second.calls == 3
    whole = pf.sweep(line(), Evaluation(), GRID, progress=False)
    assert front == whole == Front.from_csv(out)
    assert not partial.exists()


def test_rows_are_written_one_by_one_and_whole(tmp_path: Path) -> None:
    seen: list[int] = []
    partial = tmp_path / "front.partial.csv"

    def evaluate(module: nn.Module) -> list[float]:
        seen.append(len(partial.read_text().splitlines()) - 1 if partial.exists() else 0)
        assert {path.name for path in tmp_path.iterdir()} <= {"front.partial.csv"}  # nothing half-made
        return [0.0, 1.0]

    pf.sweep(line(), evaluate, GRID, out=tmp_path / "front.csv", progress=False)
    assert seen == list(range(11))


def test_a_finished_sweep_begins_anew_and_the_old_front_stays_until_then(tmp_path: Path) -> None:
    out = tmp_path / "front.csv"
    first = pf.sweep(line(), Evaluation(), GRID, out=out, progress=False)
    with pytest.raises(RuntimeError):
        pf.sweep(line(), Evaluation(5), GRID, out=out, progress=False)
    assert Front.from_csv(out) == first
    again = Evaluation()
    pf.sweep(line(), again, GRID, out=out, progress=False)
    assert again.calls == 11 - 4


def trained(engine: Engine) -> None:
    with torch.no_grad():
        engine.routers.output.bias.add_(0.01)


def other_experts(engine: Engine) -> Engine:
    return pf.stack(Point(0, 0), {"x": Point(2, 0), "y": Point(0, 3)})


@pytest.mark.parametrize("change", [trained, other_experts])
def test_rows_of_another_model_do_not_count(
    tmp_path: Path, change: Callable[[Engine], Engine | None]
) -> None:
    out = tmp_path / "front.csv"
    with pytest.raises(RuntimeError):
        pf.sweep(line(), Evaluation(9), GRID, out=out, progress=False)
    engine = line()
    engine = change(engine) or engine
    evaluation = Evaluation()
    front = pf.sweep(engine, evaluation, GRID, out=out, progress=False)
    # With other experts the first preference gives the same model as before.
    assert evaluation.calls == (11 if change is trained else 10)
    assert front == pf.sweep(engine, Evaluation(), GRID, progress=False)


def test_another_evaluation_does_not_take_the_rows(tmp_path: Path) -> None:
    out = tmp_path / "front.csv"
    with pytest.raises(RuntimeError):
        pf.sweep(line(), Evaluation(9), GRID, out=out, progress=False)

    def other(module: nn.Module) -> dict[str, float]:
        return {"x": 1.0, "y": 2.0, "size": 3.0}

    front = pf.sweep(line(), other, GRID, out=out, progress=False)
    assert front.values.tolist() == [[1.0, 2.0, 3.0]] * 11


def test_a_grid_that_grows_takes_the_rows_it_shares(tmp_path: Path) -> None:
    out = tmp_path / "front.csv"
    with pytest.raises(RuntimeError):
        pf.sweep(line(), Evaluation(3), pf.simplex_grid(2, 3), out=out, progress=False)
    evaluation = Evaluation()
    pf.sweep(line(), evaluation, pf.simplex_grid(2, 5)[::-1], out=out, progress=False)
    assert evaluation.calls == 3


def test_the_second_interruption_loses_nothing_of_the_first(tmp_path: Path) -> None:
    out = tmp_path / "front.csv"
    for expected in (3, 3, 3):
        evaluation = Evaluation(4)
        with pytest.raises(RuntimeError):
            pf.sweep(line(), evaluation, GRID, out=out, progress=False)
        assert evaluation.calls == expected + 1
    evaluation = Evaluation()
    pf.sweep(line(), evaluation, GRID, out=out, progress=False)
    assert evaluation.calls == 2


def test_rows_of_several_processes_are_all_taken_and_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes were cut short; one goes on alone."""
    from paretofuse.engine.evaluation import kept_rows

    out = tmp_path / "front.csv"
    for rank, grid in enumerate((GRID[::2], GRID[1::2])):
        with monkeypatch.context() as patch:
            patch.setattr(kept_rows, "rank_and_size", lambda rank=rank: (rank, 2))
            with pytest.raises(RuntimeError):
                pf.sweep(line(), Evaluation(4), grid, out=out, progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"front.partial.csv", "front.partial1.csv"}
    evaluation = Evaluation()
    pf.sweep(line(), evaluation, GRID, out=out, progress=False)
    assert evaluation.calls == 11 - 6
    assert {path.name for path in tmp_path.iterdir()} == {"front.csv"}


@pytest.mark.parametrize("content", [b"my thesis\n", b"\xff\xfe", b"preference:x,value:x,model\n1,soon,a\n"])
def test_other_files_are_left_alone(tmp_path: Path, content: bytes) -> None:
    evaluation = Evaluation()
    for name, words in (("front.csv", "is no front"), ("front.partial.csv", "does not hold what a sweep")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=words):
            pf.sweep(line(), evaluation, GRID, out=tmp_path / "front.csv", progress=False)
        assert (tmp_path / name).read_bytes() == content
        (tmp_path / name).unlink()
    (tmp_path / "front.csv").touch()  # a name that mktemp made
    pf.sweep(line(), evaluation, GRID, out=tmp_path / "front.csv", progress=False)
    assert evaluation.calls == 11


def test_a_place_that_cannot_be_written_is_told_before_the_work(tmp_path: Path) -> None:
    evaluation = Evaluation()
    with pytest.raises(OSError, match="directory"):
        pf.sweep(line(), evaluation, GRID, out=tmp_path, progress=False)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        pf.sweep(line(), evaluation, GRID, out=tmp_path / "file" / "front.csv", progress=False)
    assert evaluation.calls == 0


def test_wrong_kinds() -> None:
    with pytest.raises(TypeError, match="got Point to sweep, expected an engine"):
        pf.sweep(line().module, Evaluation(), progress=False)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got evaluate=3"):
        pf.sweep(line(), 3, progress=False)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"got preferences=11.*pf\.simplex_grid"):
        pf.sweep(line(), Evaluation(), 11, progress=False)  # type: ignore[arg-type]


def test_values_are_the_very_same_numbers(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    drawn = {tuple(r): rng.normal(size=2) for r in GRID.tolist()}
    out = tmp_path / "front.csv"

    def evaluate(module: nn.Module) -> list[float]:
        nearest = min(drawn, key=lambda r: abs(r[0] - float(module.w[0]) / 2))
        if len(calls) == 6:
            raise RuntimeError
        calls.append(1)
        return drawn[nearest].tolist()

    calls: list[int] = []
    with pytest.raises(RuntimeError):
        pf.sweep(line(), evaluate, GRID, out=out, progress=False)
    calls.clear()
    front = pf.sweep(line(), evaluate, GRID, out=out, progress=False)
    np.testing.assert_array_equal(front.values, np.array(list(drawn.values())))
