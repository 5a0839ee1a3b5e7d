"""Who contends in every experiment: single merged models, fronts, PWEMoE, dense scalarization, and ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from peft.utils import merge_utils
from torch import Tensor, nn

import paretofuse as pf
from benchmarks.experiments import rivals
from benchmarks.experiments.experiment import Contend, Context, Experiment, Outcome, trainable
from benchmarks.models import pwemoe
from paretofuse.engine.training.consensus import reads_data

OURS_STACK: Mapping[str, Any] = {"route": "tensor"}
"""Arguments of pf.stack for ours, the same in every experiment."""
OURS_FIT: Mapping[str, Any] = {"family": "rows", "row_lr": 0.03, "lr": 0.06, "sampler": "low_discrepancy"}
"""The same of pf.fit: its defaults, written out, so that a result belongs to them."""
FAMILIES: Mapping[str, tuple[Mapping[str, Any], int | None]] = {
    "scalar": ({**rivals.SCALAR_FIT, "family": "scalar"}, None),
    "rows shrunk": ({**OURS_FIT, "row_shrinkage": 0.3}, None),
    "rows and rank 4": ({**OURS_FIT, "plane_lr": 0.003}, 4),
    "rows+columns": ({**OURS_FIT, "family": "rows+columns"}, None),
}
"""The other families by name: arguments of pf.fit, and the rank of trained planes."""
SEVERAL = 4
"""Preferences in one step of the second of our short runs, which so costs as much as that many of the first."""

DENSITY = 0.2
"""Share of each difference that TIES keeps, and that DARE keeps and rescales: TIES's own."""
COEFFICIENTS = tuple(round(0.1 * i, 1) for i in range(1, 11))
"""Tried by every merge that has one; the best is chosen on the test data, in that merge's favour."""


@dataclass(frozen=True)
class Contender:
    """One contender.

    Attributes:
        name: in tables and file names.
        run: does it all; what learning costs is measured by the context's meter.
        cost: roughly how long it takes beside the others; the longest begin first.
        settings: what the result depends on besides the experiment; other settings are measured anew.
        every_seed: False: too slow for that; it is run for seed 0 alone.
    """

    name: str
    run: Contend
    cost: float = 1.0
    settings: Mapping[str, Any] = field(default_factory=dict)
    every_seed: bool = True


def contenders(experiment: Experiment) -> list[Contender]:
    """All of an experiment's contenders, in the table's order."""
    found = [Contender("base", lambda context: context.single(context.models.base()))]
    found += [Contender(name, run) for name, run in experiment.more.items()]
    found += [Contender(f"expert {name}", _expert(name)) for name in experiment.names]
    tried = {"coefficients": COEFFICIENTS}
    found += [
        Contender("plain average", plain_average),
        Contender("task arithmetic", task_arithmetic, 1.5, tried),
        Contender("TIES", _pruned(_ties), 1.5, {**tried, "density": DENSITY}),
        Contender("DARE", _pruned(_dare), 1.5, {**tried, "density": DENSITY}),
        *(
            Contender(name, _merged(method), 1.5, {**tried, "method": method})
            for name, method in (("TSV", "tsv"), ("Iso-C", "iso_c"), ("RegMean", "regmean"))
        ),
        Contender("rewarded soups", rewarded_soups, 1.5),
    ]
    for method, mode, start in product(("ls", "epo"), experiment.pwemoe_routes, pwemoe.STARTS):
        name = f"PWEMoE-{method.upper()} {mode} {start:g}"
        settings = {"steps": experiment.pwemoe_steps, "start": start}
        found.append(Contender(name, _pwemoe(method, mode, start), 30.0, settings))
    found += [
        Contender("dense scalarization", rivals.dense(rivals.from_base), 20.0),
        Contender("dense, from the average", rivals.dense(rivals.from_average), 20.0),
        Contender("dense, from the nearest expert", rivals.dense(rivals.from_nearest), 20.0),
    ]
    found += _at_our_cost(experiment)
    for steps, family in product(experiment.family_steps, FAMILIES):
        found.append(_ours(steps, family))
    longest = max(experiment.ours_steps)
    if longest > max(experiment.family_steps):
        found.append(_ours(longest, "rows and rank 4"))
    found.append(_ours(min(experiment.family_steps), several=SEVERAL))
    found += [_ours(steps) for steps in experiment.ours_steps]
    return [replace(c, every_seed=not c.name.startswith(experiment.first_seed_only)) for c in found]


def _at_our_cost(experiment: Experiment) -> list[Contender]:
    """Other solvers, losses and searches for as many steps as ours of hundreds of numbers."""
    steps = min(rivals.STEPS, max(experiment.ours_steps))
    stack, fit = dict(rivals.SCALAR_STACK), dict(rivals.SCALAR_FIT)
    descent = {**fit, "method": "mgda"}
    candidates = {"evaluations": steps, "population": rivals.POPULATION, "passes": rivals.PASSES}
    learning = {"steps": steps, "stack": stack}
    found = [
        Contender("MGDA", learned(steps, stack, descent), steps / 75, {**learning, "fit": descent}),
        Contender("NSGA-II", rivals.evolved(steps), steps / 75, candidates),
    ]
    if experiment.unlabelled:
        run = rivals.without_labels(steps)
        found.append(Contender("entropy, no labels", run, steps / 75, {**learning, "fit": fit}))
    return found


