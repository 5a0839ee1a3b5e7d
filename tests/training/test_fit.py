"""Training: learns, repeats bit for bit, resumes exactly, logs, and refuses wrong input."""

from __future__ import annotations

import csv
import logging
import math
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import paretofuse as pf
from paretofuse.engine.engine import Engine
from paretofuse.engine.training.log import open_log
from paretofuse.engine.training.smoothing import divergence


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
    engine = pf.stack(Point(0, 0), {"x": Point(2, 0), "y": Point(0, 2)}, family="scalar")
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
    "pairs": {"preferences_per_step": 2},
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


def test_callback_ends_the_training(tmp_path: Path) -> None:
    engine, objectives = problem()
    records = pf.fit(engine, objectives, steps=50, callback=lambda r: r["step"] == 3, progress=False)
    assert len(records) == 3


def test_csv_and_tensorboard_logs(tmp_path: Path) -> None:
    engine, objectives = problem()
    records = pf.fit(engine, objectives, steps=3, log=tmp_path / "not" / "there" / "log.csv", progress=False)
    with (tmp_path / "not" / "there" / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss/left"]) for row in rows] == [r["loss/left"] for r in records]
    records = pf.fit(engine, objectives, steps=3, log=tmp_path / "board", progress=False)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(records[0]) - {"step"}
    for name in events.Tags()["scalars"]:
        points = [(event.step, event.value) for event in events.Scalars(name)]
        assert points == [(r["step"], pytest.approx(r[name], rel=1e-6)) for r in records]


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


@pytest.mark.parametrize("name", ["wandbb", "WandB", "mlfow", "Aim", "trackioo"])
def test_nearly_a_trackers_name_is_no_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"got log='{name}', which looks like the tracker.*'\./{name}'"):
        open_log(name, 0)
    assert list(tmp_path.iterdir()) == []
    open_log(f"./{name}", 0).close()
    open_log(name, 0).close()  # now that it is there
    open_log(f"{name}.csv", 0).close()
    open_log("logs", 0).close()


def test_a_new_run_replaces_its_earlier_log(tmp_path: Path) -> None:
    path = tmp_path / "not" / "there" / "log.csv"
    path.parent.mkdir(parents=True)
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
    with pytest.raises(ValueError, match="got sampler"):
        pf.fit(engine, objectives, sampler=["dirichlet"], progress=False)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nosuch"):
        pf.fit(engine, objectives, "nosuch", progress=False)
    batch = next(iter(objectives[0].data))
    with pytest.raises(ValueError, match="cannot begin again"):
        pf.fit(engine, {n: (iter([batch]), loss) for n in engine.objectives}, steps=3, progress=False)
    with pytest.raises(ValueError, match="objective 'left' has no batch, expected at least one"):
        pf.fit(engine, {n: ([], loss) for n in engine.objectives}, steps=3, progress=False)
    with pytest.raises(ValueError, match="expected a scalar"):
        pf.fit(engine, {n: ([batch], lambda m, b: m(b[0])) for n in engine.objectives}, progress=False)
    broken = {n: ([batch], lambda m, b: m(b[0]).mean() * float("nan")) for n in engine.objectives}
    with pytest.raises(ValueError, match="is nan"):
        pf.fit(engine, broken, progress=False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": "400"}, "got steps='400'"), ({"steps": 2.5}, "got steps=2.5"), ({"steps": True}, "got steps=True"),
        ({"lr": "0.1"}, "got lr='0.1'"), ({"seed": 1.0}, "got seed=1.0"), ({"alpha": None}, "got alpha=None"),
        ({"checkpoint_every": "5"}, "got checkpoint_every='5'"), ({"accumulate": [2]}, "got accumulate="),
        ({"regularization": "no"}, "got regularization='no'"), ({"validation": len}, "got validation of type"),
        ({"callback": 3}, "got callback=3"), ({"method": 3}, "got method of type int"),
        ({"method": "stch", "options": ["smoothing"]}, "got options of type list"),
        ({"validation": pf.Validation(len, preferences=5)}, "got preferences=5 for validation"),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_arguments_of_another_kind(change: dict[str, Any], words: str) -> None:
    engine, objectives = problem()
    with pytest.raises(TypeError, match=words):
        pf.fit(engine, objectives, **{"progress": False, **change})


@pytest.mark.parametrize(
    "change",
    [{"seed": -1}, {"lr": float("inf")}, {"lr": float("nan")}, {"lr": -0.1}, {"lr": 0}, {"alpha": -1.0},
     {"lr_end": -0.1}, {"lr_end": 1.1}, {"corner_every": -2}, {"preferences_per_step": 0},
     {"regularization": float("inf")}, {"regularization": -0.1}, {"checkpoint_every": 0}, {"seed": 2**63}],
)  # fmt: skip
def test_numbers_out_of_range(change: dict[str, Any]) -> None:
    engine, objectives = problem()
    with pytest.raises(ValueError, match=f"got {next(iter(change))}="):
        pf.fit(engine, objectives, progress=False, **change)


def test_numpy_numbers_are_numbers() -> None:
    engine, objectives = problem()
    assert len(pf.fit(engine, objectives, steps=np.int64(2), lr=np.float32(0.01), progress=False)) == 2  # type: ignore[arg-type]


def test_engine_and_module_are_told_apart() -> None:
    engine, objectives = problem()
    with pytest.raises(TypeError, match="got Noisy to train, expected an engine"):
        pf.fit(engine.module, objectives, progress=False)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"got Engine to evaluate.*engine\.module"):
        pf.evaluate(engine, objectives)  # type: ignore[arg-type]


