"""Every benchmark of speed runs, at sizes whose figures mean nothing: what nobody runs breaks in silence."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import run
from tests.support.process import ROOT
from tests.support.process import run as run_process


@pytest.mark.long
@pytest.mark.parametrize("name", run.NAMES)
def test_a_quick_run_checks_its_results_and_writes_rows(name: str, tmp_path: Path) -> None:
    """Rivals are fetched from the package index, which is why this is no everyday test."""
    run_process(sys.executable, "-m", "benchmarks.run", "--quick", "--out", tmp_path, name, cwd=ROOT)
    assert (tmp_path / f"{name}.csv").read_text().count("\n") > 1
