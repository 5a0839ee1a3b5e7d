"""Sweeps: what evaluate may return, what is checked, and what is left behind."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from paretofuse.engine.evaluation.sweep import evaluate_preferences


class Dial:
    """An engine whose live module holds the preference itself."""

    def __init__(self, objectives: tuple[str, ...] = ("cola", "sst2")) -> None:
        self.objectives = objectives
        self.module = torch.nn.Sequential(torch.nn.BatchNorm1d(len(objectives)), torch.nn.Dropout())
        self.seen: list[list[float]] = []

    def switch(self, preference: list[float]) -> None:
        self.seen.append(list(preference))
        with torch.no_grad():
            self.module[0].weight.copy_(torch.tensor(preference))


GRID = np.array([[1.0, 0.0], [0.25, 0.75], [0.0, 1.0]])


def shares(module: torch.nn.Module) -> torch.Tensor:
    return module[0].weight.double()


def test_values_follow_the_switch_in_order() -> None:
    engine = Dial()
    values, metrics = evaluate_preferences(engine, lambda m: shares(m) * 2, GRID, progress=False)
    assert metrics == ("cola", "sst2")
    assert values.dtype == np.float64
    np.testing.assert_array_equal(values, GRID * 2)
    assert engine.seen == GRID.tolist()


@pytest.mark.parametrize("kind", ["dict", "list", "numpy", "tensor", "tensors"])
def test_every_form_of_result(kind: str) -> None:
    def evaluate(module: torch.nn.Module) -> object:
        a, b = shares(module).tolist()
        forms = {"dict": {"sst2": b, "cola": a}, "list": [a, b], "numpy": np.array([a, b])}
        forms |= {"tensor": torch.tensor([a, b]), "tensors": {"cola": torch.tensor(a), "sst2": np.float32(b)}}
        return forms[kind]

    values, metrics = evaluate_preferences(Dial(), evaluate, GRID, progress=False)
    assert metrics == ("cola", "sst2")
    np.testing.assert_array_equal(values, GRID)


def test_other_metrics_keep_their_own_names_and_order() -> None:
    values, metrics = evaluate_preferences(Dial(), lambda m: {"f1": 1, "accuracy": 2}, GRID, progress=False)
    assert metrics == ("f1", "accuracy")
    assert values.tolist() == [[1.0, 2.0]] * 3
    assert evaluate_preferences(Dial(), lambda m: [1, 2, 3], GRID, progress=False)[1][2] == "metric 3"


def test_a_metrics_name_must_fit_into_a_table_of_text() -> None:
    with pytest.raises(ValueError, match="without a zero byte; rename"):
        evaluate_preferences(Dial(), lambda m: {"f\0": 1.0, "g": 2.0}, GRID, progress=False)


def test_eval_mode_without_gradients_and_modes_restored() -> None:
    engine = Dial()
    engine.module.train()
    engine.module[0].eval()  # a frozen BatchNorm inside a training model

    def evaluate(module: torch.nn.Module) -> list[float]:
        assert not any(part.training for part in module.modules())
        assert not torch.is_grad_enabled()
        return [0.0, 0.0]

    evaluate_preferences(engine, evaluate, GRID, progress=False)
    assert [part.training for part in engine.module.modules()] == [True, False, True]
    assert torch.is_grad_enabled()


def test_modes_are_restored_after_an_error() -> None:
    engine = Dial()

    def evaluate(module: torch.nn.Module) -> None:
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        evaluate_preferences(engine, evaluate, GRID, progress=False)
    assert engine.module[1].training


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 10**400])
def test_non_finite_metric_names_the_preference(bad: float) -> None:
    def evaluate(module: torch.nn.Module) -> dict[str, float]:
        return {"cola": bad if shares(module)[0] == 0.25 else 0.5, "sst2": 0.5}

    with pytest.raises(ValueError, match=r"metric 'cola' at preference cola=0.25, sst2=0.75"):
        evaluate_preferences(Dial(), evaluate, GRID, progress=False)


def test_changing_metrics_are_an_error() -> None:
    def evaluate(module: torch.nn.Module) -> dict[str, float]:
        return {"cola": 1.0, "sst2": 1.0} if shares(module)[0] == 1 else {"cola": 1.0}

    with pytest.raises(ValueError, match=r"got metrics \['cola'\].*expected \['cola', 'sst2'\]"):
        evaluate_preferences(Dial(), evaluate, GRID, progress=False)


@pytest.mark.parametrize(
    "bad", [None, 0.5, "0.5", torch.zeros(2, 2), torch.tensor(1.0), {"a": "x"}, [[1, 2]]]
)
def test_what_is_no_metric_is_a_type_error(bad: object) -> None:
    with pytest.raises(TypeError, match="at preference cola=1, sst2=0"):
        evaluate_preferences(Dial(), lambda m: bad, GRID, progress=False)


def test_empty_results_and_empty_grids() -> None:
    with pytest.raises(ValueError, match="no metrics"):
        evaluate_preferences(Dial(), lambda m: {}, GRID, progress=False)
    with pytest.raises(ValueError, match="no preferences"):
        evaluate_preferences(Dial(), lambda m: [1, 2], [], progress=False)
