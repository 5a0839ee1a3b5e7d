"""Runs that go on: exactly, after any end, longer, and never as another run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    TensorDataset,
)

import paretofuse as pf
from paretofuse.engine.engine import Engine
from paretofuse.engine.solvers import EPO
from paretofuse.engine.training.checkpoint import read_checkpoint, write_checkpoint
from tests.support.models import perturbed
from tests.training.test_fit import equal, loss, problem, state


class StopError(Exception):
    """Stands for a crash."""


@pytest.mark.parametrize("end", ["error", "kill"])
@pytest.mark.parametrize(
    "sampling", [{}, {"sampler": "dirichlet", "preferences_per_step": 3, "corner_every": 4}]
)
def test_resume_is_exact(tmp_path: Path, sampling: dict[str, Any], end: str) -> None:
    engine, objectives = problem()
    pf.fit(engine, objectives, steps=23, seed=1, **sampling, log=tmp_path / "whole.csv", progress=False)
    whole = state(engine)
    path = tmp_path / "run.ckpt"

    def crash(record: dict[str, float]) -> None:
        if record["step"] == 17:
            shutil.copy(path, tmp_path / "killed.ckpt")  # what SIGKILL would leave
            raise StopError

    settings = {"steps": 23, "seed": 1, "checkpoint": path, "checkpoint_every": 5, **sampling}
    engine, objectives = problem()
    with pytest.raises(StopError):
        pf.fit(engine, objectives, callback=crash, log=tmp_path / "cut.csv", progress=False, **settings)
    if end == "kill":
        shutil.copy(tmp_path / "killed.ckpt", path)
    engine, objectives = problem()
    records = pf.fit(engine, objectives, log=tmp_path / "cut.csv", progress=False, **settings)
    assert records[0]["step"] == (18 if end == "error" else 16)
    assert equal(whole, state(engine))
    assert (tmp_path / "cut.csv").read_text() == (tmp_path / "whole.csv").read_text()
    assert pf.fit(engine, objectives, progress=False, **settings) == []
    assert equal(whole, state(engine))


def signalled(number: int) -> Any:
    def callback(record: dict[str, float]) -> None:
        if record["step"] == 3:
            os.kill(os.getpid(), number)

    return callback


@contextmanager
def default_handler(number: int) -> Iterator[None]:
    """As in a terminal: a shell's background jobs ignore SIGINT, and nohup SIGHUP."""
    default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(number, default)
    try:
        yield
        assert signal.getsignal(number) is default
    finally:
        signal.signal(number, before)


ENDS = {"SIGINT": KeyboardInterrupt, "SIGTERM": SystemExit, "SIGHUP": SystemExit}


@pytest.mark.parametrize("name", ENDS)
def test_an_interruption_before_the_first_checkpoint_loses_nothing(tmp_path: Path, name: str) -> None:
    number = getattr(signal, name)
    settings: dict[str, Any] = {"steps": 8, "checkpoint": tmp_path / "c", "progress": False}
    engine, objectives = problem()
    with default_handler(number), pytest.raises(ENDS[name]):
        pf.fit(engine, objectives, callback=signalled(number), **settings)
    engine, objectives = problem()
    assert [r["step"] for r in pf.fit(engine, objectives, **settings)] == [4, 5, 6, 7, 8]
    whole, objectives = problem()
    pf.fit(whole, objectives, steps=8, progress=False)
    assert equal(state(engine), state(whole))


def test_a_signal_that_somebody_handles_stays_theirs(tmp_path: Path) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        engine, objectives = problem()
        pf.fit(
            engine, objectives, steps=5, callback=signalled(signal.SIGTERM), checkpoint=tmp_path / "c", progress=False
        )  # fmt: skip
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]


