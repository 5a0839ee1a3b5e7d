"""`paretofuse adapter`: one preference of a store becomes a LoRA adapter."""

from __future__ import annotations

import argparse
import time

from paretofuse.cli.options import add_engine, add_output, count, named_numbers
from paretofuse.cli.running import Result, load_engine

SUMMARY = "write one preference of a store of LoRA experts as a LoRA adapter"
EXAMPLE = "paretofuse adapter llama.store --preference news=0.7,poems=0.3 -o adapter"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The words of this command."""
    add_engine(parser, None)
    parser.add_argument(
        "--preference", type=named_numbers, required=True, metavar="NAME=SHARE,...",
        help="the objectives' shares, which sum to 1; those of 0 may be left out",
    )  # fmt: skip
    add_output(parser, "DIR", "adapter directory to write")
    parser.add_argument(
        "--rank", type=count, metavar="RANK", help="cut each module to this rank by SVD (default: exact)"
    )


def run(options: argparse.Namespace) -> Result:
    """Open the store and write the adapter."""
    started = time.perf_counter()
    engine = load_engine(options)
    error = engine.export_adapter(options.preference, options.output, rank=options.rank)
    seconds = time.perf_counter() - started
    document = {
        "path": options.output,
        "preference": options.preference,
        "rank": options.rank,
        "error": error,
    }
    text = f"{options.output}: error of the update {error:.3g}, {seconds:.2f} s"
    return text, {**document, "seconds": seconds}, 0
