"""`paretofuse merge`: one preference of a store becomes a model directory. Never imports torch."""

from __future__ import annotations

import argparse
import time
from typing import Any

from paretofuse.cli.options import add_output, add_preference, add_store, add_threads, add_verify
from paretofuse.cli.running import Result, bytes_bar, size

SUMMARY = "merge a store into a dense model for one preference"
EXAMPLE = "paretofuse merge gpt2.store --preference cola=0.7,sst2=0.3 -o merged"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The words of this command."""
    add_store(parser)
    add_verify(parser)
    add_preference(
        parser, "the objectives' shares, which sum to 1; those of 0 may be left out", required=True
    )
    add_output(
        parser, "OUT", "model directory to write, or a name ending in .safetensors for the weights alone"
    )
    parser.add_argument(
        "--isa", metavar="NAME", help="force an instruction set; `paretofuse doctor` lists them"
    )
    parser.add_argument(
        "--push-to-hub",
        metavar="ORG/NAME",
        help="upload OUT to this repository of the Hugging Face Hub as well",
    )
    parser.add_argument("--private", action="store_true", help="make that repository private, if it is new")
    add_threads(parser)


def run(options: argparse.Namespace) -> Result:
    """Merge from disk to disk."""
    from paretofuse.engine.merging.disk import merge_store

    if options.push_to_hub and options.output.endswith(".safetensors"):
        raise ValueError(f"got --push-to-hub with the file {options.output}, expected a directory to write")
    if options.private and not options.push_to_hub:
        raise ValueError("got --private without --push-to-hub ORG/NAME, which it is for")
    started = time.perf_counter()
    with bytes_bar(options, "merge") as progress:
        merged = merge_store(
            options.store,
            options.preference,
            options.output,
            head=options.head,
            threads=options.threads,
            isa=options.isa,
            verify=options.verify,
            progress=progress,
        )
    seconds = time.perf_counter() - started
    document: dict[str, Any] = {
        "path": str(merged.path),
        "preference": options.preference,
        "head": options.head,
        "tensors": merged.tensors,
        "bytes": merged.nbytes,
        "isa": merged.isa,
        "seconds": seconds,
    }
    text = f"{merged.path}: {merged.tensors} tensors, {size(merged.nbytes)}, {seconds:.2f} s ({merged.isa})"
    if options.push_to_hub:
        from paretofuse.engine.merging.publish import push

        document["url"] = push(merged.path, options.push_to_hub, private=options.private or None)
        text += f"\n{document['url']}"
    return text, document, 0
