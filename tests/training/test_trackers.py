"""Trackers by name: what each is told, that a caller's run stays open, and transformers' callbacks."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paretofuse as pf
from tests.support.models import net_and_experts


def fit(log: Any, steps: int = 3) -> list[dict[str, float]]:
    base, experts = net_and_experts(count=2)
    engine = pf.stack(base, experts)
    return pf.fit(
        engine, objectives(), steps=steps, log=log(engine) if callable(log) else log, progress=False
    )


def objectives() -> dict[str, Any]:
    def loss(module: nn.Module, batch: Tensor) -> Tensor:
        result: Tensor = module(batch).square().mean()
        return result

    return {name: ([torch.full((4, 8), float(at))], loss) for at, name in enumerate("ab", 1)}


class Told(ModuleType):
    """A tracker that notes what it is told; stands for all four, whose calls differ."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.events: list[Any] = []
        self.run: Any = None
        self.Run = lambda experiment: self.init(project=experiment)
        self.context_vars = SimpleNamespace(current_run=SimpleNamespace(get=lambda: self.run))

    def init(self, project: str) -> Any:
        print("a word of the tracker's own")
        self.events.append(("begin", project))
        return SimpleNamespace(log=self.log, track=self.log, finish=self.finish, close=self.finish)

    def log(self, values: dict[str, float], step: int) -> None:
        self.events.append((step, values))

    log_metrics = log

    def finish(self) -> None:
        self.events.append("end")

    end_run = finish

    def active_run(self) -> Any:
        return self.run

    def start_run(self) -> Any:
        return self.init("paretofuse")


@pytest.mark.parametrize("name", ["wandb", "mlflow", "aim", "trackio"])
def test_every_record_is_told_and_the_run_ended(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = Told(name)
    monkeypatch.setitem(sys.modules, name, told)
    records = fit(name)
    begin, *steps, end = told.events
    assert (begin, end) == (("begin", "paretofuse"), "end")
    without = [{key: value for key, value in record.items() if key != "step"} for record in records]
    assert steps == list(enumerate(without, 1))
    assert "loss/a" in without[0]
    assert capsys.readouterr().out == ""  # stdout is for what the program itself tells, such as --json


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_callers_run_stays_open(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told(name)
    told.run = SimpleNamespace(log=told.log)
    monkeypatch.setitem(sys.modules, name, told)
    fit(name)
    assert [event[0] for event in told.events] == [1, 2, 3]


def test_wandb_itself_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is among what the tests need")
    monkeypatch.chdir(tmp_path)
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    run = wandb.init(project="mine")
    fit("wandb")
    assert wandb.run is run
    run.finish()
    fit("wandb")
    assert wandb.run is None
    wandb.teardown()  # waits for the process that writes: a run's file may be whole a while after its finish
    files = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    assert all(b"loss/b" in file.read_bytes() and b"equal/a" in file.read_bytes() for file in files)


def test_trackio_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))  # read when it is first imported
    trackio = pytest.importorskip("trackio", reason="trackio is among what the tests need")
    from trackio.sqlite_storage import SQLiteStorage

    records = fit("trackio")
    assert trackio.context_vars.current_run.get() is None
    mine = trackio.init(project="mine")
    fit("trackio")
    assert trackio.context_vars.current_run.get() is mine
    trackio.finish()
    for project in ("paretofuse", "mine"):
        (run,) = trackio.Api().runs(project)
        told = SQLiteStorage.get_logs(project, run.name)
        assert [row["step"] for row in told] == [1, 2, 3]
        for row, record in zip(told, records, strict=True):
            assert {key: row[key] for key in record} == pytest.approx(record)


def test_what_is_no_log_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(
        ImportError, match=r"log='mlflow' needs mlflow, which is not installed: `pip install mlflow`"
    ):
        fit("mlflow")
    with pytest.raises(ValueError, match="got log='wanbd', which looks like the tracker 'wandb'"):
        fit("wanbd")
    with pytest.raises(
        TypeError, match=r"got log of type int, expected a path, a tracker's name, or an object"
    ):
        fit(3)


def test_trainer_callbacks() -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="TrainingArguments needs it")
    events: list[Any] = []

    class Mine(transformers.TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            events.append(("begin", type(more["model"]).__name__, args.report_to))

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
            events.append((state.global_step, logs["loss/a"], state.log_history[-1]["step"]))

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> Any:
            control.should_training_stop = state.global_step == 2
            return control

        def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            events.append("end")

    records = fit(lambda engine: pf.TrainerCallbacks(engine, [Mine]), steps=5)
    assert len(records) == 2
    assert events == [
        ("begin", "Net", []),
        *((at, r["loss/a"], at) for at, r in enumerate(records, 1)),
        "end",
    ]
    with pytest.raises(TypeError, match="got a callback of type str, expected a TrainerCallback"):
        fit(lambda engine: pf.TrainerCallbacks(engine, ["wandb"]))
