"""How much memory does learning a Pareto set take, and how long a step, against the number of experts and the size?

GPT-2's architecture with seeded random weights, MLPs routed, one batch of 64 tokens for each objective and step. Every
contender runs in a process of its own:

    all weights, Adam       linear scalarization of one model, every weight trained by Adam: no experts, one preference;
                            its memory does not depend on E, so it has its turn at E = 2 and 8 only
    ours, merged            pf.fit through the live module, on a mapped store
    ours, layer by layer    pf.fit(materialize=False), on a mapped store
    ours, in memory         the same on pf.stack's own tensors; at GPT-2's size and E = 2 only

Counted from before the model is loaded to the end of the last step:

    peak memory             the most that was resident (VmHWM): libraries, weights, activations, pages of mapped files
    above libraries         that less what was resident when torch, transformers and paretofuse had been imported
    anonymous               the most anonymous memory, sampled every 2 ms, less the libraries' own
    mapped files            the most pages of mapped files, likewise: the system can take these back at any time
    step time               the median after the first step

    python -m benchmarks.speed.training_memory --plot     draws docs/training_memory.png from the CSV file
"""

from __future__ import annotations

import csv
import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import paretofuse as pf
from benchmarks.harness.record import (
    DATA,
    ROOT,
    BenchmarkError,
    Options,
    Row,
    check,
    peak_bytes,
    reset_peak,
    resident,
)
from paretofuse.api import stack_to_store

LS, MERGED, LAYERWISE, IN_MEMORY = (
    "all weights, Adam", "ours, merged", "ours, layer by layer", "ours, in memory",
)  # fmt: skip
QUANTITIES = {
    "peak memory": "MB", "above libraries": "MB", "anonymous": "MB", "mapped files": "MB", "step time": "ms",
}  # fmt: skip
PICTURE = ROOT / "docs" / "training_memory.png"


@dataclass(frozen=True)
class Case:
    """A model's size, the number of experts, and the deltas' dtype; the base is float32."""

    layers: int
    width: int
    experts: int
    deltas: str

    def __str__(self) -> str:
        return f"layers={self.layers} width={self.width} E={self.experts} deltas={self.deltas}"


def cases(quick: bool) -> dict[Case, tuple[str, ...]]:
    """Each case's contenders."""
    three = (LS, MERGED, LAYERWISE)
    if quick:
        return {Case(2, 32, 2, "float32"): (*three, IN_MEMORY), Case(2, 32, 4, "bfloat16"): three}
    gpt2 = {Case(12, 768, 2, "float32"): (*three, IN_MEMORY)}
    sizes = {Case(layers, width, 2, "float32"): three for layers, width in ((4, 256), (6, 512), (6, 768))}
    experts = {
        Case(12, 768, count, "bfloat16"): three if count in (2, 8) else (MERGED, LAYERWISE)
        for count in (2, 8, 4, 16)
    }
    return {**gpt2, **experts, **sizes}


def targets(case: Case, name: str) -> str:
    """What LS / ours should be in peak memory; empty where nothing was asked for."""
    if name != LAYERWISE or case.width != 768 or case.layers != 12:
        return ""
    return {(2, "float32"): ">= 2", (8, "bfloat16"): ">= 1"}.get((case.experts, case.deltas), "")


def run(options: Options) -> list[Row]:
    """Measure every contender of every case in a child process."""
    if resident() is None:
        raise BenchmarkError("this benchmark reads /proc/self/status, which this system does not have")
    rows = []
    for case, contenders in cases(options.quick).items():
        with tempfile.TemporaryDirectory(prefix="paretofuse-") as folder:
            write_models(case, Path(folder))
            found = {name: _child(case, name, folder, options) for name in contenders}
        losses = [found[name]["losses"] for name in contenders if name != LS]
        check(
            all(
                abs(a - b) <= 1e-3 * abs(b) for other in losses for a, b in zip(other, losses[0], strict=True)
            ),
            f"{case}: the losses of our modes differ: {losses}",
        )
        for name, result in found.items():
            rows += [_row(case, name, quantity, result, found.get(LS)) for quantity in QUANTITIES]
    return rows


