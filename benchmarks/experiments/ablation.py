"""What helps a front to be wide and to follow its preference: one setting changed at a time, on cached experts.

    python -m benchmarks.experiments ablation vision     any experiment; its models are trained if they are not there

Every setting is learned with every seed and compared with the plain one of the same seed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

import paretofuse as pf
from benchmarks.demo import as_text
from benchmarks.experiments import tables
from benchmarks.experiments.contenders import OURS_FIT, OURS_STACK, Contender, contenders, learned
from benchmarks.experiments.experiment import Contend, Context, Experiment, Outcome
from benchmarks.experiments.run import Load, Plan, run_contenders
from benchmarks.experiments.tables import Row, shown, spread_of
from paretofuse.engine.training.batches import Batches

PLAIN = "plain"
PLAIN_STACK: Mapping[str, Any] = {"route": "module", "init": "identity"}
PLAIN_FIT: Mapping[str, Any] = {
    "sampler": "dirichlet", "alpha": 1.0, "corner_every": 0, "preferences_per_step": 1, "lr": 1e-2,
}  # fmt: skip
"""What every setting below changes; written out, so that a change of defaults does not change the question."""


@dataclass(frozen=True)
class Setting:
    """A change of the plain setting: arguments of pf.stack and pf.fit, the run's length, early stopping, planes."""

    name: str
    stack: Mapping[str, Any] = field(default_factory=dict)
    fit: Mapping[str, Any] = field(default_factory=dict)
    longer: float = 1.0
    stop: bool = False
    rank: int | None = None


SETTINGS = (
    Setting(PLAIN),
    Setting("route tensor", {"route": "tensor"}),
    Setting("init sqrt", {"init": "sqrt"}),
    Setting("init constant", {"init": "constant"}),
    Setting("sampler low_discrepancy", fit={"sampler": "low_discrepancy"}),
    Setting("alpha 0.5", fit={"alpha": 0.5}),
    Setting("corner every 4", fit={"corner_every": 4}),
    Setting("2 preferences a step, half the steps", fit={"preferences_per_step": 2}, longer=0.5),
    Setting("lr 0.003", fit={"lr": 3e-3}),
    Setting("lr 0.03", fit={"lr": 3e-2}),
    Setting("method epo", fit={"method": "epo"}),
    Setting("method stch", fit={"method": "stch"}),
    Setting("method cosmos", fit={"method": "cosmos"}),
    Setting("tensor, lr 0.03", {"route": "tensor"}, {"lr": 3e-2}),
    Setting("tensor, lr 0.1", {"route": "tensor"}, {"lr": 1e-1}),
    Setting("tensor, sqrt, lr 0.03", {"route": "tensor", "init": "sqrt"}, {"lr": 3e-2}),
    Setting("tensor, low_discrepancy", {"route": "tensor"}, {"sampler": "low_discrepancy"}),
    Setting(
        "tensor, lr 0.03, low_discrepancy", {"route": "tensor"}, {"lr": 3e-2, "sampler": "low_discrepancy"}
    ),
    Setting(
        "tensor, lr 0.06, low_discrepancy", {"route": "tensor"}, {"lr": 6e-2, "sampler": "low_discrepancy"}
    ),
    Setting(
        "tensor, lr 0.1, low_discrepancy", {"route": "tensor"}, {"lr": 1e-1, "sampler": "low_discrepancy"}
    ),
    Setting(
        "tensor, lr 0.2, low_discrepancy", {"route": "tensor"}, {"lr": 2e-1, "sampler": "low_discrepancy"}
    ),
    Setting(
        "tensor, lr 0.06, low_discrepancy, 2 preferences a step (twice the cost)",
        {"route": "tensor"},
        {"lr": 6e-2, "sampler": "low_discrepancy", "preferences_per_step": 2},
    ),
    Setting("regularization 0.01", fit={"regularization": 1e-2}),
    Setting("regularization 0.1", fit={"regularization": 1e-1}),
    Setting("early stop", stop=True),
    Setting("ours", OURS_STACK, OURS_FIT),
    Setting("ours, module", {}, OURS_FIT),
    Setting("ours, dirichlet", OURS_STACK, {**OURS_FIT, "sampler": "dirichlet"}),
    Setting("ours, sqrt", {**OURS_STACK, "init": "sqrt"}, OURS_FIT),
    Setting("ours, corner every 4", OURS_STACK, {**OURS_FIT, "corner_every": 4}),
    Setting("ours, regularization 0.1", OURS_STACK, {**OURS_FIT, "regularization": 1e-1}),
    Setting("ours, early stop", OURS_STACK, OURS_FIT, stop=True),
    Setting("ours, rows", {**OURS_STACK, "family": "rows"}, OURS_FIT),
    Setting("ours, rank 4", OURS_STACK, OURS_FIT, rank=4),
    Setting("ours, rows and rank 4", {**OURS_STACK, "family": "rows"}, OURS_FIT, rank=4),
    Setting("ours, epo", OURS_STACK, {**OURS_FIT, "method": "epo"}),
    Setting(
        "ours, 4 preferences a step, a quarter of the steps",
        OURS_STACK,
        {**OURS_FIT, "preferences_per_step": 4},
        0.25,
    ),
    Setting(
        "ours, 4 preferences a step (four times the cost)",
        OURS_STACK,
        {**OURS_FIT, "preferences_per_step": 4},
    ),
)

