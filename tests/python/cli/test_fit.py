"""`paretofuse fit`: what it trains is what pf.fit trains, and where it lands."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import paretofuse as pf
from paretofuse.cli import main
from tests.support.command import call

TASKS = """
import paretofuse as pf
import torch


def batches(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 3, generator=generator) for _ in range(3)]


def loss(module, batch):
    assert torch.get_num_threads() == 1
    return module(batch).square().mean()


def objectives():
    return {"news": (batches(0), loss), "poems": (batches(1), loss)}


def wrong():
    return {"news": (batches(0), loss)}


def build():
    return torch.nn.Linear(3, 2)


def validation():
    return pf.Validation(lambda module: {"size": float(module.weight.square().sum())}, every=1, patience=1)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory, with a store "s" of linear layers and a module "tasks"."""
    (tmp_path / "tasks.py").write_text(TASKS)
    torch.manual_seed(0)
    base, news, poems = (torch.nn.Linear(3, 2) for _ in range(3))
    pf.stack(base, {"news": news, "poems": poems}, route="tensor").save(tmp_path / "s")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)
    sys.modules.pop("tasks", None)


WORDS = ["fit", "s", "--module", "tasks:build", "--threads", "1"]


def fit(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    return call(capsys, *WORDS, *words)


def routers(path: Path) -> dict[str, torch.Tensor]:
    return pf.load(path).routers.state_dict()


def test_trains_as_the_library_does(folder: Path) -> None:
    words = ["--steps", "7", "--method", "stch", "--lr", "0.02", "--preferences-per-step", "2", "--seed", "3"]
    words += ["--sketch", "1"]
    words += ["--objectives", "tasks:objectives", "-o", "new/t", "--log", "log.csv", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "paretofuse", *WORDS, *words],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no bar: this is no terminal
    document = json.loads(done.stdout)
    assert document["steps"] == 7
    assert set(document["loss"]) == {"news", "poems"}
    assert len((folder / "log.csv").read_text().splitlines()) == 8

    import tasks  # type: ignore[import-not-found]

    torch.set_num_threads(1)
    engine = pf.load(folder / "s", module=torch.nn.Linear(3, 2))
    pf.fit(
        engine, tasks.objectives(), "stch", steps=7, lr=0.02, preferences_per_step=2, seed=3, sketch=1,
        progress=False,
    )  # fmt: skip
    trained = routers(folder / "new" / "t")
    assert all(torch.equal(trained[name], tensor) for name, tensor in engine.routers.state_dict().items())
    assert any(not torch.equal(trained[name], tensor) for name, tensor in routers(folder / "s").items())


def test_a_family_goes_from_the_shell_into_the_store_and_on(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--objectives", "tasks:objectives", "--steps", "3"]
    assert fit(capsys, *words, "--family", "rows+columns", "--row-shrinkage", "0.1", "-o", "t")[0] == 0
    code, out, _ = call(capsys, "info", "t")
    assert code == 0
    # MLPs of 2 groups (2 x 4 + 4 + 4 x 2 + 2 numbers each), 2 objectives x 2 planes x (2 + 1 rows + 3 columns).
    assert "2 groups, family rows+columns, 68 router" in out
    trained = routers(folder / "t")
    assert trained["rows.weight"].any()
    assert trained["columns.weight"].shape == (2, 2, 3)
    assert trained["columns.weight"].any()
    assert call(capsys, "fit", "t", *WORDS[2:], *words, "-o", "u")[0] == 0
    assert pf.load(folder / "u").routers.family == "rows+columns"
    assert call(capsys, "merge", "u", "--preference", "news=0.3,poems=0.7", "-o", "m.safetensors")[0] == 0
    merged, r = load_file(folder / "m.safetensors"), {"news": 0.3, "poems": 0.7}
    assert all(torch.equal(merged[name], t) for name, t in pf.load(folder / "u").merge_state_dict(r).items())
    code, _, err = fit(capsys, *words, "--family", "columns")
    assert code == 2
    assert "invalid choice: 'columns'" in err


def test_in_place_and_again_from_a_checkpoint(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = routers(folder / "s")
    words = ["--objectives", "tasks:objectives", "--steps", "4", "--checkpoint", "c"]
    assert fit(capsys, *words, "-o", "t")[0] == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in routers(folder / "s").items())
    code, out, err = fit(
        capsys, *words
    )  # finished: no step is taken, and the checkpoint's routers go in place
    assert (code, err) == (0, "")
    assert "0 steps of ls" in out
    trained, placed = routers(folder / "t"), routers(folder / "s")
    assert all(torch.equal(placed[name], tensor) for name, tensor in trained.items())


def test_another_trained_store_is_replaced_only_by_force(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--objectives", "tasks:objectives", "--steps", "2", "-o", "t"]
    assert fit(capsys, *words)[0] == 0
    before = routers(folder / "t")
    code, out, err = fit(capsys, *words, "--seed", "5", "--log", "log.csv")
    assert (code, out) == (1, "")
    assert "trained store (method ls, " in err
    assert err.endswith("would be replaced by another training; choose another place, or pass --force\n")
    assert not (folder / "log.csv").exists()  # refused before it trained
    assert all(torch.equal(before[name], tensor) for name, tensor in routers(folder / "t").items())
    assert fit(capsys, *words, "--seed", "5", "--force")[0] == 0
    assert any(not torch.equal(before[name], tensor) for name, tensor in routers(folder / "t").items())
    in_place = ["fit", "t", *WORDS[2:], *words[:4]]
    assert main(in_place) == 0  # it goes on from that training


def test_validation_stops_early(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--objectives",
        "tasks:objectives",
        "--validation",
        "tasks:validation",
        "--steps",
        "50",
        "-o",
        "t",
    ]
    code, out, err = fit(capsys, *words, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["steps"] < 50


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--objectives", "tasks:wrong"], "expected one for each of ['news', 'poems']"),
        (["--objectives", "tasks:none"], "--objectives tasks:none"),
        (["--objectives", "tasks:objectives", "--method", "magic"], "magic"),
        (["--objectives", "tasks:objectives", "--lr", "-1"], "--lr -1"),
    ],
)
def test_what_fails_leaves_no_store(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    code, out, err = fit(capsys, *words, "-o", "t")
    assert (code, out) == (1, "")
    assert message in err
    assert err.count("\n") == 1
    assert {path.name for path in folder.iterdir()} - {"__pycache__"} == {"s", "tasks.py"}


def test_a_place_that_cannot_be_written_is_found_before_training(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "t").write_text("a file")
    code, _, err = fit(capsys, "--objectives", "tasks:objectives", "-o", "t", "--log", "log.csv")
    assert code == 1
    assert "is not a store" in err
    assert not (folder / "log.csv").exists()
