"""Rivals that a user would try instead: evolutionary search, losses without labels, whole models that start at experts.

Each costs what ours costs, or what dense scalarization costs, and is told so in its note.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

import paretofuse as pf
from benchmarks.experiments.experiment import Contend, Context, Outcome, one_hot, trainable
from paretofuse.engine.training.batches import Batches

SCALAR_STACK: Mapping[str, Any] = {"route": "tensor", "family": "scalar"}
SCALAR_FIT: Mapping[str, Any] = {"lr": 0.06, "sampler": "low_discrepancy"}
"""Ours with hundreds of numbers, where only the losses or the solver are another's."""

STEPS = 400
"""Of ours, whose cost they may spend."""
POPULATION = 20
PASSES = 3
"""Training batches that a candidate of the search is judged by: as forward and backward passes of a step cost."""
RANGE = (-0.5, 1.5)
"""Of the coefficients that are searched."""

Start = Callable[[Context, np.ndarray], nn.Module]


def from_base(context: Context, preference: np.ndarray) -> nn.Module:
    """The base, whatever the preference."""
    del preference
    return context.models.base()


def from_average(context: Context, preference: np.ndarray) -> nn.Module:
    """The mean of the experts, whatever the preference."""
    del preference
    engine = pf.stack(context.models.base(), context.models.experts())
    return engine.merge(
        weights=torch.full((len(engine.groups), len(engine.objectives)), 1 / len(engine.objectives))
    )


def from_nearest(context: Context, preference: np.ndarray) -> nn.Module:
    """The expert with the largest share of the preference, of equal ones the first."""
    return context.models.expert(context.experiment.names[int(preference.argmax())])


def dense(start: Start) -> Contend:
    """For each of a few preferences a whole model, fine-tuned from a start on the weighted sum of losses.

    With all weight on one objective that is the very expert, which is not trained again.
    """

    def run(context: Context) -> Outcome:
        experiment, size = context.experiment, 0
        models, fresh = [], 0
        with context.meter:
            for preference in experiment.scalarized:
                if preference.max() == 1:
                    models.append(context.models.expert(experiment.names[int(preference.argmax())]))
                    continue
                model = start(context, preference)
                experiment.fine_tune(model, [float(share) for share in preference], context.seed)
                models.append(model)
                size, fresh = trainable(model), fresh + 1
        front = context.front([context.measured(model) for model in models], experiment.scalarized)
        note = f"{len(models)} models; costs are of {fresh}, the others are experts"
        return Outcome(front, "front", parameters=size, note=note)

    return run


def evolved(evaluations: int) -> Contend:
    """NSGA-II (Deb et al., 2002; Optuna's) over a coefficient for each module and expert, from experts and average.

    Each candidate is a merged model, judged by every objective's loss on the same few training batches. Of the front
    that was found, each preference takes the candidate with the least weighted sum of those losses.
    """

    def run(context: Context) -> Outcome:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        experiment, count = context.experiment, len(context.experiment.names)
        with context.meter:
            engine = pf.stack(
                context.models.base(), context.models.experts(), route="module", family="scalar"
            )
            groups = len(engine.groups)
            streams = [Batches(o.data, o.name, context.seed, i) for i, o in enumerate(experiment.objectives)]
            batches = [[stream.take() for _ in range(PASSES)] for stream in streams]

            @torch.no_grad()
            def losses(weights: torch.Tensor) -> list[float]:
                engine.switch(weights=weights)
                return [
                    float(np.mean([float(o.loss(engine.module, batch)) for batch in own]))
                    for o, own in zip(experiment.objectives, batches, strict=True)
                ]

            space: dict[str, optuna.distributions.BaseDistribution] = {
                f"{group}, {name}": optuna.distributions.FloatDistribution(*RANGE)
                for group in engine.groups
                for name in experiment.names
            }
            study = optuna.create_study(
                directions=["minimize"] * count,
                sampler=optuna.samplers.NSGAIISampler(population_size=POPULATION, seed=context.seed),
            )
            for shares in [*(one_hot(count, i) for i in range(count)), [1 / count] * count]:
                study.enqueue_trial(dict(zip(space, shares * groups, strict=True)))
            for _ in range(evaluations):
                trial = study.ask(space)
                study.tell(trial, losses(_weights(trial.params, space, groups)))
        found = study.best_trials
        measured: dict[int, list[float]] = {}
        values = []
        for preference in experiment.preferences:
            best = min(found, key=lambda trial: float(preference @ np.array(trial.values)))
            if best.number not in measured:
                engine.switch(weights=_weights(best.params, space, groups))
                measured[best.number] = context.measured(engine.module)
            values.append(measured[best.number])
        front = context.front(values, experiment.preferences)
        note = f"{evaluations} models judged on {PASSES} batches of each objective; {len(found)} not dominated there"
        return Outcome(front, "front", evaluations, len(space), note)

    return run


def _weights(params: Mapping[str, float], names: Mapping[str, object], groups: int) -> torch.Tensor:
    """A candidate's routing weights [G, P]."""
    return torch.tensor([params[name] for name in names]).view(groups, -1)


def without_labels(steps: int) -> Contend:
    """Routers that learn from entropies of predictions instead of labels (AdaMerging, arXiv 2310.02575)."""

    def run(context: Context) -> Outcome:
        with context.meter:
            engine = pf.stack(context.models.base(), context.models.experts(), **SCALAR_STACK)
            unlabelled = context.experiment.unlabelled
            pf.fit(engine, unlabelled, steps=steps, seed=context.seed, progress=False, **SCALAR_FIT)
        return Outcome(context.sweep(engine), "front", steps, trainable(engine.routers))

    return run
