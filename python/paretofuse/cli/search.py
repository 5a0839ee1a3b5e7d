"""`paretofuse search`: a front from few evaluations."""

from __future__ import annotations

import argparse
import logging

import paretofuse
from paretofuse.cli.evaluating import add_evaluation, find_evaluation
from paretofuse.cli.front_files import add_front, prepare_front_files, write_front
from paretofuse.cli.options import count, named_numbers
from paretofuse.cli.running import Result, load_engine, shows_progress

SUMMARY = "evaluate merged models at the preferences that promise most"
EXAMPLE = "paretofuse search gpt2.store --evaluate tasks.glue:accuracies --budget 24 -o front.csv"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The words of this command."""
    add_evaluation(parser)
    parser.add_argument(
        "--budget", type=count, required=True, metavar="N", help="evaluations in all, earlier ones included"
    )
    add_front(parser, "reference point of the hypervolume that shall grow, which is then printed")
    parser.add_argument(
        "--at-most", type=named_numbers, metavar="NAME=VALUE,...", help="upper bounds of metrics"
    )
    parser.add_argument(
        "--at-least", type=named_numbers, metavar="NAME=VALUE,...", help="lower bounds of metrics"
    )
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
    prepare_front_files(options)
    found = find_evaluation(options, minimize=options.minimize)
    logging.getLogger("optuna").setLevel(logging.WARNING)  # its own lines for each trial would break the bar
    engine = load_engine(options)
    evaluate, maximize = found(engine)
    front = paretofuse.search(
        engine,
        evaluate,
        options.budget,
        maximize=maximize,
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
    return write_front(options, front)
