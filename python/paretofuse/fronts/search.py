"""Searching: a front from few evaluations, each where most is promised."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from paretofuse.engine.evaluation.arguments import (
    Maximize,
    Point,
    directions,
    finite_bounds,
    plain_point,
)
from paretofuse.engine.training.settings import check_number
from paretofuse.fronts import files
from paretofuse.fronts.coefficients import CoefficientFront, Coefficients, Parts
from paretofuse.fronts.front import Front
from paretofuse.fronts.spaces import CoefficientSpace, PreferenceSpace, Space
from paretofuse.fronts.sweep import check_arguments, prepare_table

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
    check_arguments(engine, evaluate, maximize)
    found = _searched(
        engine, evaluate, budget, PreferenceSpace(engine.objectives), maximize, at_most, at_least, ref, sampler, seed,
        storage, name, out, progress,
    )  # fmt: skip
    return Front(*found)


def search_coefficients(
    engine: Engine,
    evaluate: Evaluate,
    budget: int,
    *,
    low: float = 0.0,
    high: float = 1.0,
    parts: Parts = 1,
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
) -> CoefficientFront:
    """Search a coefficient for each plane, free of the simplex, in the place of a preference.

    The coefficients are the routing weights themselves: what routers learned plays no part, and tensors that are not
    routed keep their constant weight. It begins at each expert alone, at equal shares and in the middle of the box.

    Args:
        engine: the engine; switched in place.
        evaluate: as for `pf.sweep`.
        budget: as for `pf.search`. A box of many dimensions needs many more evaluations than a simplex.
        low, high: the least and the largest coefficient; sums above 1 and, from `low` on, numbers below 0 are allowed.
        parts: 1 for one coefficient for each plane; a number C for C times as many, the groups being cut into C
            stretches of nearly equal length in their order; or a function from a group's name to its part's.
        maximize, at_most, at_least, ref, sampler, seed, storage, name, progress: as for `pf.search`.
        out: a CSV file for the front, as by `CoefficientFront.to_csv`; until then each row is kept beside it.

    Returns:
        All that was evaluated; `engine.merge(weights=front.choose().weights)` is a model of it.

    Raises:
        ImportError, ValueError, TypeError, OSError: as `pf.search`; and low is not below high, or there are not so
            many groups as parts.
    """
    check_arguments(engine, evaluate, maximize)
    layout = Coefficients(engine, parts)
    found = _searched(
        engine, evaluate, budget, CoefficientSpace(layout, low, high), maximize, at_most, at_least, ref, sampler, seed,
        storage, name, out, progress,
    )  # fmt: skip
    return CoefficientFront(*found, layout)


def _searched(
    engine: Engine,
    evaluate: Evaluate,
    budget: int,
    space: Space,
    maximize: Maximize,
    at_most: Mapping[str, float] | None,
    at_least: Mapping[str, float] | None,
    ref: Point | None,
    sampler: str | optuna.samplers.BaseSampler,
    seed: int,
    storage: str | None,
    name: str,
    out: str | os.PathLike[str] | None,
    progress: bool,
) -> files.Table:
    """What a search of a space found, written where it shall be."""
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise ImportError("a search needs Optuna; pip install 'paretofuse[search]'") from error
    from paretofuse.engine.evaluation.kept_rows import KeptRows
    from paretofuse.fronts.study import SearchedStudy, storage_at

    if ref is not None:
        plain_point(ref)
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
        raise ValueError(f"got budget={budget!r}, expected a whole number of evaluations, at least 1")
    check_number("seed", seed, 0)
    finite_bounds("at_most", at_most or {})
    finite_bounds("at_least", at_least or {})
    kept = None
    if out is not None:
        prepare_table(out, space.kind)
        kept = KeptRows(Path(out), space.names, space.kind)
    with storage_at(storage) as opened:
        study = SearchedStudy(
            engine, evaluate, space, kept, maximize, at_most or {}, at_least or {}, ref, sampler, seed, opened, name
        )  # fmt: skip
        study.run(budget, progress)
        points, values = study.table()
    found = files.Table(points, values, space.names, study.metrics, directions(maximize, study.metrics))
    if kept is not None and out is not None:
        files.write_table(out, space.kind, found)
        kept.finish()
    return found
