"""`paretofuse search`: a front from few evaluations."""

from __future__ import annotations

import argparse
import logging
from typing import Any

import paretofuse
from paretofuse.cli.options import add_evaluation, add_output, count, named_numbers
from paretofuse.cli.running import Result, entry_point, in_options, load_engine, shows_progress

SUMMARY = "evaluate merged models at the preferences that promise most"
EXAMPLE = "paretofuse search gpt2.store --evaluate tasks.glue:accuracies --budget 24 -o front.csv"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The words of this command."""
    add_evaluation(parser, required=True)
    parser.add_argument(
        "--budget", type=count, required=True, metavar="N", help="evaluations in all, earlier ones included"
    )
    add_output(parser, "CSV", "table to write")
    parser.add_argument("--minimize", action="store_true", help="smaller numbers are better, as with losses")
    parser.add_argument(
        "--at-most", type=named_numbers, metavar="NAME=VALUE,...", help="upper bounds of metrics"
    )
    parser.add_argument(
        "--at-least", type=named_numbers, metavar="NAME=VALUE,...", help="lower bounds of metrics"
    )
    parser.add_argument(
        "--reference", type=named_numbers, metavar="NAME=VALUE,...",
        help="reference point of the hypervolume that shall grow, which is then printed",
    )  # fmt: skip
    parser.add_argument(
        "--sampler", default="growth", metavar="NAME",
        help="growth, or one of Optuna's: tpe, nsga2, gp, random (default: growth)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of everything random (default: 0)")
    parser.add_argument(
        "--storage", metavar="URL",
        help="a database such as sqlite:///search.db, where the search goes on, and several processes work on it",
    )  # fmt: skip
    parser.add_argument("--name", default="paretofuse", help="the study's name there (default: paretofuse)")


def run(options: argparse.Namespace) -> Result:
    """Search; what was found is the table."""
    evaluate = entry_point("--evaluate", options.evaluate)
    logging.getLogger("optuna").setLevel(logging.WARNING)  # its own lines for each trial would break the bar
    engine = load_engine(options)
    front = paretofuse.search(
        engine,
        evaluate,
        options.budget,
        maximize=not options.minimize,
        at_most=options.at_most,
        at_least=options.at_least,
        ref=options.reference,
        sampler=options.sampler,
        seed=options.seed,
        storage=options.storage,
        name=options.name,
        out=options.output,
        progress=shows_progress(options),
    )
    notes = [in_options(note, vars(options)) for note in front.notes]
    document: dict[str, Any] = {
        "objectives": list(front.objectives),
        "metrics": list(front.metrics),
        "preferences": front.preferences.tolist(),
        "values": front.values.tolist(),
        "non_dominated": front.non_dominated().tolist(),
        "notes": notes,
        "csv": options.output,
    }
    lines = [f"note: {note}" for note in notes]
    lines.append(
        f"{options.output}: {len(front)} preferences, {int(front.non_dominated().sum())} not dominated"
    )
    if options.reference is not None:
        document["hypervolume"] = front.hypervolume(options.reference)
        lines.append(f"hypervolume {document['hypervolume']:.6g}")
    return "\n".join(lines), document, 0