HELD_OUT_BATCHES = 20
"""Of each objective, that early stopping validates with: drawn from what routers learn from, but not in their order."""
STOP_EVERY, STOP_PATIENCE = 25, 3


def label(setting: str, budget: int) -> str:
    """A setting's name as a contender; the budget is the plain setting's steps."""
    return f"ablation {setting} @ {budget}"


def listed(experiment: Experiment) -> list[Contender]:
    """The experts (for the spread) and every setting at the experiment's numbers of steps."""
    found = [c for c in contenders(experiment) if c.name.startswith("expert ")]
    for steps in experiment.ours_steps:
        for setting in SETTINGS:
            stack, fit = {**PLAIN_STACK, **setting.stack}, {**PLAIN_FIT, **setting.fit}
            taken = max(1, round(steps * setting.longer))
            settings: dict[str, Any] = {"steps": taken, "stack": stack, "fit": fit}
            run = learned(taken, stack, fit, setting.rank)
            if setting.rank is not None:
                settings |= {"rank": setting.rank}
            if setting.stop:
                settings |= {"stop": [HELD_OUT_BATCHES, STOP_EVERY, STOP_PATIENCE]}
                run = stopping(taken, stack, fit)
            # Short runs first: they are the first to say something.
            found.append(Contender(label(setting.name, steps), run, 1 / steps, settings))
    return found


def stopping(steps: int, stack: Mapping[str, Any], fit: Mapping[str, Any]) -> Contend:
    """As `learned`, but the routers that validated best are kept, and training ends when they stay the best."""

    def run(context: Context) -> Outcome:
        objectives = context.experiment.objectives
        batches = []
        for index, objective in enumerate(objectives):
            stream = Batches(objective.data, objective.name, context.seed + 1000, index)
            batches.append([stream.take() for _ in range(HELD_OUT_BATCHES)])

        def losses(module: nn.Module) -> dict[str, float]:
            return {
                objective.name: statistics.mean(float(objective.loss(module, batch)) for batch in own)
                for objective, own in zip(objectives, batches, strict=True)
            }

        watched = {
            **fit,
            "validation": pf.Validation(losses, maximize=False, every=STOP_EVERY, patience=STOP_PATIENCE),
        }
        return learned(steps, stack, watched)(context)

    return run


def run(load: Load, plan: Plan, out: Path, say: Callable[[str], None] = print) -> list[Row]:
    """Learn every setting (or those named by `plan.only`), write ablation_NAME.csv and return its rows."""
    experiment = load(plan.quick)
    chosen = [
        c for c in listed(experiment)
        if not plan.only or c.name.startswith("expert ") or any(only in c.name for only in plan.only)
    ]  # fmt: skip
    results = run_contenders(experiment, load, chosen, plan, say, find=f"{__name__}:listed")
    rows = [row for row in tables.measure(experiment, results) if row.kind == "front"]
    tables.write_rows(rows, out / f"ablation_{experiment.name}.csv")
    return rows


def table(rows: Sequence[Row]) -> str:
    """Markdown: each setting beside the plain one at the same steps; differences are seed by seed."""
    heading = [
        "setting",
        "steps",
        "hypervolume",
        "change",
        "better seeds",
        "non-dominated",
        "follows",
        "CPU s",
    ]
    lines = [heading]
    for name in dict.fromkeys(row.contender for row in rows):
        group = {row.seed: row for row in rows if row.contender == name}
        changes = differences(rows, name)
        lines.append(
            [
                name.removeprefix("ablation ").split(" @ ")[0],
                str(next(iter(group.values())).steps),
                spread_of([row.hypervolume for row in group.values()]),
                "" if not changes else shown(statistics.mean(changes), "+"),
                "" if not changes else f"{sum(c > 0 for c in changes)} of {len(changes)}",
                spread_of([row.non_dominated or 0.0 for row in group.values()], 2),
                spread_of([row.follows or 0.0 for row in group.values()], 2),
                spread_of([row.cpu_s or 0.0 for row in group.values()], 1),
            ]
        )
    return as_text(lines)


def differences(rows: Sequence[Row], name: str) -> list[float]:
    """Hypervolume less that of the plain setting of the same seed and budget; empty for the plain one itself."""
    against = label(PLAIN, int(name.rpartition(" @ ")[2]))
    plain = {row.seed: row.hypervolume for row in rows if row.contender == against}
    if name == against:
        return []
    return [r.hypervolume - plain[r.seed] for r in rows if r.contender == name and r.seed in plain]
