"""The GPU benchmark where there is no GPU; its contenders run in `test_kernels_bench_interpreted.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.gpu import bench


def test_without_a_gpu_it_says_so_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["--out", str(tmp_path)]) == 2
    assert "no CUDA or ROCm GPU here, so nothing was measured" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device here")
def test_quick_run_on_the_gpu(tmp_path: Path) -> None:
    assert bench.main(["--quick", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "gpu_bench.csv").exists()
