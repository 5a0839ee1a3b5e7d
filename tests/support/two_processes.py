"""A run of training and a sweep, of one process or of several.

torchrun --nproc-per-node=2 -m tests.support.two_processes FOLDER METHOD DIE_AT
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

import paretofuse as pf
from tests.training.test_fit import loss, problem


def train_and_sweep(out: Path, method: str, die_at: int = 0) -> None:
    """Leaves rank0.safetensors, rank1.safetensors: the routers, the front's values, how many points were evaluated.

    Args:
        out: where; a checkpoint that is there is gone on from.
        method: as `pf.fit` takes it; "ls" trains columns and planes besides.
        die_at: the step at which the second process ends without a word; 0: never.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    engine, objectives = problem()
    if method == "ls":
        engine.set_family("rows+columns")
        pf.add_planes(engine, 2)
    engine.module.eval()  # dropout would differ between processes

    def callback(record: dict[str, Any]) -> None:
        if rank == 1 and record["step"] == die_at:
            os._exit(7)

    validation = pf.Validation(
        lambda module: pf.evaluate(module, objectives), maximize=False, every=10, patience=9
    )
    pf.fit(
        engine, objectives, method, steps=30, accumulate=4, checkpoint=out / "run.ckpt", checkpoint_every=5,
        regularization=0.1, validation=validation, log=out / "log.csv", callback=callback, progress=False,
    )  # fmt: skip
    evaluated = []

    def evaluate(module: nn.Module) -> dict[str, float]:
        evaluated.append(1)
        return {o.name: float(loss(module, o.data.dataset.tensors)) for o in objectives}

    front = pf.sweep(engine, evaluate, pf.simplex_grid(2, 5), maximize=False, progress=False)
    found = {name: tensor.clone() for name, tensor in engine.routers.state_dict().items()}
    found["values"], found["count"] = torch.from_numpy(front.values.copy()), torch.tensor(len(evaluated))
    save_file(found, out / f"rank{rank}.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    train_and_sweep(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    dist.destroy_process_group()
