"""docs/experiments.md and its pictures, from the CSV files in benchmarks/data alone: nothing is measured here."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.experiments import ablation, plots
from benchmarks.experiments.plots import Fronts, chosen, mean, numbers_of, runs_of_ours
from benchmarks.experiments.tables import Row, markdown, read, read_points, shown, spread_of

ORDER = ("vision", "vision3", "text", "language", "openclip")
"""Sections first; others follow by name."""

INTRODUCTION = """# Experiments

Real tasks, small models, every baseline beside ours. This page is written by `python -m benchmarks.experiments report`
from the CSV files in `benchmarks/data`; each experiment is one command, which trains and measures everything anew or
goes on where it was stopped.

- *Hypervolume* is of the metrics on held-out data, from the reference point named below; a single model has one too.
- *non-dominated*: share of swept preferences that no other dominates; one whose model is no other than an earlier
  one's does not count. *follows*: Spearman's correlation between preference and metric, the lowest over objectives.
  *spread*: extent of the front, as a share of the distance between the experts. *spacing*: Schott's, in metric units.
- *trained numbers*: router parameters; for whole models those of one model. *learning s*: wall seconds; *peak MB*:
  memory in use during learning above what libraries and data hold. Every contender has a process of its own.
- PWEMoE is its procedure as its own scripts run it (4000 steps of Adam at 1e-2, a constant start at 0.3 or 0.6, the
  number in its name; Dirichlet(1) preferences) on this engine's arithmetic: its seconds are this engine's, not its own
  code's. *mlp* routes the MLPs and merges the rest, a shared head too, at that constant; *module* routes every module,
  which is kinder than their own.
- Task arithmetic, TIES and DARE (PEFT's, density 0.2), TSV, Iso-C and RegMean (`pf.add_consensus`, RegMean from eight
  training batches of each objective) take the best of ten coefficients, chosen on the test data in their favour.
  *Dense scalarization* fine-tunes a whole model from the base for each of a few preferences: it does not share the
  experts, and is the bound to look at rather than a rival. *dense, from ...* does the same for as many steps from the
  experts' average, or from the expert with the largest share.
- *MGDA* is our scalar family for 400 steps with the multiple-gradient solver, which looks at no preference in its
  steps. *entropy, no labels* trains the same family on the entropies of predictions (`pf.entropy_loss`, after
  AdaMerging). *NSGA-II* is Optuna's, population 20, over one coefficient for each module and expert: 400 candidates,
  each judged on three training batches of each objective, as many forward passes as 400 steps forward and backward
  are worth; each preference takes the candidate with the least weighted sum of those losses.
- Ours, in every experiment: `route="tensor"` and the defaults of `pf.fit`: `family="rows"`, `row_lr=0.03`, `lr=0.06`,
  low-discrepancy preferences, linear scalarization. *ours (scalar)* is `family="scalar"`, hundreds of numbers; *ours
  (rows shrunk)* is ours with `row_shrinkage=0.3`; *ours (rows and rank 4)* is ours with `pf.add_planes(engine, 4)`, at
  its own rate `plane_lr=0.003`. Route, sampler and `lr` were chosen earlier by an ablation on *vision* that looked at
  its test images and seeds, so that its numbers are a little in our favour; the families, their rates and the shrinkage
  with other seeds, on a part of the training data that nothing learns from (`ablation vision --tune`).
  The run of *4 preferences* takes each step on four preferences (`preferences_per_step=4`), which costs what four
  steps of one do. It was chosen of 1, 2 and 4 on *language*, with its own seeds and test data, after one preference a
  step had fallen short there; so was that experiment's reference point, after a narrower one, given below its table,
  had turned out to hold no expert.
