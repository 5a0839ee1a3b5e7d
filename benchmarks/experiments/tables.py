"""From results to measures, CSV files and a Markdown table. Reads nothing but results and CSV files."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

import paretofuse as pf
from benchmarks.demo import as_text
from benchmarks.experiments.experiment import Experiment
from benchmarks.experiments.run import Result

Number = float | None


@dataclass(frozen=True)
class Row:
    """One contender of one seed.

    Attributes:
        kind: "model" or "front".
        hypervolume: from the experiment's reference point.
        best: the best value of each objective, "NAME=value" joined by blanks.
        middle: metrics at the equal preference (of a single model: its own), joined alike; empty where not swept.
        non_dominated: share of preferences that no other dominates, a repeated point counted once.
        follows: Spearman's correlation of preference and metric, the lowest over objectives.
        spacing: Schott's, in the metric's unit.
        spread: as a share of the distance between the experts.
        steps, parameters, wall_s, cpu_s, peak_mb: of learning; peak is memory above libraries and data.
        note: such as the coefficient that was chosen.
    """

    experiment: str
    contender: str
    seed: int
    kind: str
    hypervolume: float
    best: str
    middle: str
    non_dominated: Number
    follows: Number
    spacing: Number
    spread: Number
    steps: int | None
    parameters: int | None
    wall_s: Number
    cpu_s: Number
    peak_mb: Number
    note: str
    cpu: str
    threads: int
    torch: str
    commit: str


def front_of(experiment: Experiment, result: Result) -> pf.Front:
    """A result's front."""
    names = experiment.names
    return pf.Front(np.array(result.preferences), np.array(result.values), names, names, experiment.maximize)


def measure(experiment: Experiment, results: Sequence[Result]) -> list[Row]:
    """A row for each result."""
    rows = []
    for result in results:
        front = front_of(experiment, result)
        is_front = result.kind == "front"
        span = _span(experiment, [r for r in results if r.seed == result.seed])
        best = front.values.max(axis=0) if experiment.maximize else front.values.min(axis=0)
        equal = np.flatnonzero(np.ptp(front.preferences, axis=1) < 1e-9)
        rows.append(
            Row(
                experiment=experiment.name,
                contender=result.contender,
                seed=result.seed,
                kind=result.kind,
                hypervolume=front.hypervolume(experiment.reference),
                best=_named(experiment.names, best),
                middle=_named(experiment.names, front.values[equal[0]]) if len(equal) else "",
                non_dominated=front.share_non_dominated() if is_front else None,
                follows=min(front.rank_correlation().values()) if is_front else None,
                spacing=front.spacing() if is_front else None,
                spread=front.spread(span) if is_front and span is not None else None,
                steps=result.steps,
                parameters=result.parameters,
                wall_s=result.wall_s,
                cpu_s=result.cpu_s,
                peak_mb=result.peak_mb,
                note=result.note,
                cpu=result.machine["cpu"],
                threads=result.machine["threads"],
                torch=result.machine["torch"],
                commit=result.machine["commit"],
            )
        )
    return rows