def _ours(steps: int, family: str | None = None, several: int = 1) -> Contender:
    """Ours with pf.fit's own settings, or those of a family."""
    fit, rank = FAMILIES[family] if family else (OURS_FIT, None)
    fit = dict(fit) if several == 1 else {**fit, "preferences_per_step": several}
    settings = {"steps": steps, "stack": dict(OURS_STACK), "fit": fit, "rank": rank}
    name = f"ours{f' ({family})' if family else ''}, {steps} steps"
    name += f" of {several} preferences" if several > 1 else ""
    return Contender(name, learned(steps, OURS_STACK, fit, rank), steps * several / 75, settings)


def learned(
    steps: int,
    stack: Mapping[str, Any],
    fit: Mapping[str, Any],
    rank: int | None = None,
    merged: str | None = None,
) -> Contend:
    """Ours with some settings: arguments of pf.stack and of pf.fit, the rank of trained planes, a consensus plane."""

    def run(context: Context) -> Outcome:
        with context.meter:
            engine = pf.stack(context.models.base(), context.models.experts(), **stack)
            if merged is not None:
                add_consensus(context, engine, merged)
            if rank is not None:
                pf.add_planes(engine, rank)
            objectives = context.experiment.objectives
            pf.fit(engine, objectives, steps=steps, seed=context.seed, progress=False, **fit)
        return Outcome(context.sweep(engine), "front", steps, trainable(engine.routers))

    return run


def add_consensus(context: Context, engine: pf.Engine, method: str) -> None:
    """Give an engine the plane that a method makes of the experts, from the experiment's data if it reads any."""
    objectives = context.experiment.objectives if reads_data(method) else None
    pf.add_consensus(engine, method, objectives=objectives)


def plain_average(context: Context) -> Outcome:
    """The mean of the experts."""
    engine = pf.stack(context.models.base(), context.models.experts())
    return context.single(engine.merge(weights=_uniform(engine, 1 / len(engine.objectives))))


def task_arithmetic(context: Context) -> Outcome:
    """Base + c * (sum of deltas), the best c."""
    engine = pf.stack(context.models.base(), context.models.experts())
    return _best_coefficient(context, lambda c: engine.merge(weights=_uniform(engine, c)))


def _merged(method: str) -> Contend:
    """A method's merge of all experts, tensor by tensor, at the best coefficient."""

    def run(context: Context) -> Outcome:
        engine = pf.stack(context.models.base(), context.models.experts())
        add_consensus(context, engine, method)
        weights = torch.zeros(len(engine.groups), len(engine.experts))
        weights[:, -1] = 1
        return _best_coefficient(context, lambda c: engine.merge(weights=c * weights))

    return run


def rewarded_soups(context: Context) -> Outcome:
    """Every tensor at L = r: base + sum_e r_e * delta_e, nothing learned (Rame et al., arXiv 2306.04488)."""
    engine = pf.stack(context.models.base(), context.models.experts(), init="identity")
    return Outcome(context.sweep(engine), "front")


def _expert(name: str) -> Contend:
    return lambda context: context.single(context.models.expert(name))


def _pwemoe(method: str, mode: str, start: float) -> Contend:
    def run(context: Context) -> Outcome:
        experiment, steps = context.experiment, context.experiment.pwemoe_steps
        with context.meter:
            engine = pwemoe.learn_routed(
                context.models.base(),
                context.models.experts(),
                experiment.objectives,
                experiment.pwemoe_routes[mode],
                method=method,
                start=start,
                steps=steps,
                seed=context.seed,
                progress=False,
            )
        return Outcome(context.sweep(engine), "front", steps, trainable(engine.routers))

    return run


Merge = Callable[[list[Tensor], Tensor], Tensor]


def _ties(deltas: list[Tensor], weights: Tensor) -> Tensor:
    merged: Tensor = merge_utils.ties(deltas, weights, DENSITY)
    return merged


def _dare(deltas: list[Tensor], weights: Tensor) -> Tensor:
    merged: Tensor = merge_utils.dare_linear(deltas, weights, DENSITY)
    return merged


def _pruned(merge: Merge) -> Contend:
    """A merge of PEFT's over each whole delta as one vector, as TIES trims it; the best coefficient."""

    def run(context: Context) -> Outcome:
        model, experts = context.models.base(), list(context.models.experts().values())
        base = nn.utils.parameters_to_vector(model.parameters()).detach()
        deltas = [nn.utils.parameters_to_vector(e.parameters()).detach() - base for e in experts]

        def merged(coefficient: float) -> nn.Module:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(context.seed)
                delta = merge([d.clone() for d in deltas], torch.full((len(deltas),), coefficient))
            with torch.no_grad():
                nn.utils.vector_to_parameters(base + delta, model.parameters())
            return model

        return _best_coefficient(context, merged)

    return run


def _best_coefficient(context: Context, merged: Callable[[float], nn.Module]) -> Outcome:
    experiment = context.experiment
    tried = {c: context.measured(merged(c)) for c in COEFFICIENTS}

    def volume(values: list[float]) -> float:
        sides = (np.array(values) - experiment.reference) * (1 if experiment.maximize else -1)
        return float(np.prod(np.maximum(sides, 0)))

    best = max(tried, key=lambda c: volume(tried[c]))
    return Outcome(context.front([tried[best]]), "model", note=f"best of {len(tried)} coefficients: {best:g}")


def _uniform(engine: pf.Engine, weight: float) -> Tensor:
    return torch.full((len(engine.groups), len(engine.objectives)), weight)
