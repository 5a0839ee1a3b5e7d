"""Checkpoint files: every damage is one error, nobody else's file is touched, and no pickle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import paretofuse as pf
from paretofuse.engine.engine import Engine
from paretofuse.engine.store.atomic import fresh
from paretofuse.engine.training.checkpoint import read_checkpoint, write_checkpoint
from tests.training.test_fit import Point, equal, problem, state


def small() -> tuple[Engine, dict[str, Any]]:
    """A tiny run, with all that a checkpoint can hold."""
    engine = pf.stack(Point(0, 0), {"x": Point(2, 0), "y": Point(0, 2)})
    targets = {"x": torch.tensor([1.0, 0.0]), "y": torch.tensor([0.0, 1.0])}
    objectives = {
        name: ([target] * 3, lambda module, batch: module(batch)) for name, target in targets.items()
    }
    validation = pf.Validation(
        lambda module: pf.evaluate(module, objectives), maximize=False, every=1, patience=9
    )
    return engine, {
        "objectives": objectives,
        "validation": validation,
        "regularization": 0.1,
        "progress": False,
    }


def written(path: Path, steps: int = 2) -> tuple[Engine, dict[str, Any]]:
    engine, run = small()
    pf.fit(engine, **run, steps=steps, checkpoint=path)
    return engine, run


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    path = tmp_path / "c"
    engine, run = written(path)
    content, before = path.read_bytes(), state(engine)
    rng = np.random.default_rng(0)
    header = 8 + int.from_bytes(content[:8], "little")
    places = np.unique([*rng.integers(0, header, 150), *rng.integers(0, len(content), 150), len(content) - 1])
    for place in places.tolist():
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(pf.StoreError, match=str(path)):
            pf.fit(engine, **run, steps=3, checkpoint=path)
        assert path.read_bytes() == bytes(damaged)
    assert equal(state(engine), before)


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_truncated_files(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "c"
    engine, run = written(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(pf.StoreError, match="name another checkpoint file"):
        pf.fit(engine, **run, steps=3, checkpoint=path)


DAMAGES: dict[str, Any] = {
    "step -5": lambda tensors, s: s.update(step=-5),
    "step 0": lambda tensors, s: s.update(step=0),
    "step 1.5": lambda tensors, s: s.update(step=1.5),
    "step true": lambda tensors, s: s.update(step=True),
    "step text": lambda tensors, s: s.update(step="2"),
    "no step": lambda tensors, s: s.pop("step"),
    "no settings": lambda tensors, s: s.pop("settings"),
    "settings a list": lambda tensors, s: s.update(settings=[]),
    "no streams": lambda tensors, s: s.pop("streams"),
    "one stream": lambda tensors, s: s.update(streams=s["streams"][:1]),
    "a stream of three": lambda tensors, s: s.update(streams=[[0, 1, 2], [0, 1, 2]]),
    "a stream before its start": lambda tensors, s: s.update(streams=[[0, -1], [0, 1]]),
    "no preferences": lambda tensors, s: s.pop("preferences"),
    "preferences of another sampler": lambda tensors, s: s.update(preferences={"generator": {}}),
    "no smoothed losses": lambda tensors, s: s.pop("smoothed"),
    "smoothed losses of another shape": lambda tensors, s: s.update(
        smoothed={"products": [[1.0]], "targets": [[1.0]]}
    ),
    "no validation": lambda tensors, s: s.pop("validation"),
    "validation without scores": lambda tensors, s: s["validation"].update(scores=[]),
    "validation's reference": lambda tensors, s: s["validation"].update(reference=[1.0]),
    "no routers": lambda tensors, s: tensors.pop("routers.output.bias"),
    "routers of another shape": lambda tensors, s: tensors.update({"routers.output.bias": torch.zeros(7)}),
    "routers of another dtype": lambda tensors, s: tensors.update(
        {"routers.output.bias": tensors["routers.output.bias"].double()}
    ),
    "no moments": lambda tensors, s: tensors.pop("optimizer.0.exp_avg"),
    "moments of another shape": lambda tensors, s: tensors.update({"optimizer.1.exp_avg_sq": torch.zeros(1, 1)}),
    "no start": lambda tensors, s: tensors.pop("start.output.bias"),
    "no best": lambda tensors, s: tensors.pop("best.output.bias"),
    "no random state": lambda tensors, s: tensors.pop("random.cpu"),
    "a short random state": lambda tensors, s: tensors.update({"random.cpu": torch.zeros(3, dtype=torch.uint8)}),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_whatever_is_wrong_inside_is_a_store_error(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "c"
    engine, run = written(path)
    tensors, inside = read_checkpoint(path)
    DAMAGES[damage](tensors, inside)
    write_checkpoint(path, tensors, inside)  # with the right checksum
    before = state(engine)
    with pytest.raises(pf.StoreError, match=r"a damaged checkpoint.*delete it to start anew"):
        pf.fit(engine, **run, steps=3, checkpoint=path)
    assert equal(state(engine), before)


def foreign(path: Path, kind: str) -> None:
    if kind == "text":
        path.write_text("my thesis\n")
    elif kind == "empty":
        path.touch()
    elif kind == "model":
        save_file({"weight": torch.ones(3)}, path)
    elif kind == "pickle":
        torch.save({"weight": torch.ones(3)}, path)
    else:
        save_file({"weight": torch.ones(3)}, path, metadata={"format": "paretofuse-checkpoint-1"})


@pytest.mark.parametrize("kind", ["text", "empty", "model", "pickle", "older"])
def test_a_file_that_is_not_ours_is_left_alone_and_nobody_is_told_to_delete_it(
    tmp_path: Path, kind: str
) -> None:
    engine, run = small()
    path = tmp_path / "c"
    foreign(path, kind)
    content = path.read_bytes()
    with pytest.raises(pf.StoreError, match="left as it is: name another checkpoint file") as told:
        pf.fit(engine, **run, steps=2, checkpoint=path)
    assert "delete" not in str(told.value)
    assert path.read_bytes() == content


def test_a_directory_and_a_place_that_cannot_be_written_are_told_before_the_first_step(
    tmp_path: Path,
) -> None:
    engine, run = small()
    with pytest.raises(ValueError, match="which is a directory"):
        pf.fit(engine, **run, steps=2, checkpoint=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        pf.fit(engine, **run, steps=2, checkpoint=tmp_path / "file" / "c")


def test_temporary_names_cannot_be_guessed_and_links_are_not_followed(tmp_path: Path) -> None:
    """A link under the temporary name, or under the checkpoint's own, once led to a file that was overwritten."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / f".c.{os.getpid()}.tmp").symlink_to(victim)
    written(folder / "c")
    assert victim.read_text() == "precious"
    names = []
    for _ in range(2):
        with fresh(folder / "c") as path:
            names.append(path.name)
    assert names[0] != names[1]
    (folder / "linked").symlink_to(victim)
    with pytest.raises(pf.StoreError, match="left as it is"):
        written(folder / "linked")
    assert victim.read_text() == "precious"