- Numbers are mean ± standard deviation over seeds; each seed has a base and experts of its own.
"""


def write(data: Path, docs: Path) -> Path:
    """Write the page and its pictures, and return the page's path.

    Raises:
        FileNotFoundError: there is no experiment's CSV file in `data`.
    """
    names = [
        p.stem.removeprefix("experiment_").removesuffix("_points")
        for p in data.glob("experiment_*_points.csv")
    ]
    names.sort(key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))
    if not names:
        raise FileNotFoundError(f"{data} holds no experiment_*.csv; run an experiment first")
    parts = [INTRODUCTION]
    parts += [section(name, data, docs) for name in names]
    ablations = [name for name in names if (data / f"ablation_{name}.csv").exists()]
    if ablations:
        parts.append(ABLATION_INTRODUCTION)
        parts += [ablation_section(name, data, docs) for name in ablations]
    page = docs / "experiments.md"
    page.write_text("\n".join(parts), encoding="utf-8")
    return page


def section(name: str, data: Path, docs: Path) -> str:
    """One experiment: what it is, picture, table, targets."""
    about = _about(data / f"experiment_{name}_about.csv")
    rows = read(data / f"experiment_{name}.csv")
    fronts = read_points(data / f"experiment_{name}_points.csv")
    title, metric = about["title"][0], about["metric"][0]
    picture = docs / f"experiment-{name}.png"
    plots.picture(fronts, rows, metric, title, picture)
    objectives = next(iter(next(iter(fronts.values())).values())).objectives
    seeds = sorted({row.seed for row in rows})
    machines = "; ".join(
        sorted({f"{row.cpu}, {row.threads} thread(s) a process, torch {row.torch}" for row in rows})
    )
    lines = [
        f"\n## {name}: {title}\n",
        f"    python -m benchmarks.experiments {name} --seeds {' '.join(map(str, seeds))}\n",
        *(f"{note}\n" for note in about.get("note", [])),
        f"Metric: {metric} ({', '.join(objectives)}, in this order in the columns). Reference point: "
        f"{about['reference'][0]}. Seeds: {', '.join(map(str, seeds))}. Measured on {machines}.\n",
        f"![Fronts and hypervolumes of {name}]({picture.name})\n",
        markdown(rows),
        "",
        *(f"- {target}" for target in targets(rows)),
        *ends(fronts),
        *experts_bound(fronts, rows, [float(value) for value in about["reference"][0].split(", ")]),
        *near_base(fronts, rows),
        "",
    ]
    return "\n".join(lines)


def near_base(fronts: Fronts, rows: Sequence[Row]) -> list[str]:
    """Where less is better: hypervolumes within 1.1 times the base's metrics, a reference that rewards the middle."""
    base = fronts.get("base")
    if base is None or np.any(next(iter(base.values())).maximize):
        return []
    corner = 1.1 * np.mean([front.values[0] for front in base.values()], axis=0)
    volumes = {
        name: statistics.mean(front.hypervolume(corner) for front in fronts[name].values())
        for name in chosen(rows)
    }
    ranked = sorted(volumes.items(), key=lambda item: -item[1])
    where = ", ".join(f"{value:.1f}" for value in corner)
    said = ", ".join(f"{name} {value:.4g}" for name, value in ranked)
    return [
        f"- Hypervolume below 1.1 times the base's metrics alone ({where}), where no expert lies: {said}."
    ]


def targets(rows: Sequence[Row]) -> list[str]:
    """What was to be reached, and whether it was."""
    names = list(dict.fromkeys(row.contender for row in rows))
    ours = runs_of_ours(names)
    if not ours or not any(name.startswith("PWEMoE") for name in names):
        return ["Not judged: PWEMoE or ours was not among the contenders of this run."]
    shared = [name for name in names if not name.startswith(("ours", "dense"))]
    theirs = [name for name in names if name.startswith("PWEMoE")]
    trained = [name for name in names if name.startswith("dense")]
    said = []
    for name in [n for n in ours if "preferences" in n or "rank" in n or n in ours[-2:]]:
        said.append(
            "Hypervolume above every baseline that shares the experts: "
            + _compared(rows, name, _hardest(rows, name, shared))
        )
        if trained:
            said.append(
                "Hypervolume above models that are fine-tuned for each preference: "
                + _compared(rows, name, _hardest(rows, name, trained))
            )
    for name in ours:
        rival = _hardest(rows, name, theirs)
        passes = math.prod(numbers_of(name))
        if passes * 10 <= next(row.steps or 0 for row in rows if row.contender == rival):
            said.append(
                f"PWEMoE's final value in at most 1/10 of its passes: {_compared(rows, name, rival, equal=True)}"
            )
    for name in ours:
        shares = [row.non_dominated or 0.0 for row in rows if row.contender == name]
        said.append(
            f"Share of non-dominated preferences at least 0.9, {name}: {_verdict(statistics.mean(shares) >= 0.9)} "
            f"({spread_of(shares, 2)})."
        )
    return said


def experts_bound(fronts: Fronts, rows: Sequence[Row], reference: Sequence[float]) -> list[str]:
    """What a single model would span that is as good as each expert at its own task, and which of ours span more."""
    names = [name for name in fronts if name.startswith("expert ")]
    ours = runs_of_ours(list(fronts))
    if not names or not ours:
        return []
    volumes = {}
    for seed in fronts[names[0]]:
        own = [float(fronts[name][seed].values[0, index]) for index, name in enumerate(names)]
        volumes[seed] = float(np.prod(np.abs(np.array(own) - reference)))
    above = [name for name in ours if mean(rows, name) > statistics.mean(volumes.values())]
    return [
        "- Were one model as good as each expert at its own task, it would span "
        f"{spread_of(list(volumes.values()))}: what the experts know without what their tasks share. "
        f"Above it: {'; '.join(above) or 'none of ours'}."
    ]


