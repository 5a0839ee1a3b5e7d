"""Training: learns, repeats bit for bit, resumes exactly, logs, and refuses wrong input."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import paretofuse as pf
from paretofuse.engine.engine import Engine


class Noisy(nn.Module):
    """A small network with dropout, so that the random state matters."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def loss(module: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return nn.functional.mse_loss(module(x), y)


def problem(seed: int = 0, **stacked: Any) -> tuple[Engine, list[pf.Objective]]:
    """Two regression tasks, each with an expert that was really trained on it."""
    torch.manual_seed(seed)
    base = Noisy()
    x = torch.randn(64, 6)
    targets = {"left": x[:, :1].sin(), "right": -x[:, :1].sin() + 0.5 * x[:, 1:2]}
    experts = {}
    for name, y in targets.items():
        expert = Noisy()
        expert.load_state_dict(base.state_dict())
        optimizer = torch.optim.Adam(expert.parameters(), lr=1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            loss(expert, (x, y)).backward()
            optimizer.step()
        experts[name] = expert
    engine = pf.stack(base, experts, **stacked)
    engine.module.train()
    objectives = [
        pf.Objective(name, DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True), loss)
        for name, y in targets.items()
    ]
    return engine, objectives


def state(engine: Engine) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in engine.routers.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a)


class Point(nn.Module):
    """A point in the plane."""

    def __init__(self, x: float, y: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([x, y], dtype=torch.float32))

    def forward(self, target: Tensor) -> Tensor:
        return (self.w - target).square().sum()


def test_it_finds_a_known_pareto_set() -> None:
    """Base at 0, experts at twice the two optima: the scalarized optimum is w = r, so L = r / 2, from L = r."""
    engine = pf.stack(Point(0, 0), {"x": Point(2, 0), "y": Point(0, 2)})
    optima = {"x": torch.tensor([1.0, 0.0]), "y": torch.tensor([0.0, 1.0])}
    objectives = {name: ([optimum], lambda module, batch: module(batch)) for name, optimum in optima.items()}
    records = pf.fit(engine, objectives, steps=400, lr=2e-2, lr_end=0.01, progress=False)
    for r in pf.simplex_grid(2, 6):
        torch.testing.assert_close(engine.routers(r)[0].double(), torch.from_numpy(r / 2), rtol=0, atol=0.06)
    assert [r["step"] for r in records] == list(range(1, 401))
    assert records[0]["lr"] == pytest.approx(2e-2)
    assert records[-1]["lr"] == pytest.approx(2e-4, rel=0.01)
    for r in records:
        assert r["preference/x"] + r["preference/y"] == pytest.approx(1)