def test_a_link_to_a_checkpoint_stays_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    written(tmp_path / "disk" / "c")
    (tmp_path / "c").symlink_to(tmp_path / "disk" / "c")
    written(tmp_path / "c", steps=3)
    assert (tmp_path / "c").is_symlink()
    assert read_checkpoint(tmp_path / "disk" / "c")[1]["step"] == 3


SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>
int fsync(int file) {
  if (getenv("SHIM_FULL")) { errno = ENOSPC; return -1; }
  if (write(2, "fsync ", 6) != 6) abort();
  return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(file);
}
int rename(const char *from, const char *to) {
  if (write(2, "rename ", 7) != 7) abort();
  return ((int (*)(const char *, const char *))dlsym(RTLD_NEXT, "rename"))(from, to);
}
"""
"""Tells of two calls of the C library, and lets one of them fail."""

WRITES = """
import os, sys, torch
from paretofuse.engine.store.atomic import fresh
from paretofuse.engine.training.checkpoint import write_checkpoint
write_checkpoint(sys.argv[1], {"a": torch.ones(3)}, {"step": 1})
os.environ["SHIM_FULL"] = "1"
try:
    write_checkpoint(sys.argv[1], {"a": torch.zeros(3)}, {"step": 2})
except OSError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="preloads a library as Linux does")
def test_a_checkpoint_is_synced_before_it_takes_its_place_and_a_full_disk_costs_none(tmp_path: Path) -> None:
    """Renamed before its bytes are on the disk, it may be empty after a power cut."""
    (tmp_path / "shim.c").write_text(SHIM)
    shim, folder = tmp_path / "shim.so", tmp_path / "run"
    folder.mkdir()
    subprocess.run(["cc", "-shared", "-fPIC", "-o", shim, tmp_path / "shim.c", "-ldl"], check=True)
    done = subprocess.run(
        [sys.executable, "-c", WRITES, str(folder / "c")],
        env={**os.environ, "LD_PRELOAD": str(shim)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stderr.split() == ["fsync", "rename", "fsync"]  # the file, its place, the directory's entry
    assert "No space left" in done.stdout
    tensors, inside = read_checkpoint(folder / "c")
    assert inside["step"] == 1
    assert torch.equal(tensors["a"], torch.ones(3))
    assert [entry.name for entry in folder.iterdir()] == ["c"]


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {
        "scalar": torch.tensor(3.0),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "none": torch.zeros(0, 3),
        "half": torch.randn(2, 3).bfloat16(),
    }
    write_checkpoint(tmp_path / "deep" / "c", tensors, {"step": 2, "ä": [0.1, None]})
    found, inside = read_checkpoint(tmp_path / "deep" / "c")
    assert inside == {"step": 2, "ä": [0.1, None]}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_checkpoint_has_no_pickle(tmp_path: Path) -> None:
    engine, objectives = problem()
    pf.fit(engine, objectives, steps=2, checkpoint=tmp_path / "c", progress=False)
    content = (tmp_path / "c").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert json.loads(header["__metadata__"]["state"])["step"] == 2
    with safe_open(tmp_path / "c", framework="pt") as file:
        assert any(name.startswith("routers.") for name in file.keys())  # noqa: SIM118


def test_checkpoints_of_other_runs(tmp_path: Path) -> None:
    engine, objectives = problem()
    path = tmp_path / "run.ckpt"
    pf.fit(engine, objectives, steps=2, checkpoint=path, progress=False)
    kept = path.read_bytes()
    other, _ = problem()
    with torch.no_grad():
        other.routers.output.bias.add_(1)
    before = state(other)
    with pytest.raises(ValueError, match=r"seed=0 \(now 5\).*use the same settings"):
        pf.fit(other, objectives, steps=2, seed=5, checkpoint=path, progress=False)
    assert equal(before, state(other))  # a refusal changes nothing
    assert path.read_bytes() == kept
    starts: dict[str, dict[str, Any]] = {"init": {"init": "sqrt"}, "groups": {"route": "tensor"}}
    for word, settings in starts.items():
        with pytest.raises(ValueError, match=word):
            pf.fit(problem(**settings)[0], objectives, steps=2, checkpoint=path, progress=False)
    with pytest.raises(ValueError, match="weights="):  # experts that were trained anew
        pf.fit(problem(seed=7)[0], objectives, steps=2, checkpoint=path, progress=False)


@pytest.mark.parametrize("ideal", [(0.0, 0.0), np.zeros(2)])
def test_solver_options_of_any_kind_are_kept_and_resumed(tmp_path: Path, ideal: Any) -> None:
    engine, objectives = problem()
    settings: dict[str, Any] = {
        "method": "stch",
        "options": {"ideal": ideal},
        "checkpoint": tmp_path / "c",
        "progress": False,
    }
    assert len(pf.fit(engine, objectives, steps=2, **settings)) == 2
    assert pf.fit(engine, objectives, steps=2, **settings) == []
