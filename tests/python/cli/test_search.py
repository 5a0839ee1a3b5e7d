"""`paretofuse search`: a front within a budget, and a storage that goes on."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import paretofuse
from tests.python.cli.test_sweep import sweep_folder
from tests.support.command import call, run

pytest.importorskip("optuna")


def test_search(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(sweep_folder(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "evaluation", raising=False)
    usual = ["search", "s", "--module", "evaluation:build", "--evaluate", "evaluation:counted", "-o", "f.csv"]
    more = ["--storage", "sqlite:///search.db", "--reference", "cola=-99,sst2=-99"]
    code, out, err = call(capsys, *usual, *more, "--budget", "5", "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert len(told["preferences"]) == 5
    assert told["hypervolume"] > 0
    code, out, err = call(capsys, *usual, *more, "--budget", "7", "--at-least", "cola=-99")
    assert (code, err) == (0, "")
    assert "f.csv: 7 preferences" in out
    assert len((tmp_path / "count").read_text()) == 7
    assert paretofuse.Front.from_csv("f.csv").preferences[:5].tolist() == told["preferences"]
    code, out, err = call(capsys, *usual, "--budget", "7", "--at-most", "cola=3")
    assert (code, out) == (1, "")
    assert "got --at-most for 'cola', of which larger" in err.replace("at_most", "--at-most")
    monkeypatch.delitem(sys.modules, "evaluation", raising=False)


def test_coefficients(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sweep_folder(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "evaluation", raising=False)
    usual = ["search", "s", "--module", "evaluation:build", "--evaluate", "evaluation:counted", "-o", "f.csv"]
    box = ["--coefficients=-0.5:1", "--parts", "2", "--budget", "5"]
    code, out, err = call(capsys, *usual, *box, "--reference", "cola=-99,sst2=-99", "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert told["names"] == ["1/cola", "1/sst2", "2/cola", "2/sst2"]
    engine = paretofuse.load("s", module=sys.modules["evaluation"].build())
    front = paretofuse.CoefficientFront.from_csv("f.csv", engine, parts=2)
    assert front.coefficients.tolist() == told["coefficients"]
    assert told["hypervolume"] == front.hypervolume(-99) > 0
    code, out, err = call(capsys, *usual[:-1], "g.csv", *box)
    assert (code, err) == (0, "")
    assert "g.csv: 5 sets of coefficients" in out
    for words, message in (
        (["--budget", "5", "--parts", "2"], "got --parts without --coefficients LOW:HIGH"),
        ([*box, "--html", "f.html"], "got --plot or --html with --coefficients"),
        (["--budget", "5", "--coefficients", "1:0"], "expected finite numbers, low below high"),
        (["--budget", "5"], "is there already and is no front of preferences"),
        (["--budget", "5", "--seed", "-1", "-o", "h.csv"], "got --seed -1, expected at least 0"),
    ):
        code, out, err = call(capsys, *usual, *words)
        assert (code, out) == (1, "")
        assert message in err
    code, out, err = call(capsys, *usual, "--budget", "5", "--coefficients", "1")
    assert code == 2
    assert "expected LOW:HIGH, two numbers such as 0:1" in err
    monkeypatch.delitem(sys.modules, "evaluation", raising=False)


def test_an_evaluation_that_fails_is_told_in_one_line(tmp_path: Path) -> None:
    folder = sweep_folder(tmp_path)
    words = ["search", "s", "--module", "evaluation:build", "--budget", "3", "-o", "f.csv", "--evaluate"]
    failed = run([*words, "evaluation:fails"], cwd=folder)  # a process of its own: Optuna is not there yet
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr == "paretofuse: error: no data\n"
    done = run([*words, "evaluation:counted"], cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
