"""`paretofuse serve`: a store becomes an HTTP server."""

from __future__ import annotations

import argparse
import sys

from paretofuse.cli.options import add_engine, add_entry, count
from paretofuse.cli.running import Result, entry_point, load_engine

SUMMARY = "serve a store over HTTP, at a preference for each request"
EXAMPLE = "paretofuse serve gpt2.store --front front.csv --replicas 4"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The words of this command."""
    add_engine(parser, "where to merge and compute")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine only)"
    )
    parser.add_argument("--port", type=int, default=8000, help="port; 0 takes a free one (default: 8000)")
    parser.add_argument(
        "--model-name", default="paretofuse", metavar="NAME", help="what clients call the model"
    )
    parser.add_argument(
        "--front", metavar="CSV", help="what was measured at which preference, from `paretofuse sweep`"
    )
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


def run(options: argparse.Namespace) -> Result:
    """Serve until told to stop."""
    from paretofuse.fronts.front import Front
    from paretofuse.serving import create_app

    front = Front.from_csv(options.front) if options.front else None
    predict = entry_point("--predict", options.predict) if options.predict else None
    engine = load_engine(options, replicas=options.replicas)
    app = create_app(engine, model_name=options.model_name, front=front, predict=predict, grid=options.grid)
    from paretofuse.serving.server import serve

    serve(
        app,
        options.host,
        options.port,
        lambda url: print(f"serving {options.store} at {url}", file=sys.stderr),
    )
    return "", {"store": options.store}, 0
