"""What helps a front to be wide and to follow its preference: one setting changed at a time, on cached experts.

    python -m benchmarks.experiments ablation vision     any experiment; its models are trained if they are not there

Every setting is learned with every seed and compared with the plain one of the same seed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

import paretofuse as pf
from benchmarks.demo import as_text
from benchmarks.experiments import tables
from benchmarks.experiments.contenders import DENSITY, Contender, contenders, learned
from benchmarks.experiments.experiment import Contend, Context, Experiment, Outcome
from benchmarks.experiments.run import Load, Plan, run_contenders
from benchmarks.experiments.tables import Row, shown, spread_of
from paretofuse.engine.training.batches import Batches

PLAIN = "plain"
PLAIN_STACK: Mapping[str, Any] = {"route": "tensor", "family": "scalar"}
PLAIN_FIT: Mapping[str, Any] = {"lr": 0.06, "sampler": "low_discrepancy"}
"""What every setting below changes; written out, so that a change of defaults does not change the question."""
ROWS: Mapping[str, Any] = {"family": "rows"}
COLUMNS: Mapping[str, Any] = {"family": "rows+columns"}


@dataclass(frozen=True)
class Setting:
    """A change of the plain setting: arguments of pf.stack and pf.fit, the run's length, early stopping, planes.

    `merged` is the method of `pf.add_consensus`, whose merge of all experts is one more plane, of no objective.
    `stop`: early stopping by batches that routers learn from ("seen"), or by a tenth of the data that they do not
    ("held"); the experts learned from all of it.
    """

    name: str
    stack: Mapping[str, Any] = field(default_factory=dict)
    fit: Mapping[str, Any] = field(default_factory=dict)
    longer: float = 1.0
    stop: Literal["", "seen", "held"] = ""
    rank: int | None = None
    merged: str | None = None


SETTINGS = (
    Setting(PLAIN),
    Setting("rows", ROWS),
    Setting("rows, row_lr 0.01", ROWS, {"row_lr": 1e-2}),
    Setting("rows, row_lr 0.015", ROWS, {"row_lr": 1.5e-2}),
    Setting("rows, row_lr 0.06", ROWS, {"row_lr": 6e-2}),
    Setting("rows, shrinkage 0.1", ROWS, {"row_shrinkage": 0.1}),
    Setting("rows, shrinkage 1", ROWS, {"row_shrinkage": 1.0}),
    Setting("rank 1", rank=1),
    Setting("rank 4", rank=4),
    Setting("rank 4, plane_lr 0.01", fit={"plane_lr": 1e-2}, rank=4),
    Setting("rank 4, shrinkage 1", fit={"plane_shrinkage": 1.0}, rank=4),
    Setting("rows and rank 4", ROWS, rank=4),
    Setting("rows and rank 4, row_lr 0.06", ROWS, {"row_lr": 6e-2}, rank=4),
    Setting("rows and rank 4, lr_end 0.02", ROWS, {"lr_end": 0.02}, rank=4),
    Setting("rows and rank 4, plane_lr 0.01", ROWS, {"plane_lr": 1e-2}, rank=4),
    Setting("rows and rank 4, shrinkage 1", ROWS, {"row_shrinkage": 1.0, "plane_shrinkage": 1.0}, rank=4),
    Setting("rows and rank 4, orthogonality 1", ROWS, {"plane_orthogonality": 1.0}, rank=4),
    Setting("rows and rank 4, orthogonality 30", ROWS, {"plane_orthogonality": 30.0}, rank=4),
    Setting("rows, corner every 4", ROWS, {"corner_every": 4}),
    Setting("rows and rank 4, corner every 4", ROWS, {"corner_every": 4}, rank=4),
    Setting("rows, 4 preferences a step, a quarter of the steps", ROWS, {"preferences_per_step": 4}, 0.25),
    Setting("rows, stopped by a validation", ROWS, stop="seen"),
    Setting("rows, stopped by a tenth held out", ROWS, stop="held"),
    *(Setting(f"rows, sketch {rank}", ROWS, {"sketch": rank}) for rank in (16, 8, 4)),
    Setting("rows, shrinkage 0.3", ROWS, {"row_shrinkage": 0.3}),
    *(
        Setting(f"rows, {method.partition(':')[0]} plane", ROWS, merged=method)
        for method in (f"ties:density={DENSITY}", f"dare_linear:density={DENSITY}", "tsv", "iso_c", "regmean")
    ),
    Setting("rows+columns", COLUMNS),
    *(
        Setting(f"rows+columns, row_lr {rate:g}", COLUMNS, {"row_lr": rate})
        for rate in (0.0075, 0.01, 0.015, 0.06)
    ),
    Setting("rows+columns, shrinkage 0.3", COLUMNS, {"row_shrinkage": 0.3}),
    Setting("rows+columns and rank 4", COLUMNS, rank=4),
)
"""What is asked: fineness, planes, learning rates, shrinkage, corners, validation, sketches, columns."""

HELD_OUT_BATCHES = 20
"""Of each objective, that early stopping validates with; of what routers learn from, not in their order."""
STOP_EVERY, STOP_PATIENCE = 25, 3


def label(setting: str, budget: int) -> str:
    """A setting's name as a contender; the budget is the plain setting's steps."""
    return f"ablation {setting} @ {budget}"


def listed(experiment: Experiment) -> list[Contender]:
    """The experts (for the spread) and every setting at the experiment's numbers of steps."""
    found = [c for c in contenders(experiment) if c.name.startswith("expert ")]
    for steps in experiment.family_steps:
        for setting in SETTINGS:
            stack, fit = {**PLAIN_STACK, **setting.stack}, {**PLAIN_FIT, **setting.fit}
            taken = max(1, round(steps * setting.longer))
            settings: dict[str, Any] = {"steps": taken, "stack": stack, "fit": fit}
            run = learned(taken, stack, fit, setting.rank, setting.merged)
            if setting.rank is not None:
                settings |= {"rank": setting.rank}
            if setting.merged is not None:
                settings |= {"merged": setting.merged}
            if setting.stop:
                held = ["held"] if setting.stop == "held" else []
                settings |= {"stop": [HELD_OUT_BATCHES, STOP_EVERY, STOP_PATIENCE, *held]}
                run = stopping(taken, stack, fit, setting.stop)
            # Short runs first: they are the first to say something.
            found.append(Contender(label(setting.name, steps), run, 1 / steps, settings))
    return found


def stopping(
    steps: int, stack: Mapping[str, Any], fit: Mapping[str, Any], by: Literal["seen", "held"]
) -> Contend:
    """As `learned`, but the routers that validated best are kept, and training ends when they stay the best."""

    def run(context: Context) -> Outcome:
        objectives = judges = context.experiment.objectives
        if by == "held":
            objectives, judges = (
                tuple(replace(o, data=o.data.tenth(held)) for o in objectives)  # type: ignore[attr-defined]
                for held in (False, True)
            )
            context = replace(context, experiment=replace(context.experiment, objectives=objectives))
        batches = []
        for index, objective in enumerate(judges):
            stream = Batches(objective.data, objective.name, context.seed + 1000, index)
            batches.append([stream.take() for _ in range(HELD_OUT_BATCHES)])

        def losses(module: nn.Module) -> dict[str, float]:
            return {
                objective.name: statistics.mean(float(objective.loss(module, batch)) for batch in own)
                for objective, own in zip(judges, batches, strict=True)
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
