"""Sweeping: a model for each preference, evaluated into a front."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from paretofuse.engine.evaluation.arguments import Maximize, check_function, directions, plain_maximize
from paretofuse.engine.routing.preference import as_preference, simplex_grid
from paretofuse.fronts import files
from paretofuse.fronts.front import Front
from paretofuse.outputs import prepare_file

if TYPE_CHECKING:
    from paretofuse.engine.evaluation.sweep import Evaluate, Switchable
    from paretofuse.fronts.workers import Executor

_AHEAD = 64
"""Points that an executor is given at a time, unless told."""


def sweep(
    engine: Switchable,
    evaluate: Evaluate,
    preferences: Sequence[Any] | np.ndarray | None = None,
    *,
    maximize: Maximize = True,
    out: str | os.PathLike[str] | None = None,
    executor: Executor | None = None,
    ahead: int | None = None,
    chunksize: int = 1,
    progress: bool = True,
    on_metrics: Callable[[tuple[str, ...]], object] | None = None,
) -> Front:
    """Merge and evaluate a model for each preference.

    Metrics that get worse as their objective's preference grows are logged as a warning (logger "paretofuse") and stay
    in the front's `notes`: `maximize` is probably wrong.

    Args:
        engine: the engine; switched in place, and left at the last preference. With `executor`, or `ahead` above 1, its
            live module stays as it is.
        evaluate: called with the live module in eval mode, without gradients; returns its metrics as a dict
            of numbers by name, or as a sequence of numbers (one for each objective, in order).
        preferences: [P, E], or a sequence of preferences in any form; a grid of the simplex if None
            (11 points for 2 objectives).
        maximize: whether larger metrics are better (accuracy), True as everywhere, or smaller ones (loss); for each
            metric if they differ, in order or by name.
        out: a CSV file for the front, as by `Front.to_csv`; an earlier front there is replaced at the end. Until then
            each row is kept as it comes in a file beside it (front.partial.csv for front.csv): after an interruption or
            an error the same call goes on there, and evaluates again only what the engine merges differently now.
        executor: evaluate on the workers of an executor instead: anything with the `submit` of concurrent.futures
            (process pools, mpi4py.futures, submitit), a Dask client, a `RayPool`; or a function that makes one, which
            is called again where a dead worker has broken it. Each worker opens the store that the engine was loaded
            from or saved to, and is sent `evaluate` with each point.
        ahead: merge so many preferences in one pass, in a thread, while those before them are evaluated:
            `evaluate` gets modules of their own, as by `engine.modules`, which take the memory of 2 x `ahead` models.
            With 1 the live module takes turns with another, in the memory of one model more. With an executor, how many
            points it is given at a time (64 unless told; at least as many as it has workers).
        chunksize: with an executor, how many points a worker is sent at a time. Of several it merges the next while it
            evaluates one, in the memory of 4 models instead of 1; their rows come together, and where one of them
            fails all are done again.
        progress: show a progress bar where stderr is a terminal.
        on_metrics: called with the metrics' names after the first evaluation; what it raises ends the sweep there.

    Raises:
        ValueError: a preference is invalid, `out` is there and no front, or with an executor the engine is of no store
            or was trained since (all before anything is evaluated), `maximize` does not fit the metrics (after the
            first evaluation), or a metric is not finite.
        RuntimeError: workers of the executor died, and it could not go on.
        TypeError: `engine` or `executor` is none, `evaluate` is no function or none that a worker can be sent,
            `maximize` holds something else than booleans (before anything is evaluated), or `evaluate` returned no
            numbers.
        OSError: `out` cannot be written (before anything is evaluated).
    """
    # The only part of this file that needs torch.
    from paretofuse.engine.distributed import rank_and_size
    from paretofuse.engine.evaluation.kept_rows import KeptRows
    from paretofuse.engine.evaluation.sweep import Rows, evaluate_preferences

    check_arguments(engine, evaluate, maximize)
    for option, number in (("ahead", 1 if ahead is None else ahead), ("chunksize", chunksize)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"got {option}={number!r}, expected a whole number of at least 1")
    if executor is None and chunksize != 1:
        raise ValueError(f"got chunksize={chunksize} without executor=, whose workers it is for")
    objectives = tuple(engine.objectives)
    grid = default_preferences(len(objectives)) if preferences is None else _grid(preferences, objectives)
    kept = None
    if out is not None:
        prepare_table(out, "preference")
        kept = KeptRows(Path(out), objectives)

    def check(metrics: tuple[str, ...]) -> None:
        directions(maximize, metrics)
        if on_metrics is not None:
            on_metrics(metrics)

    try:
        if executor is None:
            values, metrics = evaluate_preferences(engine, evaluate, grid, progress, check, kept, ahead)
        else:
            # Importing it imports all that opens stores.
            from paretofuse.fronts.workers import evaluate_on_workers

            rows = Rows(objectives, grid, check, kept)
            evaluate_on_workers(executor, ahead or _AHEAD, chunksize, engine, evaluate, rows, progress)
            values, metrics = rows.table()
    except BaseException as error:
        if kept is not None and kept.path.exists() and hasattr(error, "add_note"):  # Python 3.11
            error.add_note(f"the rows until then are kept in {kept.path}; the same sweep goes on from there")
        raise
    front = Front(grid, values, objectives, metrics, directions(maximize, metrics))
    if kept is not None and out is not None and rank_and_size()[0] == 0:
        front.to_csv(out)
        kept.finish()
    if rank_and_size()[0] == 0:
        for note in front.notes:
            logging.getLogger("paretofuse").warning("sweep: %s", note)
    return front


def check_arguments(engine: object, evaluate: object, maximize: object) -> None:
    """Check the kinds of what is evaluated, and how.

    Raises:
        TypeError: `engine` is none, `evaluate` is no function, or `maximize` holds something else than booleans.
    """
    if not {"objectives", "module", "switch"} <= set(dir(engine)):  # hasattr would build the live module
        raise TypeError(
            f"got {type(engine).__name__} to sweep, expected an engine that pf.stack or pf.load made"
        )
    check_function("evaluate", evaluate, "evaluate(module) that returns metrics")
    plain_maximize(maximize)


def _grid(preferences: Sequence[Any] | np.ndarray, objectives: tuple[str, ...]) -> np.ndarray:
    """Preferences in any form as [P, E] float64."""
    if not hasattr(preferences, "__len__"):
        raise TypeError(
            f"got preferences={preferences!r}, expected a sequence of them, such as pf.simplex_grid(E, points)"
        )
    grid = np.array([as_preference(row, objectives) for row in preferences], dtype=np.float64)
    if len(grid) == 0:
        raise ValueError("got no preferences, expected at least one; leave them out for a default grid")
    return grid


def prepare_table(out: str | os.PathLike[str], kind: str) -> None:
    """A front is written over one of its kind, and over nothing else; whether it can is tried before the long work.

    Raises:
        ValueError: something else stands there.
        OSError: nothing can be written there.
    """
    prepare_file(out)
    if os.path.exists(out) and os.path.getsize(out) > 0:
        try:
            files.read_table(out, kind)
        except ValueError as error:
            raise ValueError(
                f"got out={str(out)!r}, which is there already and is no front of {kind}s; give another "
                "name, or move the file away"
            ) from error


def default_preferences(objectives: int) -> np.ndarray:
    """A grid of the simplex that is quick enough to sweep: [P, E]; 11 rows for E = 2, 136 for E = 16."""
    points = {2: 11, 3: 8, 4: 5, 5: 4}.get(objectives, 3)
    return np.asarray(simplex_grid(objectives, points), dtype=np.float64)
