"""`paretofuse evaluate`: the metrics of one preference, as a sweep has them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import paretofuse
from tests.python.cli.test_sweep import sweep_folder
from tests.support.command import call


def test_evaluate(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sweep_folder(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "evaluation", raising=False)
    usual = ["evaluate", "s", "--module", "evaluation:build", "--preference", "sst2=0.25,cola=0.75"]
    code, out, err = call(capsys, *usual, "--evaluate", "evaluation:Results.norms", "-o", "new/m.json")
    assert (code, err) == (0, "")
    told = json.loads((tmp_path / "new" / "m.json").read_text())
    weight = next(iter(paretofuse.load("s").merge_state_dict([0.75, 0.25]).values()))
    assert told["metrics"] == {
        "cola": pytest.approx(float(weight.sum())),
        "sst2": pytest.approx(-float(weight.sum())),
    }
    assert out.splitlines() == [f"{name} {value:.6g}" for name, value in told["metrics"].items()]
    again = ["--evaluate", "evaluation:talks", "-o", "new/m.json", "--json"]
    code, out, err = call(capsys, *usual, *again)  # in the place of the last one
    assert (code, err) == (0, "talking\n")
    assert json.loads(out)["metrics"] == {"cola": 1.0, "sst2": 2.0}
    for words, message in (
        ([], "got neither or both of --evaluate and --lm-eval"),
        (["--evaluate", "evaluation:Results.norms", "--lm-eval", "arc"], "neither or both"),
        (["--evaluate", "evaluation:none"], "has no 'none'"),
        (["--evaluate", "evaluation:one", "-o", "s"], "s: Is a directory"),
        (
            ["--evaluate", "evaluation:one", "-o", "evaluation.py"],
            "--output evaluation.py, which is there already",
        ),
        (["--evaluate", "evaluation:one", "-o", "s/manifest.json"], "holds no metrics"),
        (["--evaluate", "evaluation:one", "--preference", "mrpc=1"], "mrpc"),
    ):
        code, out, err = call(capsys, *usual, *words)
        assert (code, out) == (1, "")
        assert message in err
    monkeypatch.delitem(sys.modules, "evaluation", raising=False)
