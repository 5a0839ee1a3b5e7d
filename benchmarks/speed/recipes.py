"""How fast are recipes from disk to disk? `paretofuse recipe` and mergekit on the same file, whole processes.

GPT-2 (124 million parameters, weights drawn at random from a seed) as the base and four experts (of slerp: one), all
bfloat16. Both processes are timed from their start to their end, on a warm page cache; ours syncs its output to the
disk, mergekit does not. The random methods draw different elements: their results are checked by how far they lie from
the base.

And task arithmetic at 1.3 billion parameters, where the disk has the word: the models are dropped from the page cache
before each run, as mergekit's own memory drops them, and beside both a process reads all models and writes and syncs
as many bytes as a merge, which no merge can beat.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.harness.record import Options, Row, check, fetched, measured_process, paired_ratio
from benchmarks.speed.disk_merge import MERGEKIT, SHARES, write_models

METHODS = {
    "linear": "parameters: {normalize: false}",
    "task_arithmetic": "parameters: {lambda: 0.9}",
    "ties": "parameters: {density: 0.3}",
    "dare_ties": "parameters: {density: 0.3}",
    "della": "parameters: {density: 0.3, epsilon: 0.1}",
    "slerp": "parameters: {t: 0.4}",
}
"""What each is measured with, besides the experts' weights."""

RANDOM = ("dare_ties", "della")


ALONE = """
import os, sys
out, *inputs = sys.argv[1:]
block = bytearray(8 << 20)
with open(out, "wb") as target:
    for number, name in enumerate(inputs):
        with open(name, "rb", buffering=0) as file:
            while count := file.readinto(block):
                if number == 0:
                    target.write(memoryview(block)[:count])
    target.flush()
    os.fsync(target.fileno())
"""
"""Reads all files, and writes as much as one of them."""

LARGE = {"n_embd": 2048, "n_layer": 24, "n_head": 16}
"""1.3 billion parameters in GPT-2's layout."""


def run(options: Options) -> list[Row]:
    """Measure wall time and peak memory of both, method by method."""
    rounds = 1 if options.quick else options.repeat(3)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="paretofuse-") as place:
        folder = Path(place)
        write_models(folder, options.quick)
        for method in METHODS:
            measured = _measured(method, folder, rounds, options.threads)
            rows += _rows(f"GPT-2, {method}, bf16", measured, ">= 10")
    return rows + large(options)


def large(options: Options) -> list[Row]:
    """Measure task arithmetic at 1.3 billion parameters."""
    with tempfile.TemporaryDirectory(prefix="paretofuse-") as place:
        folder = Path(place)
        write_models(folder, options.quick, **LARGE)
        measured = _measured("task_arithmetic", folder, 1 if options.quick else 2, options.threads, cold=True)
    case = "1.3 B, task_arithmetic, bf16, cold"
    rows = _rows(case, measured, ">= 5")
    alone = [result[0] for result in measured["disk"]]
    share = paired_ratio([result[0] for result in measured["ours"]], alone)
    return [
        *rows,
        Row(case, "reading and writing alone", "time", "s", alone, None, None, "ours / alone", share),
    ]


def _measured(
    method: str, folder: Path, rounds: int, threads: int, *, cold: bool = False
) -> dict[str, list[tuple[float, int]]]:
    """Seconds and peak bytes of both, by round; of a cold merge those of the disk alone as well."""
    config, out = folder / f"{method}.yml", {"ours": folder / "ours", "mergekit": folder / "theirs"}
    config.write_text(_recipe(method, folder))
    path = {"PYTHONPATH": str(fetched(f"mergekit-{MERGEKIT}", f"mergekit=={MERGEKIT}", "immutables>=0.21"))}
    inputs = [folder / name / "model.safetensors" for name in ("base", *SHARES)]
    commands = {
        "ours": [sys.executable, "-m", "paretofuse", "recipe", str(config), "-o", str(out["ours"]),
                 "--threads", str(threads)],
        "mergekit": [sys.executable, "-m", "mergekit.scripts.run_yaml", str(config), str(out["mergekit"]),
                     "--no-copy-tokenizer", "--num-threads", str(threads), "--quiet"],
    }  # fmt: skip
    if cold:
        commands["disk"] = [sys.executable, "-c", ALONE, str(folder / "alone"), *map(str, inputs)]
    measured: dict[str, list[tuple[float, int]]] = {name: [] for name in commands}
    for number in range(1 + rounds):
        for written in out.values():
            shutil.rmtree(written, ignore_errors=True)
        results = {}
        for contender, command in commands.items():
            if cold:
                _forget(inputs)
            results[contender] = measured_process(command, path if contender == "mergekit" else None)
        if number == 0:  # also the warm-up
            _compare(method, folder, _tensors(out["ours"]), _tensors(out["mergekit"]))
            continue
        for contender, result in results.items():
            measured[contender].append(result)
    return measured


def _forget(paths: list[Path]) -> None:
    """Have files read from the disk again."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())  # what is not written yet stays
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _recipe(method: str, folder: Path) -> str:
    shares = dict(list(SHARES.items())[:1]) if method == "slerp" else SHARES
    models = "".join(
        f"- model: {folder / name}\n  parameters: {{weight: {share}}}\n" for name, share in shares.items()
    )
    base = "" if method == "linear" else f"base_model: {folder / 'base'}\n"
    return f"merge_method: {method}\n{base}models:\n{models}dtype: bfloat16\n{METHODS[method]}\n"


def _compare(method: str, folder: Path, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Both lie as far from the base, and near each other where nothing is random.

    mergekit computes in bfloat16, and at the edge of TIES' density both may keep others of equal magnitudes: hence the
    norm, not each element.

    Raises:
        BenchmarkError: they differ.
    """
    base = load_file(folder / "base" / "model.safetensors")
    check(ours.keys() == theirs.keys(), f"{method}: other tensors")
    for name, truth in theirs.items():
        wide, mine = base[name].double(), ours[name].double()
        moved, size = (mine - wide).norm().item(), (truth.double() - wide).norm().item()
        rounding = torch.finfo(torch.bfloat16).eps * wide.norm().item()
        # Which elements are drawn matters where there are few.
        share = 0.1 + (6 / truth.numel() ** 0.5 if method in RANDOM else 0.0)
        check(
            abs(moved - size) <= share * size + rounding,
            f"{method}: {name} moved by {moved:.3g}, not {size:.3g}",
        )
        if method not in RANDOM:
            apart = (mine - truth.double()).norm().item()
            check(apart <= 0.3 * size + 2 * rounding, f"{method}: {name} is {apart:.3g} from mergekit's")


def _tensors(folder: Path) -> dict[str, Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def _rows(case: str, measured: dict[str, list[tuple[float, int]]], target: str) -> list[Row]:
    seconds = {name: [result[0] for result in results] for name, results in measured.items()}
    memory = {name: [result[1] / 1e6 for result in results] for name, results in measured.items()}
    theirs = f"mergekit {MERGEKIT}"
    speedup = paired_ratio(seconds["mergekit"], seconds["ours"])
    share = statistics.median(memory["ours"]) / statistics.median(memory["mergekit"])
    return [
        Row(case, "paretofuse recipe", "time", "s", seconds["ours"]),
        Row(case, theirs, "time", "s", seconds["mergekit"], None, None, "theirs / ours", speedup, target),
        Row(case, "paretofuse recipe", "peak memory", "MB", memory["ours"], None, None, "ours / theirs", share,
            "<= 0.1"),
        Row(case, theirs, "peak memory", "MB", memory["mergekit"]),
    ]  # fmt: skip
