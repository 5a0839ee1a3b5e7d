"""What does a sweep cost beyond its evaluations? 64 preferences of a GPT-2-sized model, 100 ms for each evaluation.

GPT-2 (124 million parameters, weights drawn at random from a seed) and four experts, all bfloat16, opened from a store.
An evaluation reads a few of the merged numbers and then waits until 100 ms are over, as for a device or a server that
does the work: the cores are free to merge meanwhile, which those of an evaluation that computes are not. The workers'
pool is made once and has opened the store; what making it costs is a row of its own. The PyTorch loop is what one would
write by hand, over the tensors that the engine merges, rounded at each expert.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import paretofuse as pf
from benchmarks.harness.record import Options, Row, check, interleave, paired_ratio
from benchmarks.speed.disk_merge import SHARES, write_models

ALONE = "evaluations alone"
AHEAD = 1
"""Two modules take turns: of more, the first bank alone takes longer to make than all evaluations could hide."""
CHUNK = 16
"""Points that a worker is sent at a time, so that it merges some while it evaluates others."""

READ = {"first": "transformer.h.0.mlp.c_fc.weight", "second": "transformer.h.1.attn.c_proj.weight"}
"""The metrics, and the tensor of which each is the mean."""

Values = list[list[float]]
"""Metrics for each preference."""


def run(options: Options) -> list[Row]:
    """Measure a sweep by each of its ways, beside the evaluations alone and a loop in PyTorch."""
    torch.set_num_threads(options.threads)
    count, seconds = (5, 0.01) if options.quick else (64, 0.1)
    preferences = np.random.default_rng(0).dirichlet(np.ones(len(SHARES)), count)
    with tempfile.TemporaryDirectory(prefix="paretofuse-") as name:
        folder = Path(name)
        write_models(folder, options.quick)
        pf.stack(folder / "base", {expert: folder / expert for expert in SHARES}).save(folder / "store")
        engine = pf.load(folder / "store")
        states = [load_file(folder / model / "model.safetensors") for model in ("base", *SHARES)]
        chunked = f"pf.sweep, 2 workers, chunksize={CHUNK}"
        with _pool(options.threads) as pool:
            ways: dict[str, Callable[[pf.Engine, float], Values]] = {
                "pf.sweep": lambda e, s: _sweep(e, s, preferences),
                f"pf.sweep, ahead={AHEAD}": lambda e, s: _sweep(e, s, preferences, ahead=AHEAD),
                "pf.sweep, 2 workers": lambda e, s: _sweep(e, s, preferences, executor=pool),
                chunked: lambda e, s: _sweep(e, s, preferences, executor=pool, chunksize=CHUNK),
                "PyTorch loop": lambda e, s: _by_hand(e, s, preferences, states),
            }
            start = time.perf_counter()
            ways["pf.sweep, 2 workers"](engine, 0.0)
            opening = time.perf_counter() - start
            for contender, way in ways.items():
                _check_values(contender, way(engine, 0.0), preferences, states)
            measured = interleave(
                {
                    ALONE: lambda: [evaluate(engine.module, seconds) for _ in preferences],
                    **{contender: partial(way, engine, seconds) for contender, way in ways.items()},
                },
                options.repeat(3),
            )
    targets = {f"pf.sweep, ahead={AHEAD}": "<= 1.1", chunked: "<= 0.6"}
    case = f"{count} preferences, {1e3 * seconds:g} ms for each evaluation"
    rows = [
        Row(case, contender, "time", "s", values, comparison="" if contender == ALONE else f"this / {ALONE}",
            ratio=None if contender == ALONE else paired_ratio(values, measured[ALONE]),
            target=targets.get(contender, ""))
        for contender, values in measured.items()
    ]  # fmt: skip
    return [
        *rows,
        Row("making the pool, a sweep without waiting included", "2 workers", "time", "s", [opening]),
    ]


def evaluate(module: nn.Module, seconds: float) -> dict[str, float]:
    """The means of two tensors, `seconds` after the call."""
    end = time.perf_counter() + seconds
    metrics = {name: float(module.get_parameter(tensor).double().mean()) for name, tensor in READ.items()}
    time.sleep(max(0.0, end - time.perf_counter()))
    return metrics


def _pool(threads: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(
        2,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(max(1, threads // 2),),
    )


def _sweep(
    engine: pf.Engine,
    seconds: float,
    preferences: np.ndarray,
    ahead: int | None = None,
    executor: ProcessPoolExecutor | None = None,
    chunksize: int = 1,
) -> Values:
    front = pf.sweep(
        engine, partial(evaluate, seconds=seconds), preferences, ahead=ahead, executor=executor, chunksize=chunksize,
        progress=False,
    )  # fmt: skip
    return front.values.tolist()  # type: ignore[no-any-return]


def _by_hand(
    engine: pf.Engine, seconds: float, preferences: np.ndarray, states: list[dict[str, Tensor]]
) -> Values:
    base, *experts = states
    merged = {name: engine.module.get_parameter(name) for name in engine.tensor_groups}
    values = []
    for preference in preferences.tolist():
        with torch.no_grad():
            for name, parameter in merged.items():
                parameter.copy_(base[name])
                for share, expert in zip(preference, experts, strict=True):
                    parameter.add_(expert[name] - base[name], alpha=share)
            values.append(list(evaluate(engine.module, seconds).values()))
    return values


def _check_values(
    contender: str, values: Values, preferences: np.ndarray, states: list[dict[str, Tensor]]
) -> None:
    """Each mean is that of the float64 truth, as far as bfloat16 tells.

    Raises:
        BenchmarkError: it is not.
    """
    means = torch.tensor(
        [[state[name].double().mean() for name in READ.values()] for state in states], dtype=torch.float64
    )
    truth = means[0] + torch.from_numpy(preferences) @ (means[1:] - means[0])  # [P, 2]
    spread = (means[1:] - means[0]).abs().max().item()
    error = (torch.tensor(values, dtype=torch.float64) - truth).abs().max().item()
    check(error <= 0.1 * spread, f"{contender}: a mean is off by {error:.3g}, experts differ by {spread:.3g}")
