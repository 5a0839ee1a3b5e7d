"""Searches: the budget, samplers, bounds, and one study in the hands of several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import paretofuse as pf
from paretofuse.engine.engine import Engine
from paretofuse.fronts.samplers import CHOICES
from tests.support.process import ROOT

optuna = pytest.importorskip("optuna")
from paretofuse.fronts.study import storage_at  # noqa: E402  imports it

pytestmark = pytest.mark.usefixtures("quiet_optuna")


def dial() -> Engine:
    """An engine whose models hold their preference."""
    models = [nn.Linear(3, 1, bias=False) for _ in range(4)]
    with torch.no_grad():
        for model, weight in zip(models, torch.cat([torch.zeros(1, 3), torch.eye(3)]), strict=True):
            model.weight.copy_(weight)
    return pf.stack(models[0], dict(zip("abc", models[1:], strict=True)), route="tensor")


class Evaluation:
    """A bent front, at the preference that the model holds; remembers where it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[float]] = []

    def __call__(self, module: nn.Module) -> dict[str, float]:
        assert not module.training
        shares = module.weight[0].double().clamp(0, 1)
        self.asked.append(shares.tolist())
        turned = shares ** torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)
        a, b, c = (turned / turned.norm()).tolist()
        return {"c": c, "a": a, "b": b}


def test_a_search_finds_more_than_a_grid_of_as_many_points() -> None:
    evaluation = Evaluation()
    front = pf.search(dial(), evaluation, 15, progress=False)
    assert len(front) == len(evaluation.asked) == 15
    assert front.metrics == front.objectives == ("a", "b", "c")
    np.testing.assert_allclose(front.preferences, evaluation.asked, atol=1e-6)
    np.testing.assert_array_equal(front.preferences[:3], np.eye(3))
    grid = pf.sweep(dial(), Evaluation(), pf.simplex_grid(3, 5), progress=False)
    assert len(grid) == 15
    assert front.hypervolume(0) > grid.hypervolume(0)
    assert pf.search(dial(), Evaluation(), 15, progress=False) == front  # the same seed


@pytest.mark.parametrize("sampler", [c for c in CHOICES if c != "gp"] + ["object"])
def test_samplers(sampler: str) -> None:
    chosen = optuna.samplers.RandomSampler(seed=1) if sampler == "object" else sampler
    front = pf.search(dial(), Evaluation(), 12, sampler=chosen, at_least={"c": 0.3}, progress=False)
    assert len(front) == 12
    np.testing.assert_allclose(front.preferences.sum(axis=1), 1)
    assert len({tuple(row) for row in front.preferences}) == 12


def test_smaller_is_better_and_bounds() -> None:
    def losses(module: nn.Module) -> dict[str, float]:
        return {name: -value for name, value in Evaluation()(module).items()}

    front = pf.search(dial(), losses, 14, maximize=False, at_most={"c": -0.6}, ref=0, progress=False)
    assert front.directions == (False, False, False)
    assert (front.values[4:, 2] <= -0.45).mean() > 0.7  # near the bound or beyond it
    assert front.choose(at_most={"c": -0.6}).values["c"] <= -0.6
    with pytest.raises(ValueError, match="got at_least for 'c', of which smaller numbers are better"):
        pf.search(dial(), losses, 14, maximize=False, at_least={"c": -0.6}, progress=False)
    with pytest.raises(
        ValueError, match=r"got at_most for 'd', expected some of the metrics \['a', 'b', 'c'\]"
    ):
        pf.search(dial(), losses, 14, maximize=False, at_most={"d": 1}, progress=False)
    with pytest.raises(ValueError, match="finite"):
        pf.search(dial(), losses, 14, maximize=False, at_most={"c": float("nan")}, progress=False)


def test_a_storage_goes_on_where_it_ended(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'search.db'}"
    first = pf.search(dial(), Evaluation(), 7, storage=storage, progress=False)
    evaluation = Evaluation()
    both = pf.search(dial(), evaluation, 10, storage=storage, progress=False)
    assert len(evaluation.asked) == 3
    np.testing.assert_array_equal(both.values[:7], first.values)
    nothing = Evaluation()
    assert pf.search(dial(), nothing, 10, storage=storage, progress=False) == both
    assert nothing.asked == []
    other = pf.search(dial(), Evaluation(), 5, storage=storage, name="another", progress=False)
    assert len(other) == 5
    engine = dial()
    with torch.no_grad():
        engine.routers.output.bias.add_(0.1)
    for one, evaluate, maximize in (
        (engine, Evaluation(), True),
        (dial(), Evaluation().__call__, True),
        (dial(), Evaluation(), False),
    ):
        with pytest.raises(ValueError, match=r"of another engine, another evaluation or other directions"):
            pf.search(one, evaluate, 12, maximize=maximize, storage=storage, progress=False)


def failing(at: int) -> Callable[[nn.Module], dict[str, float]]:
    evaluation = Evaluation()

    def evaluate(module: nn.Module) -> dict[str, float]:
        if len(evaluation.asked) == at:
            raise KeyError("labels")
        return evaluation(module)

    evaluate.asked = evaluation.asked  # type: ignore[attr-defined]
    return evaluate


