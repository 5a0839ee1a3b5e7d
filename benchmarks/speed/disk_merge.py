"""How fast is a merge from disk to disk? `paretofuse merge` against mergekit's task_arithmetic, whole processes.

GPT-2 (124 million parameters, weights drawn at random from a seed) and four experts, all bfloat16. Both write a model
directory that from_pretrained opens; both processes are timed from their start to their end, on a warm page cache.
Ours reads a store, which is made once for all merges: its making is timed too, and counted apart. Ours syncs its
output to the disk, mergekit does not.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils.logging import disable_progress_bar

from benchmarks.harness.record import Options, Row, check, fetched, measured_process, paired_ratio

MERGEKIT = "0.1.5"
SHARES = {"alpha": 0.4, "beta": 0.3, "gamma": 0.2, "delta": 0.1}


def run(options: Options) -> list[Row]:
    """Measure wall time and peak memory of both."""
    path = {"PYTHONPATH": str(fetched(f"mergekit-{MERGEKIT}", f"mergekit=={MERGEKIT}", "immutables>=0.21"))}
    with tempfile.TemporaryDirectory(prefix="paretofuse-") as name:
        folder = Path(name)
        write_models(folder, options.quick)
        store, ours_out, theirs_out = folder / "store", folder / "ours", folder / "theirs"
        stacking = measured_process(_stack_command(folder, store))
        config = folder / "merge.yaml"
        config.write_text(_mergekit_config(folder))
        preference = ",".join(f"{objective}={share}" for objective, share in SHARES.items())
        ours = [sys.executable, "-m", "paretofuse", "merge", str(store), "--preference", preference]
        ours += ["--threads", str(options.threads), "-o", str(ours_out)]
        theirs = [sys.executable, "-m", "mergekit.scripts.run_yaml", str(config), str(theirs_out)]
        theirs += ["--no-copy-tokenizer", "--num-threads", str(options.threads), "--quiet"]
        measured: dict[str, list[tuple[float, int]]] = {"ours": [], "mergekit": []}
        for number in range(1 + (1 if options.quick else options.repeat(5))):
            for out in (ours_out, theirs_out):
                shutil.rmtree(out, ignore_errors=True)
            results = {
                "ours": measured_process(ours),
                "mergekit": measured_process(theirs, path),
            }
            if number == 0:  # also the warm-up
                _compare(folder, ours_out, theirs_out)
                continue
            for contender, result in results.items():
                measured[contender].append(result)
    return _rows(measured, stacking)


def write_models(folder: Path, quick: bool, **size: int) -> None:
    """Write a base and four experts as model directories, bfloat16; `size`: other arguments of GPT2Config."""
    disable_progress_bar()
    torch.manual_seed(0)
    config = GPT2Config(**size)
    if quick:
        small = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 101, "n_positions": 16}
        config = GPT2Config(**small, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).to(torch.bfloat16)
    model.save_pretrained(folder / "base")
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for objective in SHARES:
        with torch.no_grad():
            for name, tensor in model.named_parameters():
                tensor.copy_(base[name] + 0.002 * torch.randn(tensor.shape))
        model.save_pretrained(folder / objective)


def _stack_command(folder: Path, store: Path) -> list[str]:
    experts = [word for name in SHARES for word in ("--expert", f"{name}={folder / name}")]
    command = [sys.executable, "-m", "paretofuse", "stack", str(folder / "base"), *experts]
    return [*command, "-o", str(store)]


def _mergekit_config(folder: Path) -> str:
    """The same merge: identity routers at the preference are task arithmetic with these weights."""
    models = "".join(
        f"  - model: {folder / name}\n    parameters:\n      weight: {share}\n"
        for name, share in SHARES.items()
    )
    base = f"base_model: {folder / 'base'}\ndtype: bfloat16\n"
    return f"merge_method: task_arithmetic\nmodels:\n{models}{base}parameters:\n  normalize: false\n"


def _compare(folder: Path, ours: Path, theirs: Path) -> None:
    """Both are the float64 truth, rounded as bfloat16 arithmetic rounds it: ours once, mergekit at each expert.

    Raises:
        BenchmarkError: one of them is not.
    """
    base = load_file(folder / "base" / "model.safetensors")
    experts = {name: load_file(folder / name / "model.safetensors") for name in SHARES}
    outputs = {"ours": _weights(ours), "mergekit": _weights(theirs)}
    step = torch.finfo(torch.bfloat16).eps
    for name, tensor in base.items():
        wide = tensor.double()
        truth = wide + sum(SHARES[own] * (experts[own][name].double() - wide) for own in SHARES)
        scale = truth.abs().max().item()
        for contender, found in outputs.items():
            check(name in found, f"{contender} wrote no {name}")
            error = (found[name].double() - truth).abs().max().item()
            allowed = (1 if contender == "ours" else 4) * step * scale
            check(error <= allowed, f"{contender}: {name} is off by {error:.3g}, allowed {allowed:.3g}")


def _weights(folder: Path) -> dict[str, Tensor]:
    """A model directory's tensors, by the names that GPT2LMHeadModel stores them under."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def _rows(measured: Mapping[str, list[tuple[float, int]]], stacking: tuple[float, int]) -> list[Row]:
    seconds = {name: [result[0] for result in results] for name, results in measured.items()}
    memory = {name: [result[1] / 1e6 for result in results] for name, results in measured.items()}
    case, theirs = "GPT-2, 4 experts, bf16", f"mergekit {MERGEKIT}"
    speedup = paired_ratio(seconds["mergekit"], seconds["ours"])
    share = statistics.median(memory["ours"]) / statistics.median(memory["mergekit"])
    return [
        Row(case, "paretofuse merge", "time", "s", seconds["ours"]),
        Row(case, theirs, "time", "s", seconds["mergekit"], None, None, "theirs / ours", speedup, ">= 12"),
        Row(case, "paretofuse merge", "peak memory", "MB", memory["ours"], None, None, "ours / theirs", share,
            "<= 0.25"),
        Row(case, theirs, "peak memory", "MB", memory["mergekit"]),
        Row(f"{case}: making the store, once", "paretofuse stack", "time", "s", [stacking[0]]),
        Row(f"{case}: making the store, once", "paretofuse stack", "peak memory", "MB", [stacking[1] / 1e6]),
    ]  # fmt: skip