def ends(fronts: Fronts) -> list[str]:
    """How far, with all weight on one objective, each of our fronts is below that objective's expert, in words."""
    said = []
    for name in runs_of_ours(list(fronts)):
        worst: list[float] = []
        for index, objective in enumerate(next(iter(fronts[name].values())).objectives):
            gaps = []
            for seed, front in fronts[name].items():
                expert = fronts.get(f"expert {objective}", {}).get(seed)
                corner = np.flatnonzero(front.preferences[:, index] == 1)
                if expert is None or not len(corner):
                    return []
                sign = 1 if front.directions[0] else -1
                gaps.append(sign * float(front.values[corner[0], index] - expert.values[0, index]))
            worst.append(statistics.mean(gaps))
        said.append(f"{name}: {' / '.join(f'{gap:+.3f}' for gap in worst)}")
    return [f"- At the ends, better (+) or worse (-) than the expert: {'; '.join(said)}."] if said else []


ABLATION_INTRODUCTION = """
## What helped, what did not

One setting changed at a time, on the same base and experts; *plain* is `route="module"`, `init="identity"`, one
Dirichlet(1)
preference a step, Adam at 1e-2, linear scalarization. *change* is the mean over seeds of the difference in
hypervolume to plain with the same seed and the same budget of backward passes. Written from `ablation_*.csv`, which
`python -m benchmarks.experiments ablation NAME` makes. Settings named `module`, `tensor` or `ours` are of an older
list that was judged by test data, with seeds 0 1 2; settings are now chosen with `--tune` and seeds 100 101 102, on a
part of the training data that neither base nor experts nor routers learn from. The samplers "antithetic" and
"stratified" were those of version 0.1.0; they did not help, and later versions do without.
"""


def ablation_section(name: str, data: Path, docs: Path) -> str:
    """One experiment's ablation: for each budget a picture, a table and a sentence."""
    rows = read(data / f"ablation_{name}.csv")
    lines = []
    for budget in sorted({int(row.contender.rpartition(" @ ")[2]) for row in rows}):
        part = [row for row in rows if row.contender.endswith(f" @ {budget}")]
        settings = list(dict.fromkeys(row.contender for row in part))
        changes = {s: ablation.differences(part, s) for s in settings}
        named = {
            s.removeprefix("ablation ").rpartition(" @ ")[0]: change
            for s, change in changes.items()
            if change
        }
        if not named:  # nothing to compare with: the plain setting was not run for so long
            lines += [f"\n### {name}, {budget} steps\n", ablation.table(part), ""]
            continue
        picture = docs / f"ablation-{name}-{budget}.png"
        plots.ablation(named, f"{name}, {budget} steps: each setting against the plain one", picture)
        lines += [
            f"\n### {name}, {budget} steps\n",
            f"![Change of hypervolume by setting]({picture.name})\n",
            ablation.table(part),
            "",
            *verdicts(named),
        ]
    return "\n".join(lines)


def verdicts(changes: dict[str, list[float]]) -> list[str]:
    """Which settings helped with every seed, which harmed with every seed, and which did neither."""
    groups: dict[str, list[str]] = {"Helped": [], "Did not help": [], "Harmed": []}
    for name, values in sorted(changes.items(), key=lambda item: -statistics.mean(item[1])):
        every = "Helped" if min(values) > 0 else "Harmed" if max(values) < 0 else "Did not help"
        groups[every].append(f"{name} ({shown(statistics.mean(values), '+')})")
    when = {"Helped": "with every seed", "Did not help": "consistently", "Harmed": "with every seed"}
    return [f"- {word} {when[word]}: {', '.join(found) or 'none'}." for word, found in groups.items()]


def _verdict(met: bool) -> str:
    return "met" if met else "**missed**"


def _by_seed(rows: Sequence[Row], name: str) -> dict[int, float]:
    return {row.seed: row.hypervolume for row in rows if row.contender == name}


def _hardest(rows: Sequence[Row], ours: str, theirs: Sequence[str]) -> str:
    """The contender that ours is least ahead of, over the seeds that both were run with."""
    mine = _by_seed(rows, ours)

    def ahead(name: str) -> float:
        shared = [mine[seed] - value for seed, value in _by_seed(rows, name).items() if seed in mine]
        return statistics.mean(shared) if shared else math.inf

    return min(theirs, key=ahead)


def _compared(rows: Sequence[Row], ours: str, theirs: str, *, equal: bool = False) -> str:
    """Whether ours is above (or equal to) theirs by the mean over the seeds of both, with both means."""
    mine, found = _by_seed(rows, ours), _by_seed(rows, theirs)
    shared = mine.keys() & found.keys()
    if not shared:
        return f"not judged; {ours} and {theirs} share no seed."
    means = statistics.mean(mine[seed] for seed in shared), statistics.mean(found[seed] for seed in shared)
    met = means[0] >= means[1] if equal else means[0] > means[1]
    ahead = sum(mine[seed] > found[seed] for seed in shared)
    return (
        f"{_verdict(met)}; {ours}: {shown(means[0])}, {theirs}: {shown(means[1])} "
        f"(ahead with {ahead} of {len(shared)} seeds)."
    )


def _about(path: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    with open(path, encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            found.setdefault(line["what"], []).append(line["text"])
    return found
