"""How fast are recipes from disk to disk? `paretofuse recipe` and mergekit on the same file, whole processes.

GPT-2 (124 million parameters, weights drawn at random from a seed) as the base and four experts (of slerp: one), all
bfloat16; and task arithmetic at 1.3 billion, where the disk has the word. Both processes are timed from their start to their end, on a warm page cache; ours syncs its output to the
disk, mergekit does not. The random methods draw different elements: their results are checked by how far they lie from
the base.
"""

from __future__ import annotations

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


LARGE = {"n_embd": 2048, "n_layer": 24, "n_head": 16}
"""1.3 billion parameters in GPT-2's layout."""


def run(options: Options) -> list[Row]:
    """Measure wall time and peak memory of both, method by method."""
    rounds = 1 if options.quick else options.repeat(3)
    rows = _of_size("GPT-2", {}, tuple(METHODS), rounds, ("10", "0.1"), options)
    return rows + _of_size("1.3 B", LARGE, ("task_arithmetic",), min(rounds, 2), ("5", "0.1"), options)


def _of_size(
    name: str, size: dict[str, int], methods: tuple[str, ...], rounds: int, targets: tuple[str, str], options: Options
) -> list[Row]:
    path = {"PYTHONPATH": str(fetched(f"mergekit-{MERGEKIT}", f"mergekit=={MERGEKIT}", "immutables>=0.21"))}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="paretofuse-") as place:
        folder = Path(place)
        write_models(folder, options.quick, **size)
        for method in methods:
            config, out = folder / f"{method}.yml", {"ours": folder / "ours", "mergekit": folder / "theirs"}
            config.write_text(_recipe(method, folder))
            commands = {
                "ours": [sys.executable, "-m", "paretofuse", "recipe", str(config), "-o", str(out["ours"]),
                         "--threads", str(options.threads)],
                "mergekit": [sys.executable, "-m", "mergekit.scripts.run_yaml", str(config), str(out["mergekit"]),
                             "--no-copy-tokenizer", "--num-threads", str(options.threads), "--quiet"],
            }  # fmt: skip
            measured: dict[str, list[tuple[float, int]]] = {"ours": [], "mergekit": []}
            for number in range(1 + rounds):
                for written in out.values():
                    shutil.rmtree(written, ignore_errors=True)
                results = {
                    "ours": measured_process(commands["ours"]),
                    "mergekit": measured_process(commands["mergekit"], path),
                }
                if number == 0:  # also the warm-up
                    _compare(method, folder, _tensors(out["ours"]), _tensors(out["mergekit"]))
                    continue
                for contender, result in results.items():
                    measured[contender].append(result)
            rows += _rows(f"{name}, {method}, bf16", measured, targets)
    return rows


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


def _rows(case: str, measured: dict[str, list[tuple[float, int]]], targets: tuple[str, str]) -> list[Row]:
    seconds = {name: [result[0] for result in results] for name, results in measured.items()}
    memory = {name: [result[1] / 1e6 for result in results] for name, results in measured.items()}
    theirs = f"mergekit {MERGEKIT}"
    speedup = paired_ratio(seconds["mergekit"], seconds["ours"])
    share = statistics.median(memory["ours"]) / statistics.median(memory["mergekit"])
    return [
        Row(case, "paretofuse recipe", "time", "s", seconds["ours"]),
        Row(case, theirs, "time", "s", seconds["mergekit"], None, None, "theirs / ours", speedup, f">= {targets[0]}"),
        Row(case, "paretofuse recipe", "peak memory", "MB", memory["ours"], None, None, "ours / theirs", share,
            f"<= {targets[1]}"),
        Row(case, theirs, "peak memory", "MB", memory["mergekit"]),
    ]  # fmt: skip
