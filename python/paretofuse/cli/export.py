"""`paretofuse export`: the dense model compiled for programs without Python."""

from __future__ import annotations

import argparse
import time

import paretofuse
from paretofuse.cli.options import add_engine, add_entry, add_output, add_preference
from paretofuse.cli.running import Result, entry_point, load_engine, size

SUMMARY = "compile the dense model for programs without Python (an AOTInductor package)"
EXAMPLE = "paretofuse export vit.store --module models:make_vit --inputs models:example -o vit.pt2"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The words of this command."""
    add_engine(parser, "the kind of device to compile for")
    add_output(parser, "PT2", "package to write, *.pt2")
    add_entry(
        parser,
        "--inputs",
        "returns example inputs, a tuple or a dict by name (default: tokens, for Hugging Face models)",
    )
    parser.add_argument(
        "--dynamic", type=_axes, metavar="AXIS,...",
        help="axes of every input that may vary (default: 0, or 0,1 without --inputs)",
    )  # fmt: skip
    add_preference(parser, "weights that the package holds until others are put in (default: equal shares)")


def run(options: argparse.Namespace) -> Result:
    """Load, merge and compile."""
    inputs = entry_point("--inputs", options.inputs)() if options.inputs else None
    engine = load_engine(options)
    started = time.perf_counter()
    path = paretofuse.export(
        engine,
        options.output,
        inputs,
        dynamic=options.dynamic,
        preference=options.preference,
        head=options.head,
    )
    seconds, nbytes = time.perf_counter() - started, path.stat().st_size
    document = {"path": str(path), "bytes": nbytes, "preference": options.preference, "seconds": seconds}
    return f"{path}: {size(nbytes)}, {seconds:.1f} s", document, 0


def _axes(text: str) -> tuple[int, ...]:
    axes = [part.strip() for part in text.split(",")] if text else []
    if not all(part.isdecimal() for part in axes):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected axes such as 0 or 0,1 (or '' for none)")
    return tuple(map(int, axes))
