"""How much memory does learning take? The peak of each contender of train_step, each in a process of its own.

Counted is all resident memory of the process: weights, experts, activations, gradients, the libraries themselves, and
pages of mapped files. "step" is the peak over two steps (the kernel's VmHWM, reset after everything was set up);
"above weights" is that less what was resident when the first step began: weights, experts and libraries.

    ours                    pf.stack, deltas in float32
    ours, bf16 deltas       pf.stack(delta_dtype=bfloat16): float32 base and merges
    ours, int8              pf.stack(planes="int8")
    ours, int8, sketch 16   the same with pf.fit(sketch=16): no weight gradients of linear layers
    ours, mapped store      pf.load: the files are mapped, their pages belong to the page cache and count here too
    ours, layer by layer    the same with materialize=False: a layer is merged when it runs, then its pages are let go
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

import paretofuse as pf
from benchmarks.harness.record import (
    ROOT,
    BenchmarkError,
    Options,
    Row,
    paired_ratio,
    peak_bytes,
    reset_peak,
    resident,
)
from benchmarks.models import clip
from benchmarks.speed import train_step

LAYERWISE = "ours, layer by layer"
INT8 = "ours, int8"
SKETCHED = f"ours, int8, sketch {train_step.SKETCH}"
OURS = ("ours", "ours, bf16 deltas", INT8, SKETCHED, "ours, mapped store", LAYERWISE)
CONTENDERS = (*OURS, "plain dense", "PWEMoE")
TARGETS = {INT8: "<= 0.45", SKETCHED: "<= 0.40"}
"""The others': <= 0.65."""


def run(options: Options) -> list[Row]:
    """Measure each contender in a child process."""
    if resident() is None:
        raise BenchmarkError("this benchmark reads /proc/self/status, which this system does not have")
    found: dict[str, dict[str, list[float]]] = {
        name: {"step": [], "above weights": []} for name in CONTENDERS
    }
    with tempfile.TemporaryDirectory(prefix="paretofuse-") as folder:
        base = clip.vision_tower(options.quick)
        experts = clip.write_experts(base, Path(folder))
        pf.stack(base, experts).save(Path(folder) / "store")
        del base
        for _ in range(1 if options.quick else min(options.repeat(3), 3)):
            for name in CONTENDERS:
                for quantity, value in _child(name, folder, options).items():
                    found[name][quantity].append(value)
    rows = []
    for quantity in ("step", "above weights"):
        theirs = found["PWEMoE"][quantity]
        for name in CONTENDERS:
            values = found[name][quantity]
            mine = name in OURS
            rows.append(
                Row(
                    case=f"router step, ViT-B/32: {quantity}",
                    contender=name,
                    quantity="peak memory",
                    unit="MB",
                    values=values,
                    comparison="ours / PWEMoE" if mine else "",
                    ratio=paired_ratio(values, theirs) if mine else None,
                    target=TARGETS.get(name, "<= 0.65") if mine and quantity == "step" else "",
                )
            )
    return rows


def _child(name: str, folder: str, options: Options) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.speed.memory", name, folder, str(options.threads)]
    command += ["quick"] if options.quick else []
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BenchmarkError(f"{name}: {done.stderr[-2000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(name: str, folder: Path, options: Options) -> dict[str, float]:
    """In the child: set up, take a step, then two more under the meter; MB (10^6 bytes)."""
    torch.set_num_threads(options.threads)
    base = clip.vision_tower(options.quick)
    batches = clip.batches(base, train_step.batch_size(options))
    experts = {path.stem: path for path in sorted(folder.glob("task*.safetensors"))}
    context: AbstractContextManager[None] = nullcontext()
    if name == "plain dense":
        step = train_step.dense_step(base, batches)
    elif name == "PWEMoE":
        clip.upscale(base, experts)
        step = train_step.pwemoe_step(base, batches)
    else:
        engine = _engine(name, base, experts, folder)
        step = train_step.our_step(engine, batches, materialize=name != LAYERWISE)
        if name == SKETCHED:
            context = engine._in_place.sketched(train_step.SKETCH, materialize=True)
    del base
    with context:
        before = resident()
        reset_peak()
        for _ in range(2):
            step()
        peak = peak_bytes()
    return {"step": peak / 1e6, "above weights": (peak - (before or 0)) / 1e6}


def _engine(name: str, base: torch.nn.Module, experts: dict[str, Path], folder: Path) -> pf.Engine:
    if name in ("ours, mapped store", LAYERWISE):
        return pf.load(folder / "store", module=base)
    if "int8" in name:
        return pf.stack(base, experts, planes="int8")
    return pf.stack(base, experts, delta_dtype=torch.bfloat16 if "bf16" in name else None)


if __name__ == "__main__":
    contender, place, threads, *rest = sys.argv[1:]
    chosen = Options(quick=rest == ["quick"], threads=int(threads))
    print(json.dumps(measure(contender, Path(place), chosen)))
