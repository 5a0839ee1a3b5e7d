"""The experiments with their baselines: tables, fronts and pictures.

    python -m benchmarks.experiments vision             MNIST / Fashion-MNIST; one seed unless told, as all here
    python -m benchmarks.experiments vision3            the same with a third task
    python -m benchmarks.experiments openclip           a small CLIP, end to end
    python -m benchmarks.experiments vision --quick     tiny, to see that it works; the numbers mean nothing
    python -m benchmarks.experiments text               MiniLM on three text tasks
    python -m benchmarks.experiments language           a small GPT-2 and three styles of English
    python -m benchmarks.experiments restoration        Real-CUGAN's published models, pictures enlarged and mended
    python -m benchmarks.experiments ablation vision --tune --seeds 100 101 102
                                                        what helps the front, one setting at a time
    python -m benchmarks.experiments formats            what planes of fewer bytes cost in accuracy
    python -m benchmarks.experiments report             docs/experiments.md and its pictures, from the CSV files alone

Models and results are kept in benchmarks/cache/experiments; a run that was stopped goes on where it was. Results go
to benchmarks/data/experiment_NAME.csv (measures), experiment_NAME_points.csv (every model's metrics) and
ablation_NAME.csv; what is committed there is of --seeds 0 1 2, and a run of fewer replaces it unless --out is given.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path

import torch

from benchmarks.experiments import ablation, formats, tables
from benchmarks.experiments.run import Load, Plan, run
from benchmarks.harness import record

EXPERIMENTS = {
    "vision": "benchmarks.experiments.vision:two",
    "vision3": "benchmarks.experiments.vision:three",
    "text": "benchmarks.experiments.text:make",
    "language": "benchmarks.experiments.language:make",
    "openclip": "benchmarks.experiments.openclip:load",
    "restoration": "benchmarks.experiments.restoration:load",
}
"""Each experiment's maker, MODULE:FUNCTION, a function from `quick` to an Experiment."""


def loader(name: str, tuning: bool = False) -> Load:
    """The maker of an experiment; `tuning`: of the one that chooses settings and has no part in the test data."""
    module, function = EXPERIMENTS[name].split(":")
    found: Load = getattr(import_module(module), function)
    return partial(found, tuning=True) if tuning else found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.experiments",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "command", choices=[*EXPERIMENTS, "ablation", "formats", "report"], metavar="NAME", help="%(choices)s"
    )
    parser.add_argument("of", nargs="?", choices=list(EXPERIMENTS), help="whose ablation (default: vision)")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="default: 0 alone; the record is of 0 1 2"
    )
    parser.add_argument(
        "--jobs", type=int, default=min(2, record.available_cores()), help="processes at a time"
    )
    parser.add_argument("--threads", type=int, default=1, help="of each process (default: 1)")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="CONTENDER", help="run these alone, write no CSV"
    )
    parser.add_argument(
        "--finished", action="store_true", help="run nothing; tables of the results that are there"
    )
    parser.add_argument(
        "--tune",
        action="store_true",
        help="of an ablation: test on a part of the training data that nothing learns from, as settings are chosen",
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, only to see that all works")
    parser.add_argument("--cache", type=Path, default=record.CACHE / "experiments")
    parser.add_argument("--out", type=Path, help="folder of the CSV files (with --quick: in the cache)")
    chosen = parser.parse_args(arguments)
    if chosen.of and chosen.command != "ablation":
        parser.error(f"got {chosen.of!r} after {chosen.command!r}, expected it only after 'ablation'")
    if chosen.tune and (chosen.command != "ablation" or chosen.of == "restoration"):
        parser.error(
            f"got --tune with {chosen.of or chosen.command}, expected 'ablation' of another experiment"
        )
    if chosen.jobs < 1 or chosen.threads < 1:
        parser.error("expected --jobs and --threads of at least 1")
    return chosen


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code."""
    chosen = parse(arguments)
    cache = chosen.cache / "quick" if chosen.quick else chosen.cache
    out = chosen.out or (cache if chosen.quick else record.DATA)
    if chosen.command == "report":
        from benchmarks.experiments import report

        print(f"wrote {report.write(out, record.ROOT / 'docs')}")
        return 0
    if chosen.command == "formats":
        loads = {
            name: loader(name) for name in (formats.EXPERIMENTS[:1] if chosen.quick else formats.EXPERIMENTS)
        }
        picture = (out if chosen.quick else record.ROOT / "docs") / "plane-formats.png"
        about = record.context(record.Options(chosen.quick, chosen.threads))
        torch.set_num_threads(chosen.threads)
        print(formats.table(formats.run(loads, chosen.seeds, cache, out, picture, about, chosen.quick)))
        return 0
    name = (chosen.of or "vision") if chosen.command == "ablation" else chosen.command
    load = loader(name, chosen.tune)
    plan = Plan(chosen.seeds, chosen.jobs, chosen.threads, chosen.quick, cache, chosen.only, chosen.finished)
    if chosen.quick:
        print("QUICK RUN: tiny sizes, these numbers mean nothing")
    try:
        if chosen.command == "ablation":
            print(ablation.table(ablation.run(load, plan, out)))
            return 0
        results = run(load, plan)
    except record.BenchmarkError as error:
        print(f"experiment {name} failed: {error}", file=sys.stderr)
        return 1
    experiment = load(chosen.quick)
    rows = tables.measure(experiment, results)
    print(tables.markdown(rows))
    if not chosen.only or chosen.out:
        tables.write(experiment, results, rows, out)
        print(f"wrote {out / f'experiment_{name}'}*.csv")
    return 0


if __name__ == "__main__":
    sys.exit(main())