def wrong_objectives() -> list[Any]:
    return [
        [("left", [1], loss), ("right", [1], loss)], ["left", "right"], "left", 3, None,
        pf.Objective("left", [1], loss), {"left": loss, "right": loss}, {"left": ([1],), "right": ([1],)},
    ]  # fmt: skip


@pytest.mark.parametrize("index", range(8))
def test_objectives_of_another_kind(index: int) -> None:
    engine, _ = problem()
    with pytest.raises(TypeError, match=r"expected pf\.Objective\(name, data, loss\)"):
        pf.fit(engine, wrong_objectives()[index], progress=False)
    with pytest.raises(TypeError, match=r"expected pf\.Objective\(name, data, loss\)"):
        pf.evaluate(engine.module, wrong_objectives()[index])


def test_parts_of_objectives_of_another_kind() -> None:
    with pytest.raises(TypeError, match="got an objective named 3"):
        pf.Objective(3, [1], loss)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got data of type int for objective 'left'"):
        pf.Objective("left", 3, loss)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"got loss of objective 'left'=None.*loss\(module, batch\)"):
        pf.Objective("left", [1], None)  # type: ignore[arg-type]


def test_a_loss_that_ignores_its_module_is_refused_by_name() -> None:
    engine, objectives = problem()
    batch = next(iter(objectives[0].data))
    other = Noisy()
    ignoring = {
        "no gradient": (lambda m, b: torch.tensor(1.0), "needs no gradient"),
        "another module": (lambda m, b: loss(other, b), "depends on no routed weight"),
        "a zero": (lambda m, b: torch.zeros((), requires_grad=True), "depends on no routed weight"),
        "detached": (lambda m, b: loss(other, b) + m(b[0]).detach().mean(), "depends on no routed weight"),
        "times zero": (
            lambda m, b: loss(other, b) + 0 * m(b[0]).mean(),
            "does not change with the routing weights",
        ),
    }
    for wrong, words in ignoring.values():
        before = state(engine)
        with pytest.raises(ValueError, match=f"'right'.*{words}"):
            pf.fit(engine, {"left": ([batch], loss), "right": ([batch], wrong)}, steps=2, progress=False)
        assert equal(state(engine), before)


def test_a_margin_that_is_met_is_no_error() -> None:
    engine, objectives = problem()
    batch = next(iter(objectives[0].data))
    met = {"left": ([batch], loss), "right": ([batch], lambda m, b: (loss(m, b) - 100).relu())}
    assert len(pf.fit(engine, met, steps=2, progress=False)) == 2


