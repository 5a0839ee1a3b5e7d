"""Sweeps: one merged model, one evaluation for each preference of a grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from paretofuse.engine.distributed import names_of_first_rank, rank_and_size, sum_over_ranks
from paretofuse.engine.evaluation.arguments import check_writable
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
    ahead: int | None = None,
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
        ahead: evaluate modules that are merged ahead, so many at once (`Engine.modules`): the live one and another in
            turn with 1, in the place of the live one, which stays as it is, with more.

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
    rows = Rows(engine.objectives, preferences, on_metrics, kept)
    points = [rows.preferences[index] for index in mine]
    modules = _switched(engine, points) if ahead is None else _merged_ahead(engine, points, ahead)
    for index, module in progress_bar(
        progress and rank == 0,
        iterable=zip(mine, modules, strict=True),
        total=len(mine),
        desc="sweep",
        unit="model",
    ):
        at = f"preference {shown(rows.objectives, rows.preferences[index])}"
        rows.add(index, *evaluate_at(module, evaluate, rows.objectives, at, rows.known(index)))
    names = names_of_first_rank(rows.metrics) or ()
    values = torch.zeros(len(preferences), len(names), dtype=torch.float64)
    for index in mine:
        values[index] = torch.tensor(rows.values[index], dtype=torch.float64)
    return sum_over_ranks(values, "sweeping").numpy(), names


def _switched(engine: Switchable, preferences: Sequence[Sequence[float]]) -> Iterator[torch.nn.Module]:
    for preference in preferences:
        engine.switch(preference)
        yield engine.module


def _merged_ahead(
    engine: Any, preferences: Sequence[Sequence[float]], at_once: int
) -> Iterator[torch.nn.Module]:
    if not hasattr(engine, "modules"):
        raise TypeError(
            f"got ahead= with {type(engine).__name__}, expected an engine that pf.stack or pf.load made"
        )
    if not preferences:  # of more processes than points
        return iter(())
    ahead: Iterator[torch.nn.Module] = engine.modules(
        np.array(preferences), at_once=at_once, live=at_once == 1
    )
    return ahead


Known = Mapping[str, dict[str, float]]
"""What was measured at a preference already, by the model's digest."""


def evaluate_at(
    module: torch.nn.Module,
    evaluate: Evaluate,
    objectives: tuple[str, ...],
    at: str,
    known: Known | None,
) -> tuple[dict[str, float], str]:
    """The metrics of a merged module, and the digest of that model.

    Args:
        module: it is in eval mode meanwhile, under torch.no_grad().
        evaluate: as for `evaluate_preferences`.
        objectives: names for as many numbers without names.
        at: what was merged, for messages, such as "preference news=0.7, poems=0.3".
        known: what need not be evaluated again; None if nobody asks for the digest, which is empty then.

    Raises:
        ValueError, TypeError: as `evaluate_preferences`.
    """
    digest = "" if known is None else model_digest(module, evaluate)
    if known and digest in known:
        return known[digest], digest
    with torch.no_grad(), eval_mode(module):
        result = evaluate(module)
    return _named_numbers(result, objectives, at), digest


def shown(names: Sequence[str], numbers: Sequence[float]) -> str:
    """A preference, or what else was merged, for messages."""
    return ", ".join(f"{name}={number:g}" for name, number in zip(names, numbers, strict=True))


def metric_names(numbers: Mapping[str, float], objectives: tuple[str, ...]) -> tuple[str, ...]:
    """The order of metrics, by the first row: the objectives' if they are those."""
    return objectives if set(numbers) == set(objectives) else tuple(numbers)


class Rows:
    """The rows of a sweep, in whatever order they come.

    Args:
        objectives: the E objectives.
        preferences: [P, E].
        on_metrics: called with the metrics' names at the first row.
        kept: where rows are kept as they come.

    Attributes:
        objectives: their names.
        preferences: [P, E] as lists of floats.
        metrics: their names, None until the first row: in the objectives' order if they are those, else in the first
            row's.
        values: the metrics in that order by index.
    """

    def __init__(
        self,
        objectives: Sequence[str],
        preferences: Sequence[Sequence[float]] | np.ndarray,
        on_metrics: Callable[[tuple[str, ...]], object] | None,
        kept: KeptRows | None,
    ) -> None:
        self.preferences = [[float(share) for share in preference] for preference in preferences]
        self.metrics: tuple[str, ...] | None = None
        self.values: dict[int, list[float]] = {}
        self.objectives = tuple(objectives)
        self._on_metrics = on_metrics
        self._kept = kept

    def known(self, index: int) -> Known | None:
        """What was kept of a preference; None where nothing is."""
        return None if self._kept is None else self._kept.at(self.preferences[index])

    def add(self, index: int, numbers: Mapping[str, float], digest: str) -> None:
        """Take the metrics of a preference by name, and keep them if they are new.

        Raises:
            ValueError: these are other metrics than the first row's.
        """
        if self.metrics is None:
            self.metrics = metric_names(numbers, self.objectives)
            if self._on_metrics is not None:
                self._on_metrics(self.metrics)
        if set(numbers) != set(self.metrics):
            at = f"preference {shown(self.objectives, self.preferences[index])}"
            raise ValueError(
                f"got metrics {sorted(numbers)} from evaluate at {at}, expected {sorted(self.metrics)} as "
                "at the first preference; return the same metrics each time"
            )
        self.values[index] = [numbers[name] for name in self.metrics]
        if self._kept is not None and digest not in self._kept.at(self.preferences[index]):
            self._kept.add(self.preferences[index], self.values[index], digest, self.metrics)

    def table(self) -> tuple[np.ndarray, tuple[str, ...]]:
        """The values [P, M] in float64, once all rows have come, and the metrics' names."""
        values = [self.values[index] for index in range(len(self.preferences))]
        return np.array(values, dtype=np.float64), self.metrics or ()


def _named_numbers(result: Any, objectives: tuple[str, ...], at: str) -> dict[str, float]:
    if isinstance(result, Mapping):
        named = {str(name): value for name, value in result.items()}
    elif isinstance(result, torch.Tensor | np.ndarray | Sequence) and not isinstance(result, str | bytes):
        shape = tuple(getattr(result, "shape", (len(result),) if isinstance(result, Sequence) else ()))
        if len(shape) != 1:
            raise TypeError(
                f"got an array of shape {shape} from evaluate at {at}, expected one number for "
                "each metric; return a dict such as {'accuracy': 0.9} or a flat sequence"
            )
        values = list(result)
        same = len(values) == len(objectives)
        names = objectives if same else tuple(f"metric {i + 1}" for i in range(len(values)))
        named = dict(zip(names, values, strict=True))
    else:
        raise TypeError(
            f"got {type(result).__name__} from evaluate at {at}, expected numbers by metric "
            "name (a dict), or a sequence or tensor of numbers; does evaluate return its result?"
        )
    if not named:
        raise ValueError(f"got no metrics from evaluate at {at}, expected at least one number")
    check_writable("metrics", list(named))
    numbers = {}
    for name, value in named.items():
        try:
            numbers[name] = float(value)
        except OverflowError:  # an integer beyond all floats
            numbers[name] = math.inf
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(
                f"got {type(value).__name__} for metric {name!r} at {at}, expected a number; "
                "reduce it to one, e.g. by .mean()"
            ) from None
        if not math.isfinite(numbers[name]):
            raise ValueError(
                f"got {numbers[name]} for metric {name!r} at {at}, expected a finite number; "
                "check the evaluation data and the merged model there"
            )
    return numbers
