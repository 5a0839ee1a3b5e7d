"""Searching: a front from few evaluations, each at the preference that promises most."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from paretofuse.engine.evaluation.arguments import (
    Maximize,
    Point,
    directions,
    plain_point,
)
from paretofuse.fronts.front import Front
from paretofuse.fronts.sweep import check_arguments, prepare_front

if TYPE_CHECKING:
    import optuna

    from paretofuse.engine.engine import Engine
    from paretofuse.engine.evaluation.sweep import Evaluate


def search(
    engine: Engine,
    evaluate: Evaluate,
    budget: int,
    *,
    maximize: Maximize = True,
    at_most: Mapping[str, float] | None = None,
    at_least: Mapping[str, float] | None = None,
    ref: Point | None = None,
    sampler: str | optuna.samplers.BaseSampler = "growth",
    seed: int = 0,
    storage: str | None = None,
    name: str = "paretofuse",
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Front:
    """Merge and evaluate models at preferences that are chosen one after the other, by what was measured before.

    It begins at the experts and at equal shares. Where metrics have bounds, preferences that keep to them are looked
    for; `front.choose(at_most=...)` picks from what was found.

    Args:
        engine: the engine; switched in place.
        evaluate: as for `pf.sweep`.
        budget: evaluations in all, those of earlier calls and other processes on the same storage included.
        maximize: whether larger metrics are better, as for `pf.sweep`.
        at_most, at_least: bounds by metric.
        ref: the reference point of the hypervolume that shall grow; a little below the worst of each metric if None.
        sampler: "growth", which models each metric over the simplex and goes where the hypervolume promises to grow
            most; Optuna's "tpe", "nsga2", "gp" or "random"; or a sampler of `optuna.samplers`.
        seed: of everything random; processes on one storage should have different ones.
        storage: an Optuna storage's URL, such as "sqlite:///search.db" or "postgresql://user@host/db": the same call
            goes on where an earlier one ended, and several processes or machines that make it work on one search.
        name: the study's name in the storage.
        out: a CSV file for the front, as for `pf.sweep`; until it is written each row is kept beside it.
        progress: show a progress bar where stderr is a terminal.

    Returns:
        All that was evaluated, in the order of the study's trials; other processes may still be evaluating some.

    Raises:
        ImportError: Optuna is not installed (`pip install 'paretofuse[search]'`).
        ValueError: an argument is out of range, a name is no metric, or the storage's study is of another engine,
            another evaluation or other directions.
        TypeError: an argument is of another kind, or `evaluate` returned no numbers.
        OSError: `out` cannot be written (before anything is evaluated).
    """
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise ImportError("pf.search needs Optuna; pip install 'paretofuse[search]'") from error
    from paretofuse.engine.evaluation.kept_rows import KeptRows
    from paretofuse.fronts.study import SearchedStudy

    check_arguments(engine, evaluate, maximize)
    if ref is not None:
        plain_point(ref)
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
        raise ValueError(f"got budget={budget!r}, expected a whole number of evaluations, at least 1")
    kept = None
    if out is not None:
        prepare_front(out)
        kept = KeptRows(Path(out), engine.objectives)
    study = SearchedStudy(
        engine, evaluate, kept, maximize, at_most or {}, at_least or {}, ref, sampler, seed, storage, name
    )
    study.run(budget, progress)
    preferences, values = study.table()
    front = Front(preferences, values, engine.objectives, study.metrics, directions(maximize, study.metrics))
    if kept is not None and out is not None:
        front.to_csv(out)
        kept.finish()
    return front
