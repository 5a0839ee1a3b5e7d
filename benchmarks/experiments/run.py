"""Runs an experiment: every contender of every seed in a process of its own, each result kept as a file at once.

A run that was stopped goes on with what is missing. Processes are forked from a clean server that has torch imported
and nothing else, so that a contender's memory is its own and starting one costs little.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from benchmarks.experiments.contenders import Contender, contenders
from benchmarks.experiments.experiment import Context, Experiment, Meter, Models, cache_of
from benchmarks.harness.record import BenchmarkError
from benchmarks.harness.record import Options as RecordOptions
from benchmarks.harness.record import context as machine

Load = Callable[[bool], Experiment]
"""Makes an experiment; True: a tiny one, to see that it works. A top-level function: other processes call it too."""


@dataclass(frozen=True)
class Plan:
    """How to run.

    Attributes:
        seeds: each with a base and experts of its own.
        jobs: processes at a time.
        threads: of each process.
        quick: a tiny run whose numbers mean nothing.
        cache: where models and results are kept.
        only: names of the contenders to run; all if empty.
        finished: run nothing and give the results that are there.
    """

    seeds: Sequence[int]
    jobs: int
    threads: int
    quick: bool
    cache: Path
    only: Sequence[str] = ()
    finished: bool = False


@dataclass(frozen=True)
class Result:
    """One contender of one seed, as it is kept in its file; see Outcome and Meter."""

    contender: str
    seed: int
    kind: str
    preferences: list[list[float]]
    values: list[list[float]]
    steps: int | None
    parameters: int | None
    note: str
    wall_s: float | None
    cpu_s: float | None
    peak_mb: float | None
    settings: dict[str, Any]
    machine: dict[str, Any]


def run(load: Load, plan: Plan, say: Callable[[str], None] = print) -> list[Result]:
    """Train what is missing, measure what is missing, and return all results in the contenders' order.

    Raises:
        BenchmarkError: a process failed (its own output says why), or a contender is unknown.
    """
    experiment = load(plan.quick)
    chosen = [c for c in contenders(experiment) if not plan.only or c.name in plan.only]
    if plan.only and len(chosen) != len(set(plan.only)):
        raise BenchmarkError(f"got {list(plan.only)}, expected {[c.name for c in contenders(experiment)]}")
    results = run_contenders(experiment, load, chosen, plan, say)
    return results


def run_contenders(
    experiment: Experiment,
    load: Load,
    chosen: Sequence[Contender],
    plan: Plan,
    say: Callable[[str], None] = print,
    find: str = "benchmarks.experiments.contenders:contenders",
) -> list[Result]:
    """The same for given contenders, which a process finds again by calling `find` (MODULE:FUNCTION).

    Raises:
        BenchmarkError: a process failed.
    """
    folder = cache_of(experiment, plan.cache)
    if not plan.finished:
        _run_missing(experiment, folder, load, chosen, plan, say, find)
    found = []
    for contender in chosen:
        for seed in _seeds(contender, plan):
            result = _kept(folder, contender, seed)
            if result is None and not plan.finished:
                raise BenchmarkError(f"{contender.name}, seed {seed}: no result in {folder}")
            found += [] if result is None else [result]
    return found


def _run_missing(
    experiment: Experiment,
    folder: Path,
    load: Load,
    chosen: Sequence[Contender],
    plan: Plan,
    say: Callable[[str], None],
    find: str,
) -> None:
    """Train the models and run the contenders that are not in the folder."""
    start = time.perf_counter()

    def models(names: Sequence[str]) -> None:
        missing = [
            (seed, name)
            for seed in plan.seeds
            for name in names
            if not (place_of(folder, seed) / f"{name}.safetensors").exists()
        ]
        _each(plan, [(_train, (load, plan, seed, name)) for seed, name in missing])
        for seed, name in missing:
            say(f"{time.perf_counter() - start:6.0f} s  trained {experiment.name}, seed {seed}: {name}")

    models(["base"])
    models([f"expert-{name}" for name in experiment.names])
    todo = [
        (contender, seed)
        for contender in sorted(chosen, key=lambda c: -c.cost)
        for seed in _seeds(contender, plan)
        if _kept(folder, contender, seed) is None
    ]

    def done(number: int) -> None:
        contender, seed = todo[number]
        say(f"{time.perf_counter() - start:6.0f} s  {experiment.name}, seed {seed}: {contender.name}")

    _each(plan, [(_contend, (load, plan, seed, contender.name, find)) for contender, seed in todo], done)


def _seeds(contender: Contender, plan: Plan) -> Sequence[int]:
    return plan.seeds if contender.every_seed else [seed for seed in plan.seeds if seed == 0]


def _each(
    plan: Plan,
    work: Sequence[tuple[Callable[..., None], tuple[Any, ...]]],
    done: Callable[[int], None] = lambda number: None,
) -> None:
    """Run each call in a process of its own, `jobs` at a time; after a failure no further one begins.

    All from one thread: starting a process looks after those that ended, and would take the exit code that another
    thread waits for.
    """
    spawner = multiprocessing.get_context("forkserver")
    spawner.set_forkserver_preload(["benchmarks.experiments.contenders"])
    waiting, failed = deque(range(len(work))), list[str]()
    running: dict[Any, tuple[int, Any]] = {}
    while running or (waiting and not failed):
        while waiting and not failed and len(running) < max(1, plan.jobs):
            number = waiting.popleft()
            target, arguments = work[number]
            process = spawner.Process(target=target, args=arguments)
            process.start()
            running[process.sentinel] = number, process
        for sentinel in wait(list(running)):
            number, process = running.pop(sentinel)
            process.join()
            if process.exitcode:
                target, arguments = work[number]
                failed.append(f"{target.__name__.strip('_')} {arguments[2:]}: exit code {process.exitcode}")
            else:
                done(number)
    if failed:
        raise BenchmarkError("; ".join(failed))


def _train(load: Load, plan: Plan, seed: int, name: str) -> None:
    """In a process of its own: train the base or an expert into the cache."""
    torch.set_num_threads(plan.threads)
    experiment = load(plan.quick)
    models = Models(experiment, seed, place_of(cache_of(experiment, plan.cache), seed))
    if name == "base":
        models.base()
    else:
        models.expert(name.removeprefix("expert-"))


def _contend(load: Load, plan: Plan, seed: int, name: str, find: str) -> None:
    """In a process of its own: run one contender and keep its result."""
    import importlib

    torch.set_num_threads(plan.threads)
    experiment = load(plan.quick)
    module, function = find.split(":")
    listed: list[Contender] = getattr(importlib.import_module(module), function)(experiment)
    contender = next(c for c in listed if c.name == name)
    folder = cache_of(experiment, plan.cache)
    models, meter = Models(experiment, seed, place_of(folder, seed)), Meter()
    outcome = contender.run(Context(experiment, models, seed, meter))
    result = Result(
        contender=name,
        seed=seed,
        kind=outcome.kind,
        preferences=outcome.front.preferences.tolist(),
        values=outcome.front.values.tolist(),
        steps=outcome.steps,
        parameters=outcome.parameters,
        note=outcome.note,
        wall_s=meter.wall,
        cpu_s=meter.cpu,
        peak_mb=meter.peak_mb,
        settings=_plain(contender.settings),
        machine=asdict(machine(RecordOptions(plan.quick, plan.threads))),
    )
    path = _file(folder, name, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".partial")
    beside.write_text(json.dumps(asdict(result)), encoding="utf-8")
    beside.replace(path)


def _kept(folder: Path, contender: Contender, seed: int) -> Result | None:
    """A result of an earlier run, unless the contender's settings have changed since."""
    path = _file(folder, contender.name, seed)
    if not path.exists():
        return None
    result = Result(**json.loads(path.read_text(encoding="utf-8")))
    return result if result.settings == _plain(contender.settings) else None


def _plain(settings: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(settings))


def place_of(folder: Path, seed: int) -> Path:
    """Where a seed's models are, in an experiment's folder."""
    return folder / f"seed{seed}"


def _file(folder: Path, name: str, seed: int) -> Path:
    return place_of(folder, seed) / "results" / f"{name}.json"
