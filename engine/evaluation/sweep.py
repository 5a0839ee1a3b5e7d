"""Sweeps: one merged model, one evaluation for each preference of a grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from paretofuse.engine.distributed import names_of_first_rank, rank_and_size, sum_over_ranks
from paretofuse.engine.evaluation.evaluate import eval_mode
from paretofuse.engine.evaluation.kept_rows import KeptRows, model_digest
from paretofuse.engine.evaluation.progress import progress_bar

Evaluate = Callable[[torch.nn.Module], Any]
"""Takes the live module and returns its metrics: a dict by name, or a sequence or 1-d tensor of numbers."""


class Switchable(Protocol):
    """The part of an engine that a sweep needs."""

    @property
    def objectives(self) -> tuple[str, ...]:
        """The experts' names."""

    @property
    def module(self) -> torch.nn.Module:
        """The live module."""

    def switch(self, preference: Sequence[float], /) -> Any:
        """Rewrite the live module for a preference."""


def evaluate_preferences(
    engine: Switchable,
    evaluate: Evaluate,
    preferences: Sequence[Sequence[float]] | np.ndarray,
    progress: bool = True,
    on_metrics: Callable[[tuple[str, ...]], object] | None = None,
    kept: KeptRows | None = None,
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Evaluate the live module at each preference.

    The module is in eval mode while `evaluate` runs, under torch.no_grad(); each submodule's own training
    mode is restored afterwards. The engine is left at the last preference. Several processes (torchrun) share
    out the preferences, and all of them get all values.

    Args:
        engine: the engine.
        evaluate: called as evaluate(engine.module) after each switch; returns a dict of numbers by metric
            name, or a sequence or tensor of numbers; E numbers without names are named by objective.
        preferences: [P, E], P >= 1.
        progress: show a progress bar on stderr where that is a terminal.
        on_metrics: called with the metrics' names after the first evaluation; what it raises ends the sweep there.
        kept: where rows are kept as they come; a preference that is there already, of the same model, is not evaluated.

    Returns:
        The values [P, M] in float64 and the names of the M metrics. If the names are those of the objectives,
        they come in the objectives' order, otherwise in the order of the first evaluation.

    Raises:
        ValueError: the metrics change between preferences, or one is not finite; names the preference.
        TypeError: `evaluate` returned something else.
    """
    if len(preferences) == 0:
        raise ValueError("got no preferences, expected at least one")
    rank, size = rank_and_size()
    mine = range(rank, len(preferences), size)
    rows: list[list[float]] = []
    metrics: tuple[str, ...] | None = None
    objectives = tuple(engine.objectives)
    for index in progress_bar(progress and rank == 0, iterable=mine, desc="sweep", unit="model"):
        preference = preferences[index]
        chosen = [float(share) for share in preference]
        engine.switch(chosen)
        shown = ", ".join(f"{name}={share:g}" for name, share in zip(objectives, chosen, strict=True))
        model = "" if kept is None else model_digest(engine.module, evaluate)
        found = None if kept is None else kept.find(chosen, model)
        if found is None:
            with torch.no_grad(), eval_mode(engine.module):
                result = evaluate(engine.module)
            numbers = _named_numbers(result, objectives, shown)
        else:
            numbers = found
        if metrics is None:
            metrics = objectives if set(numbers) == set(objectives) else tuple(numbers)
            if on_metrics is not None:
                on_metrics(metrics)
        if set(numbers) != set(metrics):
            raise ValueError(
                f"got metrics {sorted(numbers)} from evaluate at preference {shown}, expected "
                f"{sorted(metrics)} as at the first preference; return the same metrics each time"
            )
        rows.append([numbers[name] for name in metrics])
        if kept is not None and found is None:
            kept.add(chosen, rows[-1], model, metrics)
    names = names_of_first_rank(metrics) or ()
    values = torch.zeros(len(preferences), len(names), dtype=torch.float64)
    if rows:
        values[rank::size] = torch.tensor(rows, dtype=torch.float64)
    return sum_over_ranks(values, "sweeping").numpy(), names


def _named_numbers(result: Any, objectives: tuple[str, ...], shown: str) -> dict[str, float]:
    if isinstance(result, Mapping):
        named = {str(name): value for name, value in result.items()}
    elif isinstance(result, torch.Tensor | np.ndarray | Sequence) and not isinstance(result, str | bytes):
        shape = tuple(getattr(result, "shape", (len(result),) if isinstance(result, Sequence) else ()))
        if len(shape) != 1:
            raise TypeError(
                f"got an array of shape {shape} from evaluate at preference {shown}, expected one number for "
                "each metric; return a dict such as {'accuracy': 0.9} or a flat sequence"
            )
        values = list(result)
        same = len(values) == len(objectives)
        names = objectives if same else tuple(f"metric {i + 1}" for i in range(len(values)))
        named = dict(zip(names, values, strict=True))
    else:
        raise TypeError(
            f"got {type(result).__name__} from evaluate at preference {shown}, expected numbers by metric "
            "name (a dict), or a sequence or tensor of numbers; does evaluate return its result?"
        )
    if not named:
        raise ValueError(f"got no metrics from evaluate at preference {shown}, expected at least one number")
    numbers = {}
    for name, value in named.items():
        try:
            numbers[name] = float(value)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(
                f"got {type(value).__name__} for metric {name!r} at preference {shown}, expected a number; "
                "reduce it to one, e.g. by .mean()"
            ) from None
        if not math.isfinite(numbers[name]):
            raise ValueError(
                f"got {numbers[name]} for metric {name!r} at preference {shown}, expected a finite number; "
                "check the evaluation data and the merged model there"
            )
    return numbers
