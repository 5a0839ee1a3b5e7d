"""Where a search looks next, as Optuna samplers: our own, and Optuna's by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState

from paretofuse.engine.evaluation.growth import next_preference

CHOICES = ("growth", "tpe", "nsga2", "gp", "random")

_SHARE = FloatDistribution(0.0, 1.0)


def parameter(objective: str) -> str:
    """The name of an objective's parameter in a study."""
    return f"preference:{objective}"


def preference_of(params: Mapping[str, float], objectives: Sequence[str]) -> list[float]:
    """A trial's preference: its parameters in proportion; equal shares where all are 0."""
    shares = np.array([params[parameter(name)] for name in objectives], dtype=np.float64)
    whole = shares.sum()
    return list(shares / whole) if whole > 0 else [1 / len(shares)] * len(shares)


def parameters(preference: Sequence[float] | np.ndarray, objectives: Sequence[str]) -> dict[str, float]:
    """The parameters of a preference."""
    return {parameter(name): float(share) for name, share in zip(objectives, preference, strict=True)}


def distributions(objectives: Sequence[str]) -> dict[str, FloatDistribution]:
    """What each parameter is drawn from."""
    return {parameter(name): _SHARE for name in objectives}


def check_choice(choice: Any) -> None:
    """ValueError unless that is one of `CHOICES` or a sampler of Optuna's."""
    if choice not in CHOICES and not isinstance(choice, optuna.samplers.BaseSampler):
        raise ValueError(
            f"got sampler={choice!r}, expected one of {', '.join(CHOICES)}, or a sampler of optuna.samplers"
        )


def make_sampler(
    choice: str | optuna.samplers.BaseSampler,
    objectives: Sequence[str],
    larger: Sequence[bool],
    bounds: np.ndarray,
    ref: Sequence[float] | None,
    seed: int,
) -> optuna.samplers.BaseSampler:
    """The sampler of a search.

    Args:
        choice: one of `CHOICES`, or a sampler of Optuna's, which is taken as it is.
        objectives: the E objectives.
        larger: for each of the M metrics, whether larger is better.
        bounds: [M]: what each metric must reach; infinitely bad where it need not.
        ref: [M]: the hypervolume's reference point, or None.
        seed: of everything random.
    """
    if isinstance(choice, optuna.samplers.BaseSampler):
        return choice
    if choice == "growth":
        return GrowthSampler(objectives, larger, bounds, ref, seed)
    if choice == "tpe":
        return optuna.samplers.TPESampler(seed=seed, multivariate=True)
    if choice == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed)
    if choice == "gp":
        return optuna.samplers.GPSampler(seed=seed)
    return optuna.samplers.RandomSampler(seed=seed)


class GrowthSampler(optuna.samplers.BaseSampler):  # type: ignore[misc]
    """Asks `next_preference`; what other processes are measuring meanwhile counts as measured.

    Args: as `make_sampler`'s.
    """

    def __init__(
        self,
        objectives: Sequence[str],
        larger: Sequence[bool],
        bounds: np.ndarray,
        ref: Sequence[float] | None,
        seed: int,
    ) -> None:
        self._objectives = tuple(objectives)
        self._signs = np.where(larger, 1.0, -1.0)
        self._bounds = bounds * self._signs
        self._ref = None if ref is None else (np.asarray(ref) * self._signs).tolist()
        self._seed = seed

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """The shares of all objectives."""
        return {**distributions(self._objectives)}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The preference to evaluate next, as parameters."""
        trials = study.get_trials(deepcopy=False)
        done = [t for t in trials if t.state == TrialState.COMPLETE]
        # Parameters of another process's newest trial come one by one: it counts when all of them are there.
        drawn = set(distributions(self._objectives))
        others = [
            t
            for t in trials
            if t.state == TrialState.RUNNING and t.params.keys() >= drawn and t.number != trial.number
        ]
        preferences, pending = (
            np.array([preference_of(t.params, self._objectives) for t in part]).reshape(
                -1, len(self._objectives)
            )
            for part in (done, others)
        )
        rng = np.random.default_rng([self._seed, trial.number])
        if not done:
            return parameters(rng.dirichlet(np.ones(len(self._objectives))), self._objectives)
        values = np.array([t.values for t in done], dtype=np.float64) * self._signs
        found = next_preference(preferences, values, pending, bounds=self._bounds, ref=self._ref, rng=rng)
        return parameters(found, self._objectives)

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """A share by chance, of a parameter that is none of the preference's."""
        rng = np.random.default_rng([self._seed, trial.number, len(param_name)])
        assert isinstance(param_distribution, FloatDistribution)
        return float(rng.uniform(param_distribution.low, param_distribution.high))