def _row(case: Case, name: str, quantity: str, result: dict[str, Any], theirs: dict[str, Any] | None) -> Row:
    compared = name != LS and quantity in ("peak memory", "above libraries", "step time")
    return Row(
        case=str(case),
        contender=name,
        quantity=quantity,
        unit=QUANTITIES[quantity],
        values=[result[quantity]],
        comparison="LS / ours" if compared and theirs else "",
        ratio=theirs[quantity] / result[quantity] if compared and theirs else None,
        target=targets(case, name) if quantity == "peak memory" else "",
    )


def model_of(case: Case, quick: bool) -> GPT2LMHeadModel:
    """The base, drawn from a seed."""
    torch.manual_seed(0)
    vocabulary = 1000 if quick else 50257
    config = GPT2Config(
        n_layer=case.layers,
        n_embd=case.width,
        n_head=case.width // 32 if case.width < 64 else case.width // 64,
        vocab_size=vocabulary,
        bos_token_id=0,
        eos_token_id=0,
        loss_type="ForCausalLMLoss",
    )
    return GPT2LMHeadModel(config)


def write_models(case: Case, folder: Path) -> None:
    """The store, and two experts' files that all experts share: nothing here depends on their values."""
    base = model_of(case, case.width < 64)
    base.save_pretrained(folder / "base")
    files = []
    for index in range(2):
        generator = torch.Generator().manual_seed(1 + index)
        expert = {
            name: tensor + 0.002 * torch.randn(tensor.shape, generator=generator)
            for name, tensor in base.state_dict().items()
            if name != "lm_head.weight"  # tied
        }
        files.append(folder / f"expert{index}.safetensors")
        save_file(expert, files[-1])
    stack_to_store(folder / "base", experts_of(case, folder), folder / "store", **stacking(case))


def experts_of(case: Case, folder: Path) -> dict[str, Path]:
    """The experts' files by objective."""
    return {f"task{i}": folder / f"expert{i % 2}.safetensors" for i in range(case.experts)}


def stacking(case: Case) -> dict[str, Any]:
    """How all of ours are stacked."""
    return {"route": "mlp", "delta_dtype": getattr(torch, case.deltas)}


