"""`paretofuse sweep`: what fails at the end is found before the work, and metrics that run the wrong way are told."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import paretofuse
from tests.support.command import call, run
from tests.support.waiting import until

EVALUATE = """
import torch

class Results:
    @staticmethod
    def norms(module):
        assert not torch.is_grad_enabled()
        tensors = [p for p in module.parameters()]
        return {"cola": float(tensors[0].sum()), "sst2": -float(tensors[0].sum())}

def build():
    return torch.nn.Linear(3, 2)

def nothing():
    return None

def breaks(module):
    raise KeyError("labels")

def fails(module):
    raise ValueError("no data")

def waits(module):
    import os, pathlib, time
    pathlib.Path("new").write_text(str(os.getpid()))
    os.rename("new", "pid")
    time.sleep(600)

def talks(module):
    print("talking")
    return [1.0, 2.0]

def counted(module):
    with open("count", "a") as file:
        file.write("x")
    return Results.norms(module)

def one(module):
    with open("count", "a") as file:
        file.write("x")
    return {"accuracy": 1.0}
"""


def sweep_folder(folder: Path) -> Path:
    """A folder with a store "s" and a module "evaluation"."""
    (folder / "evaluation.py").write_text(EVALUATE)
    torch.manual_seed(0)
    models = [torch.nn.Linear(3, 2) for _ in range(3)]
    engine = paretofuse.stack(models[0], {"cola": models[1], "sst2": models[2]}, route="tensor")
    engine.save(folder / "s")
    return folder


@pytest.mark.parametrize(
    ("words", "message", "evaluations"),
    [
        (["-o", "s"], "s: Is a directory", 0),
        (["-o", "evaluation.py/new/front.csv"], "front.csv: Not a directory", 0),
        (["-o", "/proc/none/front.csv"], "/proc/none/front.csv: ", 0),
        (["-o", "f.csv", "--plot", "/proc/none/front.png"], "/proc/none/front.png: ", 0),
        (["-o", "f.csv", "--html", "/proc/none/front.html"], "/proc/none/front.html: ", 0),
        (["-o", "f.csv", "--plot", "front.xyz"], "expected a name that ends in one of", 0),
        (["-o", "f.csv", "--plot", "front"], "expected a name that ends in one of", 0),
        (["-o", "f.csv", "--html", "evaluation.py"], "expected a name that ends in .html", 0),
        (["-o", "f.html", "--html", "./f.html"], "got 'f.html', './f.html' for the table", 0),
        (["-o", "f.png", "--plot", "f.png"], "got 'f.png', 'f.png' for the table", 0),
        (["-o", "f.csv", "--module", "evaluation:nothing"], "got nothing from --module evaluation:nothing", 0),
        (["-o", "f.csv", "--chunksize", "2"], "got --chunksize 2 without --workers", 0),
        (["-o", "f.csv", "--reference", "cola=nan,sst2=0"], "expected finite numbers", 0),
        (["-o", "f.csv", "--reference", "cola=0,mrpc=0"], "got a reference point for ['cola', 'mrpc']", 1),
        (["-o", "f.csv", "--plot", "f.png", "--evaluate", "evaluation:one"], "expected at least two metrics", 1),
    ],
)  # fmt: skip
def test_sweep_finds_out_early_what_would_fail_at_the_end(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str],
    message: str, evaluations: int,
) -> None:  # fmt: skip
    monkeypatch.chdir(sweep_folder(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "evaluation", raising=False)
    usual = ["sweep", "s", "--module", "evaluation:build", "--evaluate", "evaluation:counted"]
    code, out, err = call(capsys, *usual, *words)
    monkeypatch.delitem(sys.modules, "evaluation", raising=False)
    assert (code, out) == (1, "")
    assert message in err
    count = tmp_path / "count"
    assert (len(count.read_text()) if count.exists() else 0) == evaluations
    assert not list(tmp_path.glob("f.*"))


def test_sweep(tmp_path: Path) -> None:
    sweep_folder(tmp_path)
    words = ["sweep", "s", "--points", "5", "-o", "new/front.csv", "--module", "evaluation:build"]
    done = run(
        [
            *words,
            "--evaluate",
            "evaluation:Results.norms",
            "--plot",
            "pictures/front.png",
            "--html",
            "pictures/front.html",
            "--reference",
            "cola=-99,sst2=-99",
            "--json",
        ],
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    front = json.loads(done.stdout)
    assert [row[0] for row in front["preferences"]] == [1, 0.75, 0.5, 0.25, 0]
    assert len({row[0] for row in front["values"]}) == 5
    assert front["hypervolume"] > 0
    assert len((tmp_path / "new" / "front.csv").read_text().splitlines()) == 6
    assert (tmp_path / "pictures" / "front.png").read_bytes().startswith(b"\x89PNG")
    assert "<h1" in (tmp_path / "pictures" / "front.html").read_text()
    done = run([*words, "--evaluate", "evaluation:breaks"], cwd=tmp_path)
    assert done.returncode == 1
    assert "KeyError: 'labels' (--traceback shows where)" in done.stderr
    assert "Traceback (" not in done.stderr


def test_sweep_in_processes(tmp_path: Path) -> None:
    sweep_folder(tmp_path)
    words = ["sweep", "s", "--points", "3", "--module", "evaluation:build", "-o", "f.csv"]
    words += ["--workers", "1", "--chunksize", "2"]
    done = run([*words, "--evaluate", "evaluation:Results.norms"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    front = paretofuse.Front.from_csv(tmp_path / "f.csv")
    engine = paretofuse.load(tmp_path / "s", module=torch.nn.Linear(3, 2))
    for preference, values in zip(front.preferences, front.values.tolist(), strict=True):
        expected = float(engine.merge(preference).weight.detach().sum())
        assert values == [expected, -expected]


def runs(process: int) -> bool:
    """Whether a process is there and has not ended (nobody may have waited for it)."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_their_sweep(tmp_path: Path, number: signal.Signals) -> None:
    sweep_folder(tmp_path)
    words = ["sweep", "s", "--points", "3", "--module", "evaluation:build", "-o", "f.csv", "--workers", "1"]
    sweep = subprocess.Popen(
        [sys.executable, "-m", "paretofuse", *words, "--evaluate", "evaluation:waits"], cwd=tmp_path
    )
    until((tmp_path / "pid").exists)
    worker = int((tmp_path / "pid").read_text())
    sweep.send_signal(number)
    sweep.wait()
    until(lambda: not runs(worker))


def test_sweep_says_where_metrics_run_against_their_preferences(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sweep_folder(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "evaluation", raising=False)
    usual = [
        "sweep",
        "s",
        "--module",
        "evaluation:build",
        "--evaluate",
        "evaluation:Results.norms",
        "-o",
        "f.csv",
    ]
    outputs = [
        call(capsys, *usual),
        call(capsys, *usual, "--minimize"),
    ]  # one of the two is the wrong direction
    monkeypatch.delitem(sys.modules, "evaluation", raising=False)
    assert [(code, err) for code, _, err in outputs] == [(0, ""), (0, "")]
    said = [out for _, out, _ in outputs if out.startswith("note: the metrics of")]
    assert len(said) == 1
    assert "--minimize" in said[0]
    assert "maximize=" not in said[0]
