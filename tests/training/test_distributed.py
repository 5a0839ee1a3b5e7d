"""Two processes (gloo): fit and sweep give what one process gives; a death ends the run; any number resumes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = """
import os, sys
from pathlib import Path
import torch
import torch.distributed as dist
import paretofuse as pf
from tests.training.test_fit import loss, problem
from safetensors.torch import save_file

out, method, steps, die_at = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(1)
if "RANK" in os.environ:
    dist.init_process_group("gloo")
rank = dist.get_rank() if dist.is_initialized() else 0
engine, objectives = problem()
if method == "ls":
    pf.add_planes(engine, 2)
engine.module.eval()  # dropout would differ between processes

def callback(record):
    if rank == 1 and record["step"] == die_at:
        os._exit(7)

validation = pf.Validation(lambda module: pf.evaluate(module, objectives), maximize=False, every=10, patience=9)
pf.fit(engine, objectives, method, steps=30, accumulate=4, checkpoint=out / "run.ckpt", checkpoint_every=5,
       regularization=0.1, validation=validation,
       log=out / "log.csv", callback=lambda r: callback(r) or r["step"] == steps, progress=False)
evaluated = []
def evaluate(module):
    evaluated.append(1)
    return {o.name: float(loss(module, o.data.dataset.tensors)) for o in objectives}
front = pf.sweep(engine, evaluate, pf.simplex_grid(2, 5), maximize=False, progress=False)
tensors = {k: v.clone() for k, v in engine.routers.state_dict().items()}
save_file({**tensors, "values": torch.from_numpy(front.values.copy()),
           "count": torch.tensor(len(evaluated))}, out / f"rank{rank}.safetensors")
if dist.is_initialized():
    dist.destroy_process_group()
"""


def arguments(folder: Path, method: str, steps: int = 30, die_at: int = 0) -> list[str]:
    folder.mkdir(exist_ok=True)
    script = folder / "script.py"
    script.write_text(SCRIPT)
    return [str(script), str(folder), method, str(steps), str(die_at)]


def environment(**more: str) -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", **more}


def run(
    folder: Path, processes: int, method: str, steps: int = 30, die_at: int = 0
) -> subprocess.CompletedProcess[str]:
    """The script in one process, or in several under torchrun."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run(
        launcher + arguments(folder, method, steps, die_at),
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def start_two(folder: Path, method: str, die_at: int) -> list[subprocess.Popen[str]]:
    """The script in two processes without torchrun, whose agent ends the others as soon as one has died."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, *arguments(folder, method, die_at=die_at)]
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

    for processes in (1, 2):
        done = run(tmp_path / str(processes), processes, method)
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
    died = run(tmp_path / "died", 2, "ls", die_at=13)
    assert died.returncode != 0
    assert time.monotonic() - begun < 120  # gloo's own patience is 30 minutes
    assert "exitcode  : 7" in died.stderr  # torchrun's report of the process that failed first
    assert not (tmp_path / "died" / "rank0.safetensors").exists()
    resumed = run(tmp_path / "died", 1, "ls")
    assert resumed.returncode == 0, resumed.stderr
    whole = run(tmp_path / "whole", 1, "ls")
    assert whole.returncode == 0, whole.stderr
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
