"""Early stopping and regularization: they keep what did best, resume exactly, and refuse wrong input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import paretofuse as pf
from paretofuse.engine.engine import Engine
from tests.training.test_fit import Point, equal, problem, state
from tests.training.test_resume import StopError

WORST = 3.0
"""The reference of every hypervolume here."""


def losses_of(objectives: list[pf.Objective]) -> Any:
    return lambda module: pf.evaluate(module, objectives)


def held_out(objectives: list[pf.Objective], every: int = 5, patience: int = 2) -> pf.Validation:
    return pf.Validation(
        losses_of(objectives), maximize=False, every=every, patience=patience, reference=(WORST, WORST)
    )


def volume(engine: Engine, objectives: list[pf.Objective]) -> float:
    front = pf.sweep(engine, losses_of(objectives), pf.simplex_grid(2, 5), maximize=False, progress=False)
    return front.hypervolume(WORST)


def worse_after(count: int) -> Any:
    """Losses that fall for a while and rise afterwards, whatever the module."""
    calls: list[int] = []

    def evaluate(module: nn.Module) -> dict[str, float]:
        calls.append(1)
        turn = (len(calls) - 1) // 5  # five preferences a validation
        loss = 1.0 - 0.1 * turn if turn <= count else 1.0 + 0.1 * turn
        return {"left": loss, "right": loss}

    return evaluate


def test_it_stops_and_returns_to_the_best_routers() -> None:
    engine, objectives = problem()
    seen: dict[int, dict[str, Tensor]] = {}

    def keep(record: dict[str, float]) -> None:
        seen[int(record["step"])] = state(engine)

    validation = pf.Validation(worse_after(3), maximize=False, every=4, patience=2)
    records = pf.fit(engine, objectives, steps=100, validation=validation, callback=keep, progress=False)
    assert len(records) == 20  # validated at 0, 4, 8, 12 (best), 16, 20
    assert equal(state(engine), seen[12])
    assert not equal(state(engine), seen[20])
    scores = [record["validation"] for record in records]
    assert scores[11] == max(scores)
    assert scores[0] == scores[2] < scores[3] == scores[6]


def test_routers_that_never_got_better_are_as_they_were() -> None:
    engine, objectives = problem(family="rows")
    before = state(engine)
    validation = pf.Validation(worse_after(0), maximize=False, every=1, patience=3)
    assert len(pf.fit(engine, objectives, steps=50, validation=validation, progress=False)) == 3
    assert equal(state(engine), before)


def test_a_real_validation_is_never_behind_the_last_step() -> None:
    engine, objectives = problem()
    pf.fit(engine, objectives, steps=40, lr=0.3, lr_end=1.0, progress=False)
    last = volume(engine, objectives)
    engine, objectives = problem()
    start = volume(engine, objectives)
    pf.fit(
        engine,
        objectives,
        steps=40,
        lr=0.3,
        lr_end=1.0,
        validation=held_out(objectives, 5, 9),
        progress=False,
    )
    assert volume(engine, objectives) >= max(last, start) - 1e-6  # shuffled batches round otherwise


@pytest.mark.parametrize("regularization", [0.0, 0.3])
def test_resume_is_exact(tmp_path: Path, regularization: float) -> None:
    settings: dict[str, Any] = {"steps": 23, "seed": 1, "regularization": regularization, "progress": False}
    engine, objectives = problem()
    pf.fit(engine, objectives, validation=held_out(objectives, 4, 9), log=tmp_path / "whole.csv", **settings)
    whole = state(engine)

    def crash(record: dict[str, float]) -> None:
        if record["step"] == 17:
            raise StopError

    settings |= {"checkpoint": tmp_path / "run.ckpt", "checkpoint_every": 5, "log": tmp_path / "cut.csv"}
    engine, objectives = problem()
    with pytest.raises(StopError):
        pf.fit(engine, objectives, validation=held_out(objectives, 4, 9), callback=crash, **settings)
    for expected in (6, 0):  # the second time there is nothing left to do
        records = pf.fit(engine, objectives, validation=held_out(objectives, 4, 9), **settings)
        assert len(records) == expected
        assert equal(whole, state(engine))
    assert (tmp_path / "cut.csv").read_text() == (tmp_path / "whole.csv").read_text()
    with pytest.raises(ValueError, match=r"belongs to a run with validation\.every=4 \(now 5\)"):
        pf.fit(engine, objectives, validation=held_out(objectives, 5, 9), **settings)


def test_a_run_that_stopped_early_stays_stopped(tmp_path: Path) -> None:
    engine, objectives = problem()
    settings: dict[str, Any] = {"steps": 50, "checkpoint": tmp_path / "c", "progress": False}
    validation = pf.Validation(worse_after(1), maximize=False, every=2, patience=2)
    assert len(pf.fit(engine, objectives, validation=validation, **settings)) == 6
    best = state(engine)
    engine, objectives = problem()
    assert pf.fit(engine, objectives, validation=validation, **settings) == []
    assert equal(state(engine), best)


def test_validation_leaves_training_as_it_is() -> None:
    """Dropout and data order are the same with and without; the module's mode too."""
    results = []
    for validation in (False, True):
        engine, objectives = problem()
        records = pf.fit(
            engine,
            objectives,
            steps=12,
            validation=held_out(objectives, 3, 9) if validation else None,
            progress=False,
        )
        assert engine.module.training
        results.append([(r["loss/left"], r["loss/right"]) for r in records])
    assert results[0] == results[1]


