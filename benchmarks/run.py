"""Runs the benchmarks and appends their rows to benchmarks/data/NAME.csv.

    python -m benchmarks.run                      all of them, each in a process of its own
    python -m benchmarks.run merge_speed startup  some of them
    python -m benchmarks.run --quick              tiny sizes, to see that they work; the numbers mean nothing

Each benchmark first checks that all contenders give the right result, and stops if one does not.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from benchmarks.harness import record

NAMES = (
    "merge_speed",
    "train_step",
    "solver_step",
    "memory",
    "training_memory",
    "disk_merge",
    "startup",
    "serving",
    "cpp_replicas",
    "plane_merge",
    "recipes",
    "sweep",
    "search",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(NAMES)}; all by default")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, only to see that all works")
    parser.add_argument("--threads", type=int, default=record.Options().threads, help="default %(default)s")
    parser.add_argument("--rounds", type=int, help="how often each contender has its turn")
    parser.add_argument("--out", type=Path, help="folder of the CSV files (with --quick: a cache)")
    options = parser.parse_args(arguments)
    names = options.names or list(NAMES)
    for name in names:
        if name not in NAMES:
            parser.error(f"got {name!r}, expected one of {', '.join(NAMES)}")
    if options.threads < 1 or (options.rounds is not None and options.rounds < 1):
        parser.error("expected --threads and --rounds of at least 1")
    if len(names) > 1:
        return _each_in_its_own_process(names, sys.argv[1:] if arguments is None else arguments)
    out = options.out or (record.CACHE / "quick" if options.quick else record.DATA)
    chosen = record.Options(options.quick, options.threads, options.rounds)
    about = record.context(chosen)
    print(f"== {names[0]} on {about.cpu}, {about.threads} threads, {about.isa}, commit {about.commit}")
    if options.quick:
        print("QUICK RUN: tiny sizes, these numbers mean nothing")
    try:
        rows = import_module(f"benchmarks.speed.{names[0]}").run(chosen)
    except record.BenchmarkError as error:
        print(f"benchmark {names[0]} failed: {error}", file=sys.stderr)
        return 3 if isinstance(error, record.MissingContender) else 1
    print(record.table(rows))
    print(f"appended {len(rows)} rows to {record.write(names[0], rows, about, out)}")
    return 0


def _each_in_its_own_process(names: Sequence[str], arguments: Sequence[str]) -> int:
    """So that one benchmark's memory is none of another's."""
    others = [word for word in arguments if word not in NAMES]
    codes = [
        subprocess.run([sys.executable, "-m", "benchmarks.run", name, *others], cwd=record.ROOT).returncode
        for name in names
    ]
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
