"""Metrics that run against their preferences are told of, with the remedy; what tells nothing is not."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

import paretofuse as pf
from tests.evaluation.test_kept_rows import GRID, line
from tests.training.test_fit import problem


def test_losses_taken_for_scores(logged: list[logging.LogRecord]) -> None:
    def losses(module: nn.Module) -> list[float]:
        return [-float(module.w[0]), -float(module.w[1])]

    front = pf.sweep(line(), losses, GRID, progress=False)
    (note,) = front.notes
    assert "['x', 'y'] get worse" in note
    assert "pass maximize=False" in note
    assert [record.getMessage() for record in logged] == [f"sweep: {note}"]
    logged.clear()
    assert pf.sweep(line(), losses, GRID, maximize=False, progress=False).notes == ()
    assert logged == []


def test_one_wrong_direction_is_named() -> None:
    def mixed(module: nn.Module) -> dict[str, float]:
        return {"y": -float(module.w[1]), "x": float(module.w[0])}

    (note,) = pf.sweep(line(), mixed, GRID, progress=False).notes
    assert "['y'] get worse" in note
    assert "pass maximize={'x': True, 'y': False}" in note
    assert pf.sweep(line(), mixed, GRID, maximize={"x": True, "y": False}, progress=False).notes == ()


@pytest.mark.parametrize(
    "evaluate",
    [lambda module: {"f1": 1 - float(module.w[0]), "accuracy": 0.0}, lambda module: [0.5, 0.5], lambda module: [1.0]],
)  # fmt: skip
def test_what_does_not_tell_has_no_note(evaluate: Callable[[nn.Module], Any]) -> None:
    assert pf.sweep(line(), evaluate, GRID, progress=False).notes == ()


def test_few_preferences_have_no_note() -> None:
    grid = pf.simplex_grid(2, 4)
    front = pf.sweep(line(), lambda module: [-float(module.w[0]), -float(module.w[1])], grid, progress=False)
    assert front.notes == ()


def test_a_validation_tells_before_training(logged: list[logging.LogRecord]) -> None:
    engine, objectives = problem()
    validation = pf.Validation(lambda module: pf.evaluate(module, objectives), every=1)
    pf.fit(engine, objectives, steps=2, validation=validation, progress=False)
    (record,) = logged
    assert "['left', 'right'] get worse" in record.getMessage()
    assert "pass maximize=False" in record.getMessage()
