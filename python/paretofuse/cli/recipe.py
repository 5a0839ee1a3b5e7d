"""`paretofuse recipe`: a recipe of mergekit's becomes a model directory. Imports no torch, except for tokenizers."""

from __future__ import annotations

import argparse
import time

from paretofuse.cli.options import add_entry, add_output, add_threads
from paretofuse.cli.running import Result, bytes_bar, entry_point, size

SUMMARY = "run a recipe of mergekit's into a dense model"
EXAMPLE = "paretofuse recipe ties.yml -o merged"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The words of this command."""
    parser.add_argument("config", metavar="CONFIG", help="the YAML file")
    add_output(parser, "OUT", "model directory to write")
    parser.add_argument(
        "--seed", type=int, default=0, help="what random methods such as dare start from (default: 0)"
    )
    add_entry(parser, "--method", "a merge method of your own: a subclass of Method, or what makes one")
    add_threads(parser)


def run(options: argparse.Namespace) -> Result:
    """Run the recipe."""
    from paretofuse.recipes.run import run_recipe

    own = [] if options.method is None else [entry_point("--method", options.method)()]
    started = time.perf_counter()
    with bytes_bar(options, "merge") as progress:
        done = run_recipe(
            options.config,
            options.output,
            methods=own,
            seed=options.seed,
            threads=options.threads,
            progress=progress,
        )
    seconds = time.perf_counter() - started
    document = {
        "path": str(done.path),
        "method": done.method,
        "tensors": done.tensors,
        "bytes": done.nbytes,
        "notes": list(done.notes),
        "seconds": seconds,
    }
    text = f"{done.path}: {done.tensors} tensors, {size(done.nbytes)}, {seconds:.2f} s ({done.method})"
    return "\n".join([*(f"note: {note}" for note in done.notes), text]), document, 0