SETTINGS: dict[str, dict[str, Any]] = {
    "ls": {},
    "epo": {"method": "epo"},
    "antithetic pairs": {"sampler": "antithetic", "preferences_per_step": 2},
    "hypervolume": {"method": "hypervolume", "preferences_per_step": 3},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_same_seed_same_bits(settings: dict[str, Any]) -> None:
    results = []
    for _ in range(2):
        engine, objectives = problem()
        torch.manual_seed(int(torch.seed() % 1000))  # what went on before must not matter
        pf.fit(engine, objectives, steps=15, seed=7, progress=False, **settings)
        results.append(state(engine))
    assert equal(*results)
    engine, objectives = problem()
    pf.fit(engine, objectives, steps=15, seed=8, progress=False, **settings)
    assert not equal(results[0], state(engine))


def test_global_random_state_is_left_alone() -> None:
    engine, objectives = problem()
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    pf.fit(engine, objectives, steps=2, progress=False)
    assert torch.equal(torch.rand(3), expected)


class StopError(Exception):
    """Stands for a crash."""


@pytest.mark.parametrize(
    "sampling", [{}, {"sampler": "antithetic", "preferences_per_step": 3, "corner_every": 4}]
)
def test_resume_is_exact(tmp_path: Path, sampling: dict[str, Any]) -> None:
    engine, objectives = problem()
    pf.fit(engine, objectives, steps=23, seed=1, **sampling, log=tmp_path / "whole.csv", progress=False)
    whole = state(engine)

    def crash(record: dict[str, float]) -> None:
        if record["step"] == 17:
            raise StopError

    settings = {
        "steps": 23,
        "seed": 1,
        "checkpoint": tmp_path / "run.ckpt",
        "checkpoint_every": 5,
        **sampling,
    }
    engine, objectives = problem()
    with pytest.raises(StopError):
        pf.fit(engine, objectives, callback=crash, log=tmp_path / "cut.csv", progress=False, **settings)
    engine, objectives = problem()
    records = pf.fit(engine, objectives, log=tmp_path / "cut.csv", progress=False, **settings)
    assert records[0]["step"] == 16
    assert equal(whole, state(engine))
    assert (tmp_path / "cut.csv").read_text() == (tmp_path / "whole.csv").read_text()
    assert pf.fit(engine, objectives, progress=False, **settings) == []
    assert equal(whole, state(engine))


def test_wrong_checkpoints(tmp_path: Path) -> None:
    engine, objectives = problem()
    path = tmp_path / "run.ckpt"
    pf.fit(engine, objectives, steps=2, checkpoint=path, progress=False)
    with pytest.raises(ValueError, match=r"seed=0 \(now 5\)"):
        pf.fit(engine, objectives, steps=2, seed=5, checkpoint=path, progress=False)
    kept = path.read_bytes()
    other, _ = problem()
    with torch.no_grad():
        other.routers.output.bias.add_(1)
    before = state(other)
    for change in ({"seed": 5}, {"steps": 3}):
        with pytest.raises(ValueError, match="use the same settings"):
            pf.fit(other, objectives, **{"steps": 2, "checkpoint": path, "progress": False, **change})
    assert equal(before, state(other))  # a refusal changes nothing
    assert path.read_bytes() == kept
    starts = {"init": {"init": "sqrt"}, "groups": {"route": "tensor"}}
    for word, settings in starts.items():
        with pytest.raises(ValueError, match=word):
            pf.fit(problem(**settings)[0], objectives, steps=2, checkpoint=path, progress=False)
    with pytest.raises(ValueError, match="weights="):  # experts that were trained anew
        pf.fit(problem(seed=7)[0], objectives, steps=2, checkpoint=path, progress=False)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(pf.StoreError, match="not a readable checkpoint"):
        pf.fit(engine, objectives, steps=2, checkpoint=path, progress=False)
    assert not list(tmp_path.glob(".*tmp"))


@pytest.mark.parametrize("ideal", [(0.0, 0.0), np.zeros(2)])
def test_solver_options_of_any_kind_are_kept_and_resumed(tmp_path: Path, ideal: Any) -> None:
    engine, objectives = problem()
    settings = {
        "method": "stch",
        "options": {"ideal": ideal},
        "checkpoint": tmp_path / "c",
        "progress": False,
    }
    assert len(pf.fit(engine, objectives, steps=2, **settings)) == 2
    assert pf.fit(engine, objectives, steps=2, **settings) == []


def test_callback_ends_the_training(tmp_path: Path) -> None:
    engine, objectives = problem()
    records = pf.fit(engine, objectives, steps=50, callback=lambda r: r["step"] == 3, progress=False)
    assert len(records) == 3


def test_csv_and_tensorboard_logs(tmp_path: Path) -> None:
    engine, objectives = problem()
    records = pf.fit(engine, objectives, steps=3, log=tmp_path / "log.csv", progress=False)
    with (tmp_path / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss/left"]) for row in rows] == [r["loss/left"] for r in records]
    pf.fit(engine, objectives, steps=3, log=tmp_path / "board", progress=False)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    assert len(events.Scalars("loss/left")) == 3


@pytest.mark.parametrize(
    "content",
    [
        b"name,age\nann,3\n",
        b"step,lr\n1,2\n",
        b"\xff\xfe\x00",
        b"step,lr,loss/left\nsoon,1,2\n",
        b"\n\nhello\n",
    ],
)
def test_a_log_never_replaces_another_file(tmp_path: Path, content: bytes) -> None:
    engine, objectives = problem()
    path = tmp_path / "mydata.csv"
    path.write_bytes(content)
    settings: dict[str, Any] = {"log": path, "checkpoint": tmp_path / "run.ckpt", "progress": False}
    with pytest.raises(ValueError, match=r"got log=.*mydata\.csv.*no log of pf\.fit"):
        pf.fit(engine, objectives, steps=2, **settings)
    assert path.read_bytes() == content
    pf.fit(engine, objectives, steps=2, **{**settings, "log": None})
    with pytest.raises(ValueError, match="no log"):  # resuming
        pf.fit(engine, objectives, steps=2, **settings)
    assert path.read_bytes() == content


def test_a_new_run_replaces_its_earlier_log(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.touch()  # a run that ended before its first step
    for steps in (3, 2):
        engine, objectives = problem()
        pf.fit(engine, objectives, steps=steps, log=path, progress=False)
        assert len(path.read_text().splitlines()) == 1 + steps


def test_gradient_accumulation_is_one_larger_batch() -> None:
    engine, _ = problem()
    engine.module.eval()
    torch.manual_seed(0)
    x, y = torch.randn(32, 6), torch.randn(32, 1)
    parts = list(zip(x.chunk(4), y.chunk(4), strict=True))
    results = []
    for data, accumulate in ((parts, 4), ([(x, y)], 1)):
        engine.routers.reset()
        objectives = {name: (data, loss) for name in engine.objectives}
        pf.fit(engine, objectives, steps=3, accumulate=accumulate, progress=False)
        results.append(state(engine))
    for key, value in results[0].items():
        torch.testing.assert_close(value, results[1][key], rtol=1e-3, atol=1e-5)


def test_wrong_input() -> None:
    engine, objectives = problem()
    with pytest.raises(ValueError, match=r"expected one for each of \['left', 'right'\]"):
        pf.fit(engine, objectives[:1], progress=False)
    with pytest.raises(ValueError, match="got steps=0"):
        pf.fit(engine, objectives, steps=0, progress=False)
    with pytest.raises(ValueError, match="lr_end"):
        pf.fit(engine, objectives, lr_end=2, progress=False)
    with pytest.raises(ValueError, match="nosuch"):
        pf.fit(engine, objectives, "nosuch", progress=False)
    batch = next(iter(objectives[0].data))
    with pytest.raises(ValueError, match="cannot begin again"):
        pf.fit(engine, {n: (iter([batch]), loss) for n in engine.objectives}, steps=3, progress=False)
    with pytest.raises(ValueError, match="cannot begin again"):
        pf.fit(engine, {n: ([], loss) for n in engine.objectives}, steps=3, progress=False)
    with pytest.raises(ValueError, match="expected a scalar"):
        pf.fit(engine, {n: ([batch], lambda m, b: m(b[0])) for n in engine.objectives}, progress=False)
    broken = {n: ([batch], lambda m, b: m(b[0]).mean() * float("nan")) for n in engine.objectives}
    with pytest.raises(ValueError, match="is nan"):
        pf.fit(engine, broken, progress=False)


def test_checkpoint_has_no_pickle(tmp_path: Path) -> None:
    engine, objectives = problem()
    pf.fit(engine, objectives, steps=2, checkpoint=tmp_path / "c", progress=False)
    content = (tmp_path / "c").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert json.loads(header["__metadata__"]["state"])["step"] == 2