def _child(case: Case, name: str, folder: str, options: Options) -> dict[str, Any]:
    given = json.dumps([case.layers, case.width, case.experts, case.deltas])
    command = [
        sys.executable,
        "-m",
        "benchmarks.speed.training_memory",
        given,
        name,
        folder,
        str(options.threads),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BenchmarkError(f"{case}, {name}: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


class Meter(threading.Thread):
    """Samples this process's anonymous memory and pages of files, in bytes; keeps the most of each."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.anonymous = self.files = 0
        self._over = threading.Event()

    def run(self) -> None:
        """Sample until stopped."""
        page = 4096
        while not self._over.wait(0.002):
            _, total, files = (int(n) * page for n in Path("/proc/self/statm").read_text().split()[:3])
            self.anonymous, self.files = max(self.anonymous, total - files), max(self.files, files)

    def stop(self) -> None:
        """End."""
        self._over.set()
        self.join()


@contextmanager
def metered() -> Iterator[dict[str, float]]:
    """Measures a block; the dict is filled at its end."""
    before = {entry: resident(entry) or 0 for entry in ("VmRSS", "RssAnon", "RssFile")}
    result: dict[str, float] = {}
    meter = Meter()
    reset_peak()
    meter.start()
    yield result
    peak = peak_bytes()
    meter.stop()
    result["peak memory"] = peak / 1e6
    result["above libraries"] = (peak - before["VmRSS"]) / 1e6
    result["anonymous"] = (meter.anonymous - before["RssAnon"]) / 1e6
    result["mapped files"] = (meter.files - before["RssFile"]) / 1e6


def measure(case: Case, name: str, folder: Path, threads: int) -> dict[str, Any]:
    """In the child: load, then three steps (two where E is large)."""
    torch.set_num_threads(threads)
    quick = case.width < 64
    steps = 3 if case.experts < 8 else 2
    vocabulary = 1000 if quick else 50257
    generator = torch.Generator().manual_seed(5)
    batches = [torch.randint(vocabulary, (1, 64), generator=generator) for _ in range(case.experts)]
    ends: list[float] = []
    losses: list[float] = []

    def ended(record: dict[str, float]) -> None:
        ends.append(time.perf_counter())
        losses.extend(value for key, value in record.items() if key.startswith("loss/"))

    with metered() as result:
        train = _dense(case, quick, batches) if name == LS else _ours(case, name, folder, batches)
        ends.append(time.perf_counter())
        train(steps, ended)
    durations = [1e3 * (after - before) for before, after in pairwise(ends[1:])]
    return {**result, "step time": statistics.median(durations), "losses": losses}


Train = Callable[[int, Callable[[dict[str, float]], None]], None]


def language_loss(module: nn.Module, ids: Tensor) -> Tensor:
    """The language model's own."""
    loss: Tensor = module(ids, labels=ids).loss
    return loss


def _dense(case: Case, quick: bool, batches: list[Tensor]) -> Train:
    """One model, every weight trained at equal preferences; a backward for each objective, so that graphs are freed."""
    model = model_of(case, quick)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)

    def train(steps: int, ended: Callable[[dict[str, float]], None]) -> None:
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            for ids in batches:
                (language_loss(model, ids) / len(batches)).backward()
            optimizer.step()
            ended({})

    return train


def _ours(case: Case, name: str, folder: Path, batches: list[Tensor]) -> Train:
    if name == IN_MEMORY:
        engine = pf.stack(folder / "base", experts_of(case, folder), **stacking(case))
    else:
        engine = pf.load(folder / "store")
    objectives: dict[str, Any] = {
        objective: ([ids], language_loss) for objective, ids in zip(engine.objectives, batches, strict=True)
    }

    def train(steps: int, ended: Callable[[dict[str, float]], None]) -> None:
        pf.fit(engine, objectives, steps=steps, callback=ended, materialize=name == MERGED, progress=False)

    return train


def plot(path: Path = DATA / "training_memory.csv", picture: Path = PICTURE) -> None:
    """Draw the latest run of the CSV file: memory against E and against the model's size."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["quick"] == "False"]
    rows = [row for row in rows if row["date"] == rows[-1]["date"]]
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    axes = figure.subplots(1, 2)
    looks = {LS: ("#444444", "s"), MERGED: ("#0072B2", "o"), LAYERWISE: ("#D55E00", "^")}
    series: tuple[tuple[str, str, Callable[[dict[str, int]], float]], ...] = (
        ("bfloat16", "number of experts (GPT-2, bfloat16 deltas)", lambda numbers: numbers["E"]),
        ("float32", "million parameters (two experts, float32 deltas)", _million_parameters),
    )
    for axis, (deltas, label, place) in zip(axes, series, strict=True):
        for line, (colour, marker) in looks.items():
            points: dict[str, dict[float, float]] = {quantity: {} for quantity in QUANTITIES}
            for row in rows:
                numbers = {key: int(n) for key, n in re.findall(r"(\w+)=(\d+)(?: |$)", row["case"])}
                if row["contender"] == line and row["case"].endswith(deltas):
                    points[row["quantity"]][place(numbers)] = float(row["median"])
            axis.plot(*_line(points["above libraries"], 1e-3), color=colour, marker=marker)
            axis.plot(
                *_line(points["anonymous"], 1e-3), color=colour, ls=":", marker=marker, ms=4, mfc="white"
            )
        axis.set_xlabel(label)
        axis.set_ylabel("peak memory in GB (lower is better)")
        axis.set_ylim(bottom=0)
        axis.margins(y=0.1)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_xticks([2, 4, 8, 16])
    words = {
        LS: "all weights trained by Adam",
        MERGED: "ParetoFuse, merged",
        LAYERWISE: "ParetoFuse, layer by layer",
    }
    handles = [
        Line2D([], [], color=colour, marker=marker, label=words[line])
        for line, (colour, marker) in looks.items()
    ]
    handles += [
        Line2D([], [], color="#444444", label="above what libraries hold"),
        Line2D(
            [],
            [],
            color="#444444",
            ls=":",
            label="of it not backed by a file (a mapped store's pages can be dropped)",
        ),
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=3, frameon=False, fontsize=9)
    figure.savefig(picture, dpi=140, facecolor="white")


def _line(points: dict[float, float], scale: float) -> tuple[list[float], list[float]]:
    ordered = sorted(points)
    return ordered, [scale * points[x] for x in ordered]


def _million_parameters(numbers: dict[str, int]) -> float:
    width = numbers["width"]
    return (numbers["layers"] * (12 * width + 13) * width + (50257 + 1024 + 2) * width) / 1e6


if __name__ == "__main__":
    if sys.argv[1:] == ["--plot"]:
        plot()
    else:
        given, contender, place_, threads_ = sys.argv[1:]
        print(json.dumps(measure(Case(*json.loads(given)), contender, Path(place_), int(threads_))))