def write(experiment: Experiment, results: Sequence[Result], rows: Sequence[Row], folder: Path) -> None:
    """Write experiment_NAME.csv (measures), ..._points.csv (every model's metrics) and ..._about.csv (what it is)."""
    write_rows(rows, folder / f"experiment_{experiment.name}.csv")
    direction = "maximize" if experiment.maximize else "minimize"
    header = ["contender", "kind", "seed"]
    header += [f"preference:{name}" for name in experiment.names]
    header += [f"{direction}:{name}" for name in experiment.names]
    with open(folder / f"experiment_{experiment.name}_points.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for result in results:
            about = [result.contender, result.kind, result.seed]
            for preference, values in zip(result.preferences, result.values, strict=True):
                writer.writerow([*about, *map(_cell, preference), *map(_cell, values)])

    with open(folder / f"experiment_{experiment.name}_about.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["what", "text"])
        writer.writerow(["title", experiment.title])
        writer.writerow(["metric", experiment.metric])
        writer.writerow(["reference", ", ".join(f"{value:g}" for value in experiment.reference)])
        writer.writerows([["note", note] for note in experiment.notes])


def read_points(path: Path) -> dict[str, dict[int, pf.Front]]:
    """Every contender's front for each seed, from a points file."""
    with open(path, encoding="utf-8", newline="") as file:
        header, *lines = list(csv.reader(file))
    objectives = tuple(name.partition(":")[2] for name in header if name.startswith("preference:"))
    maximize = header[-1].startswith("maximize:")
    gathered: dict[tuple[str, int], list[list[float]]] = {}
    for contender, _, seed, *numbers in lines:
        gathered.setdefault((contender, int(seed)), []).append([float(number) for number in numbers])
    found: dict[str, dict[int, pf.Front]] = {}
    for (contender, seed), rows in gathered.items():
        table = np.array(rows)
        count = len(objectives)
        front = pf.Front(table[:, :count], table[:, count:], objectives, objectives, maximize)
        found.setdefault(contender, {})[seed] = front
    return found


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Write measures as CSV; `read` gives the same rows back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = [f.name for f in fields(Row)]
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([[_cell(getattr(row, name)) for name in columns] for row in rows])


def read(path: Path) -> list[Row]:
    """The rows that `write_rows` wrote."""
    with open(path, encoding="utf-8", newline="") as file:
        return [
            Row(**{f.name: _parsed(str(f.type), line[f.name]) for f in fields(Row)})
            for line in csv.DictReader(file)
        ]


def markdown(rows: Sequence[Row]) -> str:
    """The table of one experiment: means ± standard deviations over seeds."""
    heading = [
        "model",
        "hypervolume",
        "best of each",
        "at equal preference",
        "non-dominated",
        "follows",
        "spread",
    ]
    heading += ["spacing", "steps", "trained numbers", "learning s", "CPU s", "peak MB"]
    lines = [heading]
    seeds = len({row.seed for row in rows})
    for name in dict.fromkeys(row.contender for row in rows):
        group = [row for row in rows if row.contender == name]
        fewer = len(group) < seeds

        def cell(
            get: Callable[[Row], Number], digits: int | None = None, group: Sequence[Row] = group
        ) -> str:
            return spread_of([value for row in group if (value := get(row)) is not None], digits)

        lines.append(
            [
                f"{name} ({_only([row.seed for row in group])} alone)" if fewer else name,
                cell(lambda row: row.hypervolume),
                _means([row.best for row in group]),
                _means([row.middle for row in group]),
                cell(lambda row: row.non_dominated, 2),
                cell(lambda row: row.follows, 2),
                cell(lambda row: row.spread, 2),
                cell(lambda row: row.spacing),
                *("" if value is None else f"{value:,}" for value in (group[0].steps, group[0].parameters)),
                cell(lambda row: row.wall_s, 1),
                cell(lambda row: row.cpu_s, 1),
                cell(lambda row: row.peak_mb, 0),
            ]
        )
    return as_text(lines)


def _only(seeds: Sequence[int]) -> str:
    """Which seeds, in words."""
    named = " and ".join(map(str, sorted(seeds)))
    return f"seed {named}" if len(seeds) == 1 else f"seeds {named}"


def spread_of(values: Sequence[float], digits: int | None = None) -> str:
    """Mean ± standard deviation with so many decimals, as their size asks for by default; one value: it; none: ""."""
    if not values:
        return ""
    if digits is None:
        digits = decimals(statistics.mean(values))
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def decimals(value: float) -> int:
    """Decimals to show: four of a number below 10, fewer of a larger one."""
    return max(0, 5 - len(str(int(abs(value)))))


def shown(value: float, sign: str = "") -> str:
    """A hypervolume, or with sign "+" a difference of two, as text."""
    return f"{value:{sign}.{decimals(value)}f}"


def _span(experiment: Experiment, results: Sequence[Result]) -> list[float] | None:
    """How far apart the experts are in each metric; None unless all of them were measured."""
    experts = [r.values[0] for r in results if r.contender in {f"expert {name}" for name in experiment.names}]
    if len(experts) < len(experiment.names):
        return None
    span = np.ptp(np.array(experts), axis=0)
    return span.tolist() if (span > 0).all() else None


def _named(names: Sequence[str], values: np.ndarray) -> str:
    return "; ".join(f"{name}={value:.6g}" for name, value in zip(names, values, strict=True))


def _means(texts: Sequence[str]) -> str:
    """The means of "NAME=value; NAME=value" texts."""
    parsed = [[part.rpartition("=") for part in text.split("; ")] for text in texts if text]
    if not parsed:
        return ""
    numbers = np.array([[float(part[2]) for part in parts] for parts in parsed]).mean(axis=0)
    return " / ".join(f"{number:.3f}" if number < 10 else f"{number:.1f}" for number in numbers)


def _cell(value: Any) -> str:
    return "" if value is None else repr(value) if isinstance(value, float) else str(value)


def _parsed(kind: str, text: str) -> Any:
    if "str" in kind:
        return text
    if not text:
        return None
    return int(text) if "int" in kind else float(text)