def test_what_evaluate_raises_ends_the_search_and_the_rows_are_kept(tmp_path: Path) -> None:
    out = tmp_path / "front.csv"
    with pytest.raises(KeyError, match="labels"):
        pf.search(dial(), failing(6), 9, out=out, progress=False)
    assert not out.exists()
    again = failing(100)
    front = pf.search(dial(), again, 9, out=out, progress=False)
    assert len(again.asked) == 3  # type: ignore[attr-defined]
    assert front == pf.Front.from_csv(out) == pf.search(dial(), failing(100), 9, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["front.csv"]


PROGRAM = """
import sys, time
from pathlib import Path
import optuna
import paretofuse as pf
from tests.python.fronts.test_search import Evaluation, dial
from tests.support.waiting import PATIENCE

folder, own, other = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
evaluation = Evaluation()

def evaluate(module):
    result = evaluation(module)
    count = len(evaluation.asked)
    if count <= 2:  # both are at work before either can be done
        (folder / f"{own}{count}").touch()
        end = time.monotonic() + PATIENCE
        while not (folder / f"{other}{count}").exists():
            assert time.monotonic() < end
            time.sleep(0.01)
    return result

front = pf.search(dial(), evaluate, 9, storage=f"sqlite:///{folder / 'search.db'}", seed=int(own), progress=False)
print(len(evaluation.asked), len(front))
"""


def test_two_processes_share_a_search(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path), *names], cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for names in ("12", "21")
    ]  # fmt: skip
    told = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    asked = [int(out.split()[0]) for out, _ in told]
    with storage_at(f"sqlite:///{tmp_path / 'search.db'}") as opened:
        study = optuna.load_study(study_name="paretofuse", storage=opened)
        done = study.get_trials(states=[optuna.trial.TrialState.COMPLETE])
    assert len(done) in (9, 10)  # both may have begun the last one
    # Both measured the first expert, which was to tell the metrics; trial 0 took one of the two.
    assert sum(asked) == len(done) + 1
    assert min(asked) >= 2
    assert len({tuple(trial.params.values()) for trial in done}) == len(done)


TAKER = """
import sys
import optuna
from paretofuse.fronts.study import storage_at

with storage_at(sys.argv[1]) as storage:
    study = optuna.load_study(study_name="taken", storage=storage)
    print("ready", flush=True)
    sys.stdin.readline()
    print(*(study.ask().number for _ in range(20)))
"""


def test_no_trial_is_taken_twice(tmp_path: Path) -> None:
    """Optuna alone lets two processes take one trial of an SQLite file: 14 of 80 where this was found."""
    url = f"sqlite:///{tmp_path / 'search.db'}"
    with storage_at(url) as opened:
        study = optuna.create_study(study_name="taken", storage=opened)
        for number in range(40):
            study.enqueue_trial({"x": number})
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TAKER, url], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in range(2)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    taken = " ".join(process.communicate()[0] for process in processes).split()
    assert sorted(map(int, taken)) == list(range(40))


def test_a_study_that_is_no_search(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'search.db'}"
    with storage_at(storage) as opened:
        optuna.create_study(study_name="mine", storage=opened).enqueue_trial({"x": 1})
    evaluation = Evaluation()
    with pytest.raises(ValueError, match=r"got name='mine', a study in this storage that no search began"):
        pf.search(dial(), evaluation, 5, storage=storage, name="mine", progress=False)
    assert evaluation.asked == []


def test_a_study_whose_process_died_before_its_first_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = f"sqlite:///{tmp_path / 'search.db'}"
    with storage_at(storage) as opened:
        optuna.create_study(study_name="paretofuse", storage=opened)
    monkeypatch.setattr("paretofuse.fronts.study._LOCKED", 0.0)
    with pytest.raises(ValueError, match=r"whose first process died .* remove it with Optuna"):
        pf.search(dial(), Evaluation(), 5, storage=storage, progress=False)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_no_connection_stays_open(tmp_path: Path) -> None:
    """Python 3.13 warns of those that garbage collection finds."""
    database = tmp_path / "search.db"
    held = []

    def evaluate(module: nn.Module) -> dict[str, float]:
        held.append(open_files().count(str(database)))
        return Evaluation()(module)

    def open_files() -> list[str]:
        return [os.readlink(fd) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()]

    pf.search(dial(), evaluate, 4, storage=f"sqlite:///{database}", progress=False)
    assert max(held) > 0
    assert str(database) not in open_files()


def test_a_database_in_memory() -> None:
    assert len(pf.search(dial(), Evaluation(), 4, storage="sqlite:///:memory:", progress=False)) == 4


def test_wrong_arguments(tmp_path: Path) -> None:
    evaluation = Evaluation()
    for budget in (0, True, 2.5):
        with pytest.raises(ValueError, match=r"got budget=.*at least 1"):
            pf.search(dial(), evaluation, budget, progress=False)  # type: ignore[arg-type]
    for sampler in ("grid", 3):
        with pytest.raises(ValueError, match=r"got sampler=.*expected one of growth, tpe, nsga2, gp, random"):
            pf.search(dial(), evaluation, 5, sampler=sampler, progress=False)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"got storage='search\.db', which cannot be opened"):
        pf.search(dial(), evaluation, 5, storage="search.db", progress=False)
    with pytest.raises(TypeError, match="got storage=5, expected a URL"):
        pf.search(dial(), evaluation, 5, storage=5, progress=False)  # type: ignore[arg-type]
    for bounds in (5, {"a": "few"}):
        with pytest.raises(TypeError, match=r"got at_least=.*, expected a"):
            pf.search(dial(), evaluation, 5, at_least=bounds, progress=False)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got seed=-1, expected at least 0"):
        pf.search(dial(), evaluation, 5, seed=-1, progress=False)
    with pytest.raises(TypeError, match="got evaluate=3"):
        pf.search(dial(), 3, 5, progress=False)  # type: ignore[arg-type]
    (tmp_path / "front.csv").write_text("my thesis")
    with pytest.raises(ValueError, match="is no front"):
        pf.search(dial(), evaluation, 5, out=tmp_path / "front.csv", progress=False)
    assert evaluation.asked == []
    with pytest.raises(ValueError, match="maximize for"):
        pf.search(dial(), evaluation, 5, maximize={"a": True}, progress=False)
