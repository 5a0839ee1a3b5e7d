"""Two processes (gloo): fit and sweep give what one process gives; a death ends the run; any number resumes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.process import ROOT
from tests.support.two_processes import train_and_sweep

MODULE = ["-m", "tests.support.two_processes"]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def alone(folder: Path, method: str) -> None:
    """The run in this process."""
    folder.mkdir(exist_ok=True)
    train_and_sweep(folder, method)


def run_two(folder: Path, method: str, die_at: int = 0) -> subprocess.CompletedProcess[str]:
    """The run in two processes under torchrun."""
    folder.mkdir()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*launcher, *MODULE, str(folder), method, str(die_at)],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def start_two(folder: Path, method: str, die_at: int) -> list[subprocess.Popen[str]]:
    """The run in two processes without torchrun, whose agent ends the others as soon as one has died."""
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, *MODULE, str(folder), method, str(die_at)]
    return [
        subprocess.Popen(command, env=environment(RANK=str(rank), **place), stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]


def tensors(folder: Path, rank: int = 0) -> dict[str, object]:
    from safetensors.torch import load_file

    return dict(load_file(folder / f"rank{rank}.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ls", "epo"])
def test_two_processes_equal_one(method: str, tmp_path: Path) -> None:
    import torch

    alone(tmp_path / "1", method)
    done = run_two(tmp_path / "2", method)
    assert done.returncode == 0, done.stderr
    one, first, second = tensors(tmp_path / "1"), tensors(tmp_path / "2"), tensors(tmp_path / "2", 1)
    assert [one.pop("count"), first.pop("count"), second.pop("count")] == [5, 3, 2]
    for name, value in one.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-6)
    assert len((tmp_path / "2" / "log.csv").read_text().splitlines()) == 31


@pytest.mark.slow
def test_a_death_is_told_by_those_left(tmp_path: Path) -> None:
    processes = start_two(tmp_path / "died", "epo", die_at=13)
    try:
        told = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert processes[1].returncode == 7
    assert processes[0].returncode == 1
    assert "RuntimeError: another process of this run ended while training" in told[0]
    assert not (tmp_path / "died" / "rank0.safetensors").exists()


@pytest.mark.slow
def test_a_death_ends_the_run_and_another_number_resumes(tmp_path: Path) -> None:
    import torch

    begun = time.monotonic()
    died = run_two(tmp_path / "died", "ls", die_at=13)
    assert died.returncode != 0
    assert time.monotonic() - begun < 120  # gloo's own patience is 30 minutes
    assert "exitcode  : 7" in died.stderr  # torchrun's report of the process that failed first
    assert not (tmp_path / "died" / "rank0.safetensors").exists()
    alone(tmp_path / "died", "ls")
    alone(tmp_path / "whole", "ls")
    expected = tensors(tmp_path / "whole")
    for name, value in tensors(tmp_path / "died").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_too_few_batches_for_the_processes() -> None:
    from paretofuse.engine.training.settings import Settings

    settings = Settings(3, 0.1, 0.1, "dirichlet", 1.0, 0, 1, 1, 0)
    settings.check()
    import paretofuse.engine.training.settings as training

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "rank_and_size", lambda: (0, 2))
        with pytest.raises(ValueError, match="pass accumulate=2 or more"):
            settings.check()