def test_sigterm_ends_a_process_with_its_checkpoint(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from tests.training.test_fit import problem; import paretofuse as pf\n"
        "engine, objectives = problem()\n"
        "pf.fit(engine, objectives, steps=50, checkpoint=sys.argv[1], progress=False,\n"
        "       callback=lambda r: r['step'] == 3 and os.kill(os.getpid(), signal.SIGTERM))\n"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "c")], env={**os.environ, "PYTHONPATH": root}, check=False
    )  # fmt: skip
    assert done.returncode == 143
    engine, objectives = problem()
    records = pf.fit(
        engine, objectives, steps=50, checkpoint=tmp_path / "c", progress=False, callback=lambda r: True
    )
    assert records[0]["step"] == 4


def test_an_error_in_the_middle_of_a_step_loses_nothing_and_repeats_it(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": 6, "checkpoint": tmp_path / "c", "progress": False}
    engine, objectives = problem()
    whole, _ = problem()
    pf.fit(whole, objectives, steps=6, progress=False)
    calls: list[int] = []

    def fragile(module: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise StopError
        return loss(module, batch)

    broken = [objectives[0], pf.Objective("right", objectives[1].data, fragile)]
    with pytest.raises(StopError):
        pf.fit(engine, broken, **settings)
    engine, objectives = problem()
    assert [r["step"] for r in pf.fit(engine, objectives, **settings)] == [4, 5, 6]
    assert equal(state(engine), state(whole))


def test_an_error_before_the_first_step_leaves_no_checkpoint(tmp_path: Path) -> None:
    engine, _ = problem()
    objectives = {name: ([1], lambda module, batch: module(batch)) for name in engine.objectives}
    with pytest.raises(TypeError):
        pf.fit(engine, objectives, steps=2, checkpoint=tmp_path / "c", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_finished_run_can_be_lengthened(tmp_path: Path) -> None:
    """The rest follows the longer run's cosine: a rise to what that has there, then its fall."""
    engine, objectives = problem()
    settings: dict[str, Any] = {"lr": 0.1, "lr_end": 0.0, "checkpoint": tmp_path / "c", "progress": False}
    first = pf.fit(engine, objectives, steps=4, log=tmp_path / "log.csv", **settings)
    more = pf.fit(engine, objectives, steps=8, log=tmp_path / "log.csv", **settings)
    assert [record["step"] for record in more] == [5, 6, 7, 8]
    rates = [0.05 * (1 + np.cos(np.pi * step / 8)) for step in range(4, 8)]
    assert [record["lr"] for record in more] == pytest.approx(rates)
    assert more[0]["lr"] > first[-1]["lr"]
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 9
    assert engine.training is not None
    assert engine.training["steps"] == 8
    with pytest.raises(ValueError, match=r"got steps=4, but .* holds a run of 8 steps"):
        pf.fit(engine, objectives, steps=4, **settings)


@dataclass(frozen=True)
class Scaled:
    """A solver with a parameter."""

    strength: float

    def __call__(self, losses: Tensor, jacobian: Tensor, preference: Tensor) -> Tensor:
        return self.strength * jacobian.sum(dim=0)


class Plain:
    """The same, no dataclass."""

    def __init__(self, strength: float) -> None:
        self.inner = {"strength": torch.tensor([strength])}

    def __call__(self, losses: Tensor, jacobian: Tensor, preference: Tensor) -> Tensor:
        return self.inner["strength"].double() * jacobian.sum(dim=0)


def scaled(losses: Tensor, jacobian: Tensor, preference: Tensor, strength: float) -> Tensor:
    return strength * jacobian.sum(dim=0)


OTHER_SOLVERS: dict[str, tuple[Any, Any, str]] = {
    "a parameter": (EPO(), EPO(1e-2), r"method\.tolerance=0\.0001 \(now 0\.01\)"),
    "an option": ({"method": "stch", "options": {"smoothing": 0.1}}, {"method": "stch"}, ""),
    "a user's own": (Scaled(1.0), Scaled(2.0), r"method\.strength=1\.0 \(now 2\.0\)"),
    "within an attribute": (Plain(1.0), Plain(2.0), r"method\.inner\.strength=\[1\.0\] \(now \[2\.0\]\)"),
    "partial": (partial(scaled, strength=1.0), partial(scaled, strength=2.0), r"method\.options\.strength"),
    "another": ("ls", "mgda", r"method='LinearScalarization' \(now"),
}


@pytest.mark.parametrize("kind", OTHER_SOLVERS)
def test_another_solver_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    first, second, words = OTHER_SOLVERS[kind]
    first, second = (given if isinstance(given, dict) else {"method": given} for given in (first, second))
    if kind == "an option":
        second = {"method": "stch", "options": {"smoothing": 0.2}}
        words = r"method\.smoothing=0\.1 \(now 0\.2\)"
    settings: dict[str, Any] = {"steps": 2, "checkpoint": tmp_path / "c", "progress": False}
    engine, objectives = problem()
    pf.fit(engine, objectives, **first, **settings)
    assert pf.fit(engine, objectives, **first, **settings) == []
    before = state(engine)
    with pytest.raises(ValueError, match=f"belongs to a run with {words}"):
        pf.fit(engine, objectives, **second, **settings)
    assert equal(state(engine), before)


def test_a_solver_by_name_and_the_same_by_object_are_one(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": 2, "checkpoint": tmp_path / "c", "progress": False}
    engine, objectives = problem()
    pf.fit(engine, objectives, "epo", **settings)
    assert pf.fit(engine, objectives, EPO(), **settings) == []


def test_an_aggregator_of_torchjd_is_described_with_its_parameters(tmp_path: Path) -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    settings: dict[str, Any] = {
        "steps": 2,
        "checkpoint": tmp_path / "c",
        "progress": False,
        "method": "torchjd",
    }
    engine, objectives = problem()
    given = {"aggregator": aggregation.Constant(torch.tensor([0.5, 0.5]).double()), "preference": "ignore"}
    pf.fit(engine, objectives, options=given, **settings)
    assert pf.fit(engine, objectives, options=given, **settings) == []
    given = {"aggregator": aggregation.Constant(torch.tensor([0.5, 0.6]).double()), "preference": "ignore"}
    with pytest.raises(ValueError, match="belongs to a run with method"):
        pf.fit(engine, objectives, options=given, **settings)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"reference": (3.0, 4.0)}, r"validation\.reference=\[3\.0, 3\.0\] \(now \[3\.0, 4\.0\]\)"),
        ({"reference": None}, r"validation\.reference="),
        ({"every": 2}, r"validation\.every=1 \(now 2\)"),
        ({"patience": 9}, r"validation\.patience="),
        ({"maximize": (False, True)}, r"validation\.maximize="),
        ({"preferences": [[1.0, 0.0]]}, r"validation\.preferences\.?"),
    ],
)
def test_another_validation_is_refused_by_name(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    engine, objectives = problem()

    def losses(module: nn.Module) -> dict[str, float]:
        return pf.evaluate(module, objectives)

    given: dict[str, Any] = {"reference": (3.0, 3.0), "maximize": False, "every": 1}
    settings: dict[str, Any] = {"steps": 2, "checkpoint": tmp_path / "c", "progress": False}
    pf.fit(engine, objectives, validation=pf.Validation(losses, **given), **settings)
    with pytest.raises(ValueError, match=words):
        pf.fit(engine, objectives, validation=pf.Validation(losses, **{**given, **change}), **settings)
    with pytest.raises(ValueError, match=r"validation=\{.* \(now None\)"):
        pf.fit(engine, objectives, **settings)


@pytest.mark.parametrize("names", [("f1", "accuracy"), ("accuracy", "f1")])
def test_other_metrics_are_refused_at_the_first_validation_after(
    tmp_path: Path, names: tuple[str, str]
) -> None:
    engine, objectives = problem()
    settings: dict[str, Any] = {"checkpoint": tmp_path / "c", "progress": False}
    first, second = (pf.Validation(lambda module, name=name: {name: 1.0}, every=1) for name in names)
    pf.fit(engine, objectives, steps=2, validation=first, **settings)
    with pytest.raises(ValueError, match=rf"got metrics \['{names[1]}'\].*expected \['{names[0]}'\]"):
        pf.fit(engine, objectives, steps=4, validation=second, **settings)


def test_other_mode_and_static_weight_are_refused_by_name(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": 2, "checkpoint": tmp_path / "c", "progress": False}
    pf.fit(*problem(), **settings)
    engine, objectives = problem()
    engine.module.eval()
    with pytest.raises(ValueError, match=r"train_mode=True \(now False\)"):
        pf.fit(engine, objectives, **settings)
    engine, objectives = problem(static_weight=0.7)
    with pytest.raises(ValueError, match=r"static_weight=0\.3 \(now 0\.7\)"):
        pf.fit(engine, objectives, **settings)


def rows_changed(first: int) -> Engine:
    """Experts of which one has other rows from here on, in a tensor of 300 * 300 numbers."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 300), nn.Linear(300, 300), nn.Linear(300, 1))
    experts = {name: perturbed(base, i) for i, name in enumerate(("left", "right"))}
    with torch.no_grad():
        experts["left"][1].weight[first:] += 0.1  # type: ignore[index]
    return pf.stack(base, experts)


def headed(seed: int) -> Engine:
    """Experts that differ from those of another seed in their heads alone."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 1))
    experts = {name: perturbed(base, i) for i, name in enumerate(("left", "right"))}
    torch.manual_seed(seed)
    for expert in experts.values():
        nn.init.normal_(expert[1].weight)  # type: ignore[index]
    return pf.stack(base, experts, heads=["1"])


@pytest.mark.parametrize("made", [rows_changed, headed])
def test_experts_that_begin_alike_and_other_heads_are_refused(
    tmp_path: Path, made: Callable[[int], Engine]
) -> None:
    def train(engine: Engine, steps: int) -> None:
        given = {name: (data_of("list", 3), loss) for name in engine.objectives}
        pf.fit(engine, given, steps=steps, checkpoint=tmp_path / "run.ckpt", progress=False)

    train(made(150), 1)
    with pytest.raises(ValueError, match=r"belongs to a run with tensors='\w{16}' \(now '\w{16}'\); use"):
        train(made(200), 2)
    tensors, kept = read_checkpoint(tmp_path / "run.ckpt")
    train(made(150), 2)
    del kept["settings"]["tensors"]  # as version 0.1.0 wrote it
    write_checkpoint(tmp_path / "run.ckpt", tensors, kept)
    train(made(200), 2)


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """A data set that does not know its length."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(self.rows):
            yield torch.randn(6, generator=generator), torch.randn(1, generator=generator)


def data_of(kind: str, batches: int) -> Any:
    x, y = torch.randn(64, 6), torch.randn(64, 1)
    if kind == "list":
        return [(x[i : i + 4], y[i : i + 4]) for i in range(batches)]
    if kind == "loader":
        return DataLoader(TensorDataset(x[: 4 * batches], y[: 4 * batches]), batch_size=4)
    return DataLoader(Stream(4 * batches), batch_size=4)


@pytest.mark.parametrize("kind", ["list", "loader", "stream"])
def test_less_data_does_not_hang_but_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    settings: dict[str, Any] = {"checkpoint": tmp_path / "c", "progress": False}
    engine, _ = problem()
    pf.fit(engine, {name: (data_of(kind, 8), loss) for name in engine.objectives}, steps=6, **settings)
    before = state(engine)
    less = {name: (data_of(kind, 8 if name == "left" else 3), loss) for name in engine.objectives}
    words = {
        "stream": r"data of objective 'right' has 3 batches, but the run stands after batch 6",
    }.get(kind, r"batches\.right=8 \(now 3\)")
    with pytest.raises(ValueError, match=words):
        pf.fit(engine, less, steps=9, **settings)
    assert equal(state(engine), before)


def test_more_data_is_another_run_too(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"checkpoint": tmp_path / "c", "progress": False}
    engine, _ = problem()
    pf.fit(engine, {name: (data_of("list", 3), loss) for name in engine.objectives}, steps=5, **settings)
    with pytest.raises(ValueError, match=r"batches\.left=3 \(now 4\)"):
        pf.fit(engine, {name: (data_of("list", 4), loss) for name in engine.objectives}, steps=6, **settings)
