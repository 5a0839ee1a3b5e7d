"""`paretofuse evaluate`: the metrics of one merged model."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

from paretofuse.cli.evaluating import add_evaluation, find_evaluation
from paretofuse.cli.options import add_output, add_preference
from paretofuse.cli.running import Result, load_engine

SUMMARY = "evaluate the merged model of one preference"
EXAMPLE = "paretofuse evaluate gpt2.store --preference cola=0.7,sst2=0.3 --evaluate tasks.glue:accuracies"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The words of this command."""
    add_evaluation(parser)
    add_preference(
        parser, "the objectives' shares, which sum to 1; those of 0 may be left out", required=True
    )
    add_output(parser, "JSON", "file to write the metrics to as well", required=False)


def run(options: argparse.Namespace) -> Result:
    """Merge, evaluate, and tell the metrics."""
    from paretofuse.engine.evaluation.sweep import evaluate_at, shown
    from paretofuse.engine.store.atomic import write_file
    from paretofuse.outputs import prepare_file

    found = find_evaluation(options)
    if options.output:
        _check_ours(options.output)
        prepare_file(options.output)
    engine = load_engine(options)
    evaluate, _ = found(engine)
    started = time.perf_counter()
    module = engine.merge(options.preference, head=options.head)
    shares = [options.preference.get(name, 0.0) for name in engine.objectives]
    at = f"preference {shown(engine.objectives, shares)}"
    metrics, _ = evaluate_at(module, evaluate, engine.objectives, at, None)
    document = {
        "preference": options.preference,
        "head": options.head,
        "metrics": metrics,
        "seconds": time.perf_counter() - started,
    }
    if options.output:
        write_file(options.output, (json.dumps(document, indent=1) + "\n").encode())
    return "\n".join(f"{name} {value:.6g}" for name, value in metrics.items()), document, 0


def _check_ours(path: str) -> None:
    """ValueError where a file is there that this command did not write."""
    if not os.path.isfile(path):
        return
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict) or "metrics" not in found:
        raise ValueError(
            f"got out={path!r}, which is there already and holds no metrics; give another name, or move the file away"
        )