def test_experts_equal_to_the_base_have_nothing_to_train() -> None:
    engine = pf.stack(Point(0, 0), {"x": Point(0, 0), "y": Point(0, 0)})
    objectives = {name: ([torch.ones(2)], lambda module, batch: module(batch)) for name in ("x", "y")}
    with pytest.raises(ValueError, match=r"objective 'x'.*experts differ from the base"):
        pf.fit(engine, objectives, steps=2, progress=False)


def test_the_rate_is_the_cosine_of_the_whole_run() -> None:
    engine, objectives = problem()
    records = pf.fit(engine, objectives, steps=4, lr=0.2, lr_end=0.5, progress=False)
    expected = [0.2 * (0.5 + 0.25 * (1 + math.cos(math.pi * step / 4))) for step in range(4)]
    assert [record["lr"] for record in records] == pytest.approx(expected, rel=1e-12)


def test_fit_records_how_the_routers_were_trained(tmp_path: Path) -> None:
    engine, objectives = problem()
    before = datetime.now(timezone.utc).replace(microsecond=0)
    pf.fit(engine, objectives, "epo", steps=50, seed=3, callback=lambda r: r["step"] == 4, progress=False)
    training = engine.training
    assert training is not None
    assert before <= datetime.fromisoformat(training["when"]) <= datetime.now(timezone.utc)
    assert {name: training[name] for name in ("steps", "method", "seed", "data")} == {
        "steps": 4, "method": "epo", "seed": 3, "data": ["left", "right"],
    }  # fmt: skip
    assert training["versions"]["torch"] == torch.__version__
    engine.save(tmp_path / "store")
    assert pf.load(tmp_path / "store").training == training


def test_bars_are_for_terminals(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    engine, objectives = problem()
    pf.fit(engine, objectives, steps=2)
    pf.sweep(engine, lambda module: [0.0, 0.0], pf.simplex_grid(2, 2))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    pf.fit(engine, objectives, steps=2)
    assert "left=" in capsys.readouterr().err
    pf.fit(engine, objectives, steps=2, progress=False)
    assert capsys.readouterr().err == ""


def test_random_states_of_gpus_that_are_not_in_use_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with GPUs, torch's own functions fork and seed all of them, and warn where they are many."""
    engine, objectives = problem()
    asked: list[list[int]] = []
    fork = torch.random.fork_rng

    def watched(devices: Any = None, **options: Any) -> Any:
        asked.append(devices)
        return fork(devices=[], **options)

    monkeypatch.setattr(torch.random, "fork_rng", watched)
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("seeds every GPU"))
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: pytest.fail("starts every GPU"))
    validation = pf.Validation(lambda module: pf.evaluate(module, objectives), maximize=False, every=1)
    pf.fit(engine, objectives, steps=2, validation=validation, progress=False)
    assert asked == [[]] * 4  # the run, and three validations


def test_steps_that_are_too_large_are_told(logged: list[logging.LogRecord]) -> None:
    engine, objectives = problem(route="tensor")
    pf.fit(engine, objectives, steps=40, lr=0.05, progress=False)
    assert not logged
    engine, objectives = problem(route="tensor")
    records = pf.fit(engine, objectives, steps=40, lr=20.0, row_lr=20.0, progress=False)
    assert [record.levelname for record in logged] == ["WARNING"]
    text = logged[0].getMessage()
    assert "every loss rose" in text
    assert "give a smaller lr=" in text
    for name in engine.objectives:
        assert f"{name} {records[0][f'loss/{name}']:.4g} to {records[-1][f'equal/{name}']:.4g}" in text


def test_one_loss_that_rises_is_a_trade_off() -> None:
    def said(steps: int, *pairs: tuple[float, float]) -> bool:
        first = {f"loss/{i}": start for i, (start, _) in enumerate(pairs)}
        last = {f"equal/{i}": end for i, (_, end) in enumerate(pairs)}
        return divergence([first] * (steps - 1) + [last], [str(i) for i in range(len(pairs))]) is not None

    assert said(20, (1.0, 2.0), (1.0, 3.0))
    assert said(20, (-2.0, -0.5), (1.0, 2.0))
    assert not said(20, (1.0, 2.0), (1.0, 0.9))
    assert not said(20, (1.0, 1.4), (1.0, 2.0))
    assert not said(19, (1.0, 2.0), (1.0, 3.0))
