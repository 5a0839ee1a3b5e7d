"""Where a search looks next, as Optuna samplers: our own, and Optuna's by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState

from paretofuse.engine.evaluation.growth import next_point
from paretofuse.fronts.spaces import Space

CHOICES = ("growth", "tpe", "nsga2", "gp", "random")


def point_of(params: Mapping[str, float], space: Space) -> np.ndarray:
    """The point [D] of a trial's parameters."""
    return space.point(np.array([params[name] for name in distributions(space)], dtype=np.float64))


def parameters(point: Sequence[float] | np.ndarray, space: Space) -> dict[str, float]:
    """The parameters of a point."""
    return {name: float(number) for name, number in zip(distributions(space), point, strict=True)}


def distributions(space: Space) -> dict[str, FloatDistribution]:
    """What each parameter is drawn from, in the order of a point's numbers."""
    return {f"{space.kind}:{name}": FloatDistribution(*space.interval) for name in space.names}


def check_choice(choice: Any) -> None:
    """ValueError unless that is one of `CHOICES` or a sampler of Optuna's."""
    if choice not in CHOICES and not isinstance(choice, optuna.samplers.BaseSampler):
        raise ValueError(
            f"got sampler={choice!r}, expected one of {', '.join(CHOICES)}, or a sampler of optuna.samplers"
        )


def make_sampler(
    choice: str | optuna.samplers.BaseSampler,
    space: Space,
    larger: Sequence[bool],
    bounds: np.ndarray,
    ref: Sequence[float] | None,
    seed: int,
) -> optuna.samplers.BaseSampler:
    """The sampler of a search.

    Args:
        choice: one of `CHOICES`, or a sampler of Optuna's, which is taken as it is.
        space: where the points lie.
        larger: for each of the M metrics, whether larger is better.
        bounds: [M]: what each metric must reach; infinitely bad where it need not.
        ref: [M]: the hypervolume's reference point, or None.
        seed: of everything random.
    """
    if isinstance(choice, optuna.samplers.BaseSampler):
        return choice
    if choice == "growth":
        return GrowthSampler(space, larger, bounds, ref, seed)
    if choice == "tpe":
        return optuna.samplers.TPESampler(seed=seed, multivariate=True)
    if choice == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed)
    if choice == "gp":
        return optuna.samplers.GPSampler(seed=seed)
    return optuna.samplers.RandomSampler(seed=seed)


class GrowthSampler(optuna.samplers.BaseSampler):  # type: ignore[misc]
    """Asks `next_point`; what other processes are measuring meanwhile counts as measured.

    Args: as `make_sampler`'s.
    """

    def __init__(
        self,
        space: Space,
        larger: Sequence[bool],
        bounds: np.ndarray,
        ref: Sequence[float] | None,
        seed: int,
    ) -> None:
        self._space = space
        self._signs = np.where(larger, 1.0, -1.0)
        self._bounds = bounds * self._signs
        self._ref = None if ref is None else (np.asarray(ref) * self._signs).tolist()
        self._seed = seed

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """All parameters."""
        return {**distributions(self._space)}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The point to evaluate next, as parameters."""
        trials = study.get_trials(deepcopy=False)
        done = [t for t in trials if t.state == TrialState.COMPLETE]
        # Parameters of another process's newest trial come one by one: it counts when all of them are there.
        drawn = set(distributions(self._space))
        others = [
            t
            for t in trials
            if t.state == TrialState.RUNNING and t.params.keys() >= drawn and t.number != trial.number
        ]
        low, high = self._space.interval
        width = len(self._space.names)
        known, pending = (
            (np.array([point_of(t.params, self._space) for t in part]).reshape(-1, width) - low)
            / (high - low)
            for part in (done, others)
        )
        rng = np.random.default_rng([self._seed, trial.number])
        if not done:
            drawn_point = self._space.point(rng.uniform(low, high, width))
            return parameters(drawn_point, self._space)
        values = np.array([t.values for t in done], dtype=np.float64) * self._signs
        found = next_point(
            known, values, pending, self._space.candidates, bounds=self._bounds, ref=self._ref, rng=rng
        )
        return parameters(np.clip(low + (high - low) * found, low, high), self._space)

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """A number by chance, of a parameter that is none of the space's."""
        rng = np.random.default_rng([self._seed, trial.number, len(param_name)])
        assert isinstance(param_distribution, FloatDistribution)
        return float(rng.uniform(param_distribution.low, param_distribution.high))
