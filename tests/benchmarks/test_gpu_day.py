"""benchmarks/gpu_day.sh without a GPU: every part runs, at tiny sizes in Triton's interpreter."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

from benchmarks.gpu.bench import PARTS
from benchmarks.gpu.record import COLUMNS
from tests.support.kernels import needs_triton
from tests.support.process import ROOT, run

needs_triton()
SCRIPT = ROOT / "benchmarks" / "gpu_day.sh"


def gpu_day(*arguments: str | Path, code: int = 0) -> str:
    quick = {
        "PYTEST_ADDOPTS": "",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }  # others' plugins take as long as torch
    return run("bash", SCRIPT, *arguments, code=code, PYTHON=sys.executable, **quick)


@pytest.mark.slow
def test_a_dry_run_of_every_part(tmp_path: Path) -> None:
    printed = gpu_day("--dry-run", "--out", tmp_path)
    assert "== 8 of 8 parts went well" in printed
    assert "FAILED" not in printed
    with (tmp_path / "gpu_bench.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert not any(row["error"] for row in rows)
    assert all(float(row["median_ms"]) > 0 and float(row["bytes"]) > 0 for row in rows)
    assert {row["device"] for row in rows} == {"CPU, Triton's interpreter"}
    begins = {row["case"].split()[0] for row in rows}
    assert begins == {"merge", "grad", "linear", "rows", "switch", "router", "package"}
    assert (tmp_path / "gpu_bench.png").stat().st_size > 10_000
    assert all(f"{part}: appended" in (tmp_path / f"{part}.log").read_text() for part in PARTS)


def test_a_part_that_fails_is_told_and_the_next_one_runs(tmp_path: Path) -> None:
    printed = gpu_day("--dry-run", "--out", tmp_path, "plot", "install", code=1)
    assert "plot FAILED with status 1" in printed
    assert "dry run: nothing is installed" in printed
    assert "1 of 2 parts went well" in printed


def test_a_part_that_is_not_known(tmp_path: Path) -> None:
    assert "got benchmark, expected one of: install test" in gpu_day("--out", tmp_path, "benchmark", code=64)
