"""`paretofuse sweep`: a front as a table and a picture."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import paretofuse
from paretofuse.cli.options import add_evaluation, add_output, count, named_numbers
from paretofuse.cli.running import Result, entry_point, in_options, load_engine, shows_progress

if TYPE_CHECKING:
    from paretofuse.engine.engine import Engine
    from paretofuse.fronts.harness import LMEvalMetrics

SUMMARY = "evaluate the merged models of evenly spaced preferences"
EXAMPLE = "paretofuse sweep gpt2.store --evaluate tasks.glue:accuracies -o front.csv --plot front.png"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The words of this command."""
    add_evaluation(parser, required=False)
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
    add_output(parser, "CSV", "table to write")
    parser.add_argument(
        "--points", type=count, metavar="N",
        help="points along an edge, ends included (default: 11 for two objectives, fewer for more)",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=count, metavar="N",
        help="evaluate in so many processes, each with the store mapped; one that dies is replaced, and its points are "
        "done again. --threads is for each (default: the cores shared out)",
    )  # fmt: skip
    parser.add_argument(
        "--ahead", type=count, metavar="N",
        help="merge so many models in one pass while those before them are evaluated; takes the memory of 2 N models",
    )  # fmt: skip
    parser.add_argument("--plot", metavar="PNG", help="picture to write")
    parser.add_argument("--html", metavar="HTML", help="page to write, to explore the front in a browser")
    parser.add_argument("--minimize", action="store_true", help="smaller numbers are better, as with losses")
    parser.add_argument(
        "--reference", type=named_numbers, metavar="NAME=VALUE,...",
        help="reference point of the hypervolume, which is then printed",
    )  # fmt: skip


def processes(count: int, threads: int | None) -> Callable[[], ProcessPoolExecutor]:
    """Makes pools of processes that begin anew (nothing of this one's threads or GPU contexts is inherited)."""
    import torch

    share = threads or max(1, torch.get_num_threads() // count)
    return lambda: ProcessPoolExecutor(
        count, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(share,)
    )


def harness(options: argparse.Namespace, engine: Engine) -> LMEvalMetrics:
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


def run(options: argparse.Namespace) -> Result:
    """Evaluate the front; all that can go wrong at the end is tried before the long work."""
    from paretofuse.engine.evaluation.arguments import plain_point, reference_point
    from paretofuse.outputs import prepare_file

    if options.plot and find_spec("matplotlib") is None:
        raise ImportError("--plot needs matplotlib; pip install 'paretofuse[plot]'")
    if options.html and find_spec("plotly") is None:
        raise ImportError("--html needs plotly; pip install 'paretofuse[serve]'")
    if options.reference is not None:
        plain_point(options.reference)
    if (options.evaluate is None) == (options.lm_eval is None):
        raise ValueError("got neither or both of --evaluate and --lm-eval, expected one of them")
    if options.lm_eval and options.minimize:
        raise ValueError("got --minimize with --lm-eval, whose tasks say which way is better; leave it out")
    evaluate: Any = None if options.lm_eval else entry_point("--evaluate", options.evaluate)
    if options.plot:
        plots = import_module("paretofuse.fronts.plots")
        plots.check_path(options.plot)
        prepare_file(options.plot)
    if options.html:
        prepare_file(options.html)
    logging.getLogger("paretofuse").addHandler(
        logging.NullHandler()
    )  # what it would log is printed as a note below
    engine = load_engine(options)
    maximize: Any = not options.minimize
    if options.lm_eval:
        evaluate = harness(options, engine)
        maximize = evaluate.maximize

    def check(metrics: tuple[str, ...]) -> None:
        if options.reference is not None:
            reference_point(options.reference, metrics)
        if options.plot:
            plots.check_shape(len(engine.objectives), len(metrics))

    front = paretofuse.sweep(
        engine,
        evaluate,
        paretofuse.simplex_grid(len(engine.objectives), options.points) if options.points else None,
        maximize=maximize,
        out=options.output,
        ahead=options.ahead,
        executor=processes(options.workers, options.threads) if options.workers else None,
        progress=shows_progress(options),
        on_metrics=check,
    )
    if options.plot:
        front.plot(options.plot)
    if options.html:
        front.to_html(options.html)
    notes = [in_options(note, vars(options)) for note in front.notes]
    document: dict[str, Any] = {
        "objectives": list(front.objectives),
        "metrics": list(front.metrics),
        "preferences": front.preferences.tolist(),
        "values": front.values.tolist(),
        "non_dominated": front.non_dominated().tolist(),
        "notes": notes,
        "csv": options.output,
        "plot": options.plot,
        "html": options.html,
    }
    lines = [f"note: {note}" for note in notes]
    lines.append(
        f"{options.output}: {len(front)} preferences, {int(front.non_dominated().sum())} not dominated"
    )
    if options.reference is not None:
        document["hypervolume"] = front.hypervolume(options.reference)
        lines.append(f"hypervolume {document['hypervolume']:.6g}")
    lines += [path for path in (options.plot, options.html) if path]
    return "\n".join(lines), document, 0