def test_regularization_pulls_toward_the_start() -> None:
    """Minimizing r'l + s |L - r|^2 with l_m = |2 L - e_m|^2, one group: L = (2 + s) r / (4 + s)."""
    strength = 3.0
    engine = pf.stack(Point(0, 0), {"x": Point(2, 0), "y": Point(0, 2)}, family="scalar")
    optima = {"x": torch.tensor([1.0, 0.0]), "y": torch.tensor([0.0, 1.0])}
    objectives = {name: ([optimum], lambda module, batch: module(batch)) for name, optimum in optima.items()}
    pf.fit(engine, objectives, steps=400, lr=2e-2, lr_end=0.01, regularization=strength, progress=False)
    for r in pf.simplex_grid(2, 6):
        expected = torch.from_numpy((2 + strength) / (4 + strength) * r)
        torch.testing.assert_close(engine.routers(r)[0].double(), expected, rtol=0, atol=0.05)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 16])
def test_default_preferences_are_few_and_hold_the_corners(count: int) -> None:
    grid = pf.Validation(lambda module: [0.0]).grid([f"t{i}" for i in range(count)])
    assert len(grid) == {1: 1, 2: 5, 3: 10, 4: 10}.get(count, 2 * count)
    for corner in np.eye(count):
        assert (grid == corner).all(axis=1).any()


def test_many_metrics_are_estimated_alike_each_time() -> None:
    engine, objectives = problem()
    validation = pf.Validation(lambda module: [1.0 + i / 10 for i in range(8)], every=1, patience=2)
    records = pf.fit(engine, objectives, steps=9, validation=validation, progress=False)
    assert [r["validation"] for r in records] == [records[0]["validation"]] * 2


def test_maximize_and_reference_by_name_are_those_in_order() -> None:
    """A dict that says "smaller is better" once trained for the largest losses."""
    scores = []
    for options in (
        {"maximize": [False, True], "reference": [WORST, -WORST]},
        {"maximize": {"right": True, "left": False}, "reference": {"right": -WORST, "left": WORST}},
        {"maximize": np.array([False, True]), "reference": torch.tensor([WORST, -WORST])},
    ):
        engine, objectives = problem()

        def mixed(module: nn.Module, objectives: Any = objectives) -> dict[str, float]:
            losses = pf.evaluate(module, objectives)
            return {"left": losses["left"], "right": -losses["right"]}

        validation = pf.Validation(mixed, every=2, **options)  # type: ignore[arg-type]
        records = pf.fit(engine, objectives, steps=4, validation=validation, progress=False)
        scores.append([record["validation"] for record in records])
    assert scores[0] == scores[1] == scores[2]
    scores = []
    for options in (
        {"maximize": np.False_, "reference": WORST},
        {"maximize": False, "reference": (WORST, WORST)},
    ):
        engine, objectives = problem()
        validation = pf.Validation(losses_of(objectives), every=2, **options)  # type: ignore[arg-type]
        records = pf.fit(engine, objectives, steps=4, validation=validation, progress=False)
        scores.append([record["validation"] for record in records])
    assert scores[0] == scores[1]
    assert scores[0][0] > 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"maximize": "yes"}, {"maximize": 1}, {"maximize": ["left"]}, {"maximize": {"left": "no"}},
        {"maximize": {0: True}}, {"maximize": None}, {"reference": "3"}, {"reference": True},
        {"reference": {"left": "1"}}, {"reference": [[1.0]]}, {"every": "5"}, {"patience": 2.0},
    ],
)  # fmt: skip
def test_wrong_kinds_are_refused_at_once(wrong: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=next(iter(wrong)) + ".*expected"):
        pf.Validation(lambda module: [0.0], **wrong)
    if "maximize" in wrong:
        engine, _ = problem()
        with pytest.raises(TypeError, match="maximize"):
            pf.sweep(engine, lambda module: pytest.fail("evaluated"), progress=False, **wrong)


def test_what_evaluates_must_be_a_function() -> None:
    with pytest.raises(TypeError, match=r"got evaluate=\{.*evaluate\(module\)"):
        pf.Validation({"left": 1.0})  # type: ignore[arg-type]


def test_wrong_names_end_after_the_first_evaluation() -> None:
    engine, objectives = problem()
    for options in ({"maximize": {"left": True}}, {"reference": {"left": 1.0}}):
        seen: list[int] = []

        def evaluate(module: nn.Module, seen: list[int] = seen) -> dict[str, float]:
            seen.append(1)
            return {"left": 1.0, "right": 1.0}

        with pytest.raises(ValueError, match=r"got .* for"):
            pf.fit(
                engine,
                objectives,
                validation=pf.Validation(evaluate, **options),
                progress=False,  # type: ignore[arg-type]
            )
        assert len(seen) == 1


def test_wrong_input() -> None:
    engine, objectives = problem()
    for name in ("every", "patience"):
        with pytest.raises(ValueError, match=f"got {name}=0"):
            pf.Validation(losses_of(objectives), **{name: 0})
    wrong: dict[str, dict[str, Any]] = {
        "got no preferences for validation": {"preferences": []},
        "sum": {"preferences": [[0.5, 0.6]]},
        "got 3 entries in maximize": {"maximize": [True] * 3},
        r"got reference point \[1.0\]": {"reference": [1.0]},
        "got maximize for": {"maximize": {"left": True, "wrong": False}},
        "got a reference point for": {"reference": {"left": 1.0}},
    }
    for match, options in wrong.items():
        with pytest.raises(ValueError, match=match):
            pf.fit(
                engine, objectives, validation=pf.Validation(losses_of(objectives), **options), progress=False
            )
    with pytest.raises(ValueError, match="got regularization=-1"):
        pf.fit(engine, objectives, regularization=-1, progress=False)
