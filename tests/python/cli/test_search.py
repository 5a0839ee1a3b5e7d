"""`paretofuse search`: a front within a budget, and a storage that goes on."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import paretofuse
from tests.python.cli.test_sweep import sweep_folder
from tests.support.command import call

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
