"""`paretofuse sweep`: a front as a table and a picture."""

from __future__ import annotations

import argparse
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process

import paretofuse
from paretofuse.cli.evaluating import add_evaluation, find_evaluation
from paretofuse.cli.front_files import add_front, check_front, prepare_front_files, write_front
from paretofuse.cli.options import count
from paretofuse.cli.running import Result, load_engine, shows_progress

SUMMARY = "evaluate the merged models of evenly spaced preferences"
EXAMPLE = "paretofuse sweep gpt2.store --evaluate tasks.glue:accuracies -o front.csv --plot front.png"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The words of this command."""
    add_evaluation(parser)
    add_front(parser, "reference point of the hypervolume, which is then printed")
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
        help="merge so many models in one pass while those before them are evaluated; takes the memory of 2 N models, "
        "with N = 1 of one more",
    )  # fmt: skip
    parser.add_argument(
        "--chunksize", type=count, metavar="N",
        help="points that each of --workers is sent at a time; of several it merges the next while it evaluates one, "
        "in the memory of 4 models",
    )  # fmt: skip


def processes(count: int, threads: int | None) -> Callable[[], ProcessPoolExecutor]:
    """Makes pools of processes that begin anew (nothing of this one's threads or GPU contexts is inherited)."""
    import torch

    share = threads or max(1, torch.get_num_threads() // count)
    return lambda: ProcessPoolExecutor(
        count, mp_context=get_context("spawn"), initializer=_begin_worker, initargs=(share,)
    )


def _begin_worker(threads: int) -> None:
    """What each process of a sweep does first."""
    import torch

    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_the_sweep, daemon=True).start()


def _end_with_the_sweep() -> None:
    """End this process when the one that began it has ended, by SIGTERM or SIGKILL; it would wait for work for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def run(options: argparse.Namespace) -> Result:
    """Evaluate the front; all that can go wrong at the end is tried before the long work."""
    if options.chunksize and not options.workers:
        raise ValueError(f"got --chunksize {options.chunksize} without --workers, whom it is for")
    prepare_front_files(options)
    found = find_evaluation(options, minimize=options.minimize)
    logging.getLogger("paretofuse").addHandler(
        logging.NullHandler()
    )  # what it would log is printed as a note below
    engine = load_engine(options)
    evaluate, maximize = found(engine)
    objectives = len(engine.objectives)
    front = paretofuse.sweep(
        engine,
        evaluate,
        paretofuse.simplex_grid(objectives, options.points) if options.points else None,
        maximize=maximize,
        out=options.output,
        ahead=options.ahead,
        chunksize=options.chunksize or 1,
        executor=processes(options.workers, options.threads) if options.workers else None,
        progress=shows_progress(options),
        on_metrics=lambda metrics: check_front(options, objectives, metrics),
    )
    return write_front(options, front)
