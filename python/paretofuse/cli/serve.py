"""`paretofuse serve`: a store becomes an HTTP server."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from paretofuse.cli.options import Named, add_engine, add_entry, count, named_numbers
from paretofuse.cli.running import Result, entry_point, load_engine

SUMMARY = "serve a store over HTTP, at a preference for each request"
EXAMPLE = "paretofuse serve gpt2.store --front front.csv --replicas 4"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The words of this command."""
    add_engine(parser, "where to merge and compute")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine only)"
    )
    parser.add_argument("--port", type=_port, default=8000, help="port; 0 takes a free one (default: 8000)")
    parser.add_argument(
        "--model-name", default="paretofuse", metavar="NAME", help="what clients call the model"
    )
    parser.add_argument(
        "--front", metavar="CSV", help="what was measured at which preference, from `paretofuse sweep`"
    )
    parser.add_argument(
        "--base", type=named_numbers, metavar="NAME=VALUE,...",
        help="the base model's metrics, shown beside the front",
    )  # fmt: skip
    parser.add_argument(
        "--point", type=_point, action=Named, metavar="LABEL:NAME=VALUE,...",
        help="likewise those of another single model, such as a plain average; once for each",
    )  # fmt: skip
    parser.add_argument(
        "--replicas", type=count, default=2, metavar="N",
        help="merged models that are kept, each as large as the model (default: 2)",
    )  # fmt: skip
    parser.add_argument(
        "--grid", type=count, metavar="N",
        help="move preferences to multiples of 1/N, so that nearby ones share a replica (default: as they are)",
    )  # fmt: skip
    add_entry(
        parser,
        "--predict",
        "answers for models of any kind: called with the merged module and the request's input, returns JSON",
    )
    parser.add_argument(
        "--max-batch", type=count, default=16, metavar="N",
        help="prompts or inputs computed together, at most (default: 16)",
    )  # fmt: skip
    parser.add_argument(
        "--max-wait-ms", type=float, default=0.0, metavar="MS",
        help="how long the first of a batch waits for others (default: 0, it takes what is there)",
    )  # fmt: skip
    parser.add_argument(
        "--queue", type=count, default=256, metavar="N",
        help="prompts or inputs that may wait; more are refused with 429 (default: 256)",
    )  # fmt: skip
    parser.add_argument(
        "--timeout", type=float, default=300.0, metavar="SECONDS",
        help="what a request may take in all (default: 300)",
    )  # fmt: skip
    parser.add_argument(
        "--api-key-file", metavar="FILE",
        help="keys, one a line, of which every request must bring one (default: everybody may ask)",
    )  # fmt: skip


def run(options: argparse.Namespace) -> Result:
    """Serve until told to stop."""
    from paretofuse.serving import Limits, create_app

    limits = Limits(
        max_batch=options.max_batch,
        max_wait_ms=options.max_wait_ms,
        queue=options.queue,
        timeout=options.timeout,
    )
    keys = _keys(options.api_key_file) if options.api_key_file else []
    front = None
    if options.front:
        from paretofuse.fronts.front import Front

        front = Front.from_csv(options.front)
    predict = entry_point("--predict", options.predict) if options.predict else None
    app = create_app(
        load_engine(options, replicas=options.replicas),
        model_name=options.model_name,
        front=front,
        base=options.base,
        points=dict(options.point or ()),
        predict=predict,
        grid=options.grid,
        limits=limits,
        api_keys=keys,
        hosts={"localhost", "127.0.0.1", "[::1]"}
        if options.host in ("127.0.0.1", "::1", "localhost")
        else None,
    )
    from paretofuse.serving.server import serve

    serve(
        app,
        options.host,
        options.port,
        started=lambda url: print(f"{options.store}: served at {url}", file=sys.stderr, flush=True),
        store=Path(options.store),
        load=lambda: load_engine(options, replicas=options.replicas),
    )
    return f"{options.store}: no longer served", {"store": options.store}, 0


def _port(text: str) -> int:
    """A port's number, or 0."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a port, 1 to 65535, or 0 for a free one")
    return int(text)


def _point(text: str) -> tuple[str, dict[str, float]]:
    """LABEL:NAME=NUMBER,NAME=NUMBER."""
    label, colon, numbers = text.partition(":")
    if not colon or not label.strip():
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected LABEL:NAME=NUMBER,... such as average:news=31,poems=44"
        )
    return label.strip(), named_numbers(numbers)


def _keys(path: str) -> list[str]:
    """The lines of a file that are not empty.

    Raises:
        ValueError: there are none.
        OSError: it cannot be read.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"got {path}, which is no text in UTF-8, expected one key on each line") from None
    keys = [line.strip() for line in lines if line.strip()]
    if not keys:
        raise ValueError(
            f"got {path} without a key, expected one on each line; leave --api-key-file out to let all in"
        )
    return keys
