"""Early stopping: a small sweep of held-out data now and then, and the routers that were best in it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paretofuse.engine.distributed import rank_and_size
from paretofuse.engine.evaluation import indicators
from paretofuse.engine.evaluation.arguments import (
    Maximize,
    Point,
    check_function,
    directions,
    plain_maximize,
    plain_point,
    reference_point,
)
from paretofuse.engine.evaluation.sweep import Evaluate, Switchable, evaluate_preferences
from paretofuse.engine.evaluation.wrong_directions import against_preferences
from paretofuse.engine.routing.preference import as_preference, simplex_grid
from paretofuse.engine.routing.routers import Routers
from paretofuse.engine.routing.sampling import layered_grid
from paretofuse.engine.training import random_state
from paretofuse.engine.training.settings import check_number

_LOG = logging.getLogger("paretofuse")

_EXACT_METRICS = 5
"""With more metrics than this, the hypervolume is estimated, from the same samples each time."""


@dataclass(frozen=True)
class Validation:
    """How `pf.fit` validates the routers while it trains them, and when it stops early.

    Before the first step and after every `every` steps, a model for each preference is evaluated; the routers whose
    front has the largest hypervolume are kept, and are what training ends with. Training ends early once `patience`
    validations in a row have brought nothing better. Checkpoints hold all of it. Metrics that get worse as their
    objective's preference grows are logged as a warning (logger "paretofuse") at the first validation: `maximize`
    probably says the wrong direction.

    Attributes:
        evaluate: as for `pf.sweep`: takes the module, returns its metrics. It sees the same random state each time.
        preferences: [P, E], or a sequence of preferences in any form; None for 5 (two objectives), 10 (three or
            four) or 2 E (more: each corner, and half-way from it to equal preferences).
        maximize: whether larger metrics are better, True as everywhere; False for losses; for each metric if they
            differ, in order or by name.
        reference: the hypervolume's reference point: a number for each metric in order, a dict by metric name, or one
            number for all; None for a point a tenth of its extent beyond the first validation's worst values.
        every: steps between validations.
        patience: validations in a row without a better one that end the training.

    Raises:
        ValueError: `every` or `patience` is below 1, or `reference` is not finite. Once training has evaluated for the
            first time: `maximize` or `reference` does not fit the metrics.
        TypeError: `evaluate` is no function, `every` or `patience` no whole number, `maximize` holds something else
            than booleans, or `reference` something else than numbers.
    """

    evaluate: Evaluate
    preferences: Sequence[Any] | np.ndarray | None = None
    maximize: Maximize = True
    reference: Point | None = None
    every: int = 50
    patience: int = 5

    def __post_init__(self) -> None:
        check_function("evaluate", self.evaluate, "evaluate(module), which returns metrics")
        for name in ("every", "patience"):
            check_number(name, getattr(self, name), 1)
        plain_maximize(self.maximize)
        if self.reference is not None:
            plain_point(self.reference)

    def grid(self, objectives: Sequence[str]) -> np.ndarray:
        """The preferences, [P, E] float64.

        Raises:
            ValueError: one is not valid, or there are none.
            TypeError: they are no sequence.
        """
        count = len(objectives)
        if self.preferences is None:
            points = {1: 2, 2: 5, 3: 4, 4: 3}.get(count)
            return simplex_grid(count, points) if points else layered_grid(count, (2, 2))
        if not hasattr(self.preferences, "__len__"):
            raise TypeError(
                f"got preferences={self.preferences!r} for validation, expected a sequence of them, such as "
                "pf.simplex_grid(E, points)"
            )
        if len(self.preferences) == 0:
            raise ValueError("got no preferences for validation, expected at least one")
        return np.array([as_preference(row, tuple(objectives)) for row in self.preferences])


class EarlyStopping:
    """A run's validations: the best routers so far, and how long ago that was.

    Args:
        validation: what to do.
        engine: what evaluates; its routers are the ones being trained.
        routers: them.
        seed: of the random state in which `evaluate` runs.
        gpus: those in use, whose random states are the training's own.
    """

    def __init__(
        self,
        validation: Validation,
        engine: Switchable,
        routers: Routers,
        seed: int,
        gpus: Sequence[int] = (),
    ) -> None:
        self._validation = validation
        self._engine = engine
        self._routers = routers
        self._seed = seed
        self._gpus = gpus
        self._grid = validation.grid(engine.objectives)
        self._reference: list[float] | None = None
        self._metrics: list[str] | None = None
        self._since = 0
        self._scores: list[float] = []
        self.best: dict[str, Tensor] = {}

    @property
    def score(self) -> float:
        """The latest validation's hypervolume."""
        return self._scores[-1]

    @property
    def ended(self) -> bool:
        """Whether patience has run out."""
        return self._since >= self._validation.patience

    def validate(self, step: int) -> None:
        """Evaluate the routers after `step` steps, if it is time to.

        Raises:
            ValueError: the metrics are other than before.
        """
        if step % self._validation.every:
            return
        with random_state.forked(self._gpus):
            values, metrics = evaluate_preferences(
                self._engine, self._evaluate, self._grid, False, self._resolve
            )
        if not self._scores:
            larger = directions(self._validation.maximize, metrics)
            note = against_preferences(self._grid, values, self._engine.objectives, metrics, larger)
            if note is not None and rank_and_size()[0] == 0:
                _LOG.warning("validation before training: %s", note)
        score = self._hypervolume(values, metrics)
        better = not self._scores or score > max(self._scores)
        self._scores.append(score)
        self._since = 0 if better else self._since + 1
        if better:
            self.best = copy.deepcopy(self._routers.state_dict())

    def finish(self) -> None:
        """Give the routers their best values."""
        self._routers.load_state_dict(self.best)

    def state(self) -> dict[str, Any]:
        """All but `best`, JSON only."""
        return {
            "reference": self._reference,
            "metrics": self._metrics,
            "since": self._since,
            "scores": list(self._scores),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a state.

        Raises:
            KeyError, TypeError, ValueError: it is no such state.
        """
        scores = [float(score) for score in state["scores"]]
        if not scores:
            raise ValueError("no validation before the first step")
        check_number("since", state["since"], 0)
        self._metrics = [str(name) for name in state["metrics"]]
        self._reference = reference_point(state["reference"], self._metrics)
        self._since, self._scores = state["since"], scores

    def identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to belong to this run."""
        maximize, reference = self._validation.maximize, self._validation.reference
        return {
            "preferences": self._grid,
            "maximize": plain_maximize(maximize),
            "reference": None if reference is None else plain_point(reference),
            "every": self._validation.every,
            "patience": self._validation.patience,
        }

    def _evaluate(self, module: torch.nn.Module) -> Any:
        random_state.seed(self._seed, self._gpus)  # at each preference, whichever process has its turn
        return self._validation.evaluate(module)

    def _resolve(self, metrics: Sequence[str]) -> tuple[tuple[bool, ...], list[float] | None]:
        """Which metrics are better when larger, and the reference point where one is known, in the metrics' order."""
        larger = directions(self._validation.maximize, metrics)
        if self._metrics is not None and self._metrics != list(metrics):
            raise ValueError(
                f"got metrics {list(metrics)} from evaluate, expected {self._metrics} as at the first validation; a "
                "resumed run needs the same metrics"
            )
        self._metrics = list(metrics)
        if self._reference is None and self._validation.reference is not None:
            self._reference = reference_point(self._validation.reference, metrics)
        return larger, self._reference

    def _hypervolume(self, values: np.ndarray, metrics: Sequence[str]) -> float:
        larger, reference = self._resolve(metrics)
        if reference is None:
            reference = self._reference = _beyond(values, larger)
        if len(metrics) <= _EXACT_METRICS:
            return indicators.exact_hypervolume(values, reference, larger)
        return indicators.estimate_hypervolume(values, reference, larger)[0]


def _beyond(values: np.ndarray, larger: Sequence[bool]) -> list[float]:
    """A little worse than the worst value of each metric."""
    signs = np.where(larger, 1.0, -1.0)
    good = values * signs
    extent = np.ptp(good, axis=0)
    margin = 0.1 * np.where(extent > 0, extent, np.maximum(np.abs(good).max(axis=0), 1.0))
    return [float(x) for x in (good.min(axis=0) - margin) * signs]
