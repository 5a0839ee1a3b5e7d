"""`paretofuse search`: a front from few evaluations."""

from __future__ import annotations

import argparse
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import paretofuse
from paretofuse.cli.evaluating import add_evaluation, find_evaluation
from paretofuse.cli.front_files import add_front, prepare_front_files, write_front
from paretofuse.cli.options import count, named_numbers
from paretofuse.cli.running import Result, load_engine, shows_progress

if TYPE_CHECKING:
    from paretofuse.fronts.coefficients import CoefficientFront

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
        "--coefficients", type=interval, metavar="LOW:HIGH",
        help="search coefficients between these in the place of preferences, such as 0:1",
    )  # fmt: skip
    parser.add_argument(
        "--parts", type=count, metavar="N",
        help="with --coefficients: cut the model into so many parts with coefficients of their own (default: 1)",
    )  # fmt: skip
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


def interval(text: str) -> tuple[float, float]:
    """LOW:HIGH."""
    low, _, high = text.partition(":")
    try:
        return float(low), float(high)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected LOW:HIGH, two numbers such as 0:1"
        ) from None


def run(options: argparse.Namespace) -> Result:
    """Search; what was found is the table."""
    prepare_front_files(options)
    if options.coefficients is None and options.parts is not None:
        raise ValueError("got --parts without --coefficients LOW:HIGH, which it is for")
    if options.coefficients is not None and (options.plot or options.html):
        raise ValueError(
            "got --plot or --html with --coefficients; both show fronts of preferences, leave them out"
        )
    found = find_evaluation(options, minimize=options.minimize)
    _silence_optuna()
    engine = load_engine(options)
    evaluate, maximize = found(engine)
    shared: dict[str, Any] = {
        "maximize": maximize,
        "at_most": options.at_most,
        "at_least": options.at_least,
        "ref": options.reference,
        "sampler": options.sampler,
        "seed": options.seed,
        "storage": options.storage,
        "name": options.name,
        "out": options.output,
        "progress": shows_progress(options),
    }
    if options.coefficients is None:
        return write_front(options, paretofuse.search(engine, evaluate, options.budget, **shared))
    low, high = options.coefficients
    front = paretofuse.search_coefficients(
        engine, evaluate, options.budget, low=low, high=high, parts=options.parts or 1, **shared
    )
    return _told(options, front)


def _silence_optuna() -> None:
    """Its own lines for each trial would break the bar, and of an evaluation that fails it would print a traceback."""
    with suppress(ImportError):  # which the search tells
        import optuna

        optuna.logging.set_verbosity(optuna.logging.CRITICAL)


def _told(options: argparse.Namespace, front: CoefficientFront) -> Result:
    """What `write_front` tells, of coefficients, whose table is there already."""
    kept = front.non_dominated()
    document: dict[str, Any] = {
        "names": list(front.names),
        "metrics": list(front.metrics),
        "coefficients": front.coefficients.tolist(),
        "values": front.values.tolist(),
        "non_dominated": kept.tolist(),
        "csv": options.output,
    }
    lines = [f"{options.output}: {len(front)} sets of coefficients, {int(kept.sum())} not dominated"]
    if options.reference is not None:
        document["hypervolume"] = front.hypervolume(options.reference)
        lines.append(f"hypervolume {document['hypervolume']:.6g}")
    return "\n".join(lines), document, 0
