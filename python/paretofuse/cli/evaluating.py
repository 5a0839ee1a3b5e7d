"""What `evaluate`, `sweep` and `search` measure merged models by: --evaluate, or the tasks of --lm-eval."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import paretofuse
from paretofuse.cli.options import add_engine, add_entry, count
from paretofuse.cli.running import entry_point

if TYPE_CHECKING:
    from paretofuse.engine.engine import Engine
    from paretofuse.fronts.harness import LMEvalMetrics

Evaluation = tuple[Any, Any]
"""An evaluation as `pf.sweep` takes it, and its `maximize`."""


def add_evaluation(parser: argparse.ArgumentParser) -> None:
    """A store whose merged models are evaluated, and by what."""
    add_engine(parser, "where to merge and evaluate")
    add_entry(
        parser,
        "--evaluate",
        "called with the live module in eval mode; returns a dict of numbers by name",
    )
    parser.add_argument(
        "--lm-eval", metavar="TASK,...",
        help="or the metrics of these tasks of lm-evaluation-harness, which know which way is better",
    )  # fmt: skip
    parser.add_argument("--lm-eval-path", metavar="DIR", help="a directory with task files of your own")
    parser.add_argument("--lm-eval-results", metavar="DIR", help="where to write the harness's own JSON")
    parser.add_argument("--limit", type=count, metavar="N", help="documents of each task (default: all)")
    parser.add_argument(
        "--tokenizer", metavar="DIR", help="the tokenizer's directory (default: the one in the store)"
    )


def find_evaluation(options: argparse.Namespace, *, minimize: bool = False) -> Callable[[Engine], Evaluation]:
    """What the options name, found before the store is opened; it becomes an evaluation once there is an engine.

    Raises:
        ValueError: neither or both of --evaluate and --lm-eval, or --minimize with tasks that know better.
        ImportError: there is no such module.
    """
    if (options.evaluate is None) == (options.lm_eval is None):
        raise ValueError("got neither or both of --evaluate and --lm-eval, expected one of them")
    if options.lm_eval and minimize:
        raise ValueError("got --minimize with --lm-eval, whose tasks say which way is better; leave it out")
    if options.evaluate:
        function = entry_point("--evaluate", options.evaluate)
        return lambda engine: (function, not minimize)

    def of_tasks(engine: Engine) -> Evaluation:
        evaluate = _harness(options, engine)
        return evaluate, evaluate.maximize

    return of_tasks


def _harness(options: argparse.Namespace, engine: Engine) -> LMEvalMetrics:
    """The evaluation of --lm-eval, with the store's own tokenizer unless told."""
    evaluate = paretofuse.lm_eval_metrics(
        options.lm_eval.split(","),
        tokenizer=options.tokenizer,
        include_path=options.lm_eval_path,
        limit=options.limit,
        results=options.lm_eval_results,
    )
    if options.tokenizer is None:
        from transformers import AutoTokenizer

        with TemporaryDirectory() as folder:
            for name, content in engine.blueprint.files.items():
                path = Path(folder, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            try:
                evaluate.tokenizer = AutoTokenizer.from_pretrained(folder)
            except (OSError, ValueError) as error:  # as transformers says that there is none
                raise ValueError(
                    f"{options.store} holds no tokenizer; name its directory by --tokenizer"
                ) from error
    return evaluate
