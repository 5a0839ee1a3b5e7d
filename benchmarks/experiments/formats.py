"""What planes of fewer bytes cost in accuracy: merges of real experts, held in every format.

    python -m benchmarks.experiments formats      plane_formats.csv and docs/plane-formats.png, on all of EXPERIMENTS

Nothing is learned: routers stand at their start (every tensor's weights are the preference), and each format's merges
are compared with those of exact float32 planes, at equal preference and at each expert alone, on test data.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, PercentFormatter
from torch import nn

import paretofuse as pf
from benchmarks.experiments.experiment import Experiment, Models, cache_of, one_hot
from benchmarks.experiments.plots import DENSE, GREY, MARKERS, OURS, SOUPS, THEIRS
from benchmarks.experiments.run import Load, place_of
from benchmarks.harness.record import Context

EXPERIMENTS = ("vision", "vision3", "text", "language")
EXACT = "fp32"
FORMATS = ("bf16", "int8", "int4", "lowrank:32", "lowrank:8")
COLOURS = (OURS, SOUPS, THEIRS, DENSE, GREY)
ALLOWED = {"int8": 0.1, "int4": 0.5}
"""Percent that a metric may change by."""


@dataclass(frozen=True)
class Measured:
    """One format on one experiment.

    Attributes:
        experiment: its name.
        seed: of base and experts.
        planes: the format, as `pf.stack` takes it.
        size: bytes of all planes by those of float32 ones.
        error: ||merged - exact merge|| / ||exact merge - base|| over all tensors, at equal preference.
        change: the largest change of any objective's metric at any of the preferences, in percent: of all test data
            for an accuracy, of the exact value for a perplexity.
    """

    experiment: str
    seed: int
    planes: str
    size: float
    error: float
    change: float


def measure(experiment: Experiment, models: Models) -> list[Measured]:
    """Every format on one experiment's experts."""
    base, experts = models.base(), models.experts()
    count = len(experts)
    preferences = [[1 / count] * count, *(one_hot(count, index) for index in range(count))]
    start = nn.utils.parameters_to_vector(base.parameters()).detach()
    found: list[Measured] = []
    exact: tuple[float, torch.Tensor, np.ndarray] | None = None
    for planes in (EXACT, *FORMATS):
        engine = pf.stack(base, experts, init="identity", planes=planes)
        size = float(sum(plane.nbytes for own in engine.planes.values() for plane in own.values()))
        engine.switch(preferences[0])
        merged = nn.utils.parameters_to_vector(engine.module.parameters()).detach().clone()
        values = np.array([_values(experiment, engine, preference) for preference in preferences])
        if exact is None:
            exact = size, merged, values
            continue
        unit = 1.0 if experiment.metric == "accuracy" else exact[2]
        error = (merged - exact[1]).double().norm() / (exact[1] - start).double().norm()
        change = 100 * float(np.abs((values - exact[2]) / unit).max())
        found.append(Measured(experiment.name, models.seed, planes, size / exact[0], float(error), change))
    return found


def run(
    loads: Mapping[str, Load], seeds: Sequence[int], cache: Path, out: Path, picture: Path, about: Context, quick: bool,
    say: Callable[[str], None] = print,
) -> list[Measured]:  # fmt: skip
    """Measure all of it, write plane_formats.csv and the picture, and return what was measured."""
    rows: list[Measured] = []
    for name, load in loads.items():
        experiment = load(quick)
        for seed in seeds:
            rows += measure(experiment, Models(experiment, seed, place_of(cache_of(experiment, cache), seed)))
            say(f"{name}, seed {seed}: measured")
    out.mkdir(parents=True, exist_ok=True)
    with (out / "plane_formats.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([f.name for f in (*fields(Measured), *fields(Context))])
        writer.writerows([*astuple(row), *asdict(about).values()] for row in rows)
    draw(rows, picture)
    return rows


def draw(rows: Sequence[Measured], path: Path) -> None:
    """Two panels over the planes' bytes: the error of the merged update, and the largest change of a metric."""
    figure = Figure(figsize=(9.6, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    names = list(dict.fromkeys(row.experiment for row in rows))
    left, right = figure.subplots(1, 2)
    for axes, quantity in ((left, "error"), (right, "change")):
        for row in rows:
            axes.plot(
                row.size, getattr(row, quantity), linestyle="", markersize=7, alpha=0.85,
                marker=MARKERS[names.index(row.experiment)], color=COLOURS[FORMATS.index(row.planes)],
            )  # fmt: skip
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.xaxis.set_minor_formatter("")
        axes.set_xticks([0.05, 0.1, 0.15, 0.25, 0.5, 1.0])
        axes.set_xlabel("bytes of the planes, of float32 planes' (lower is better)")
        axes.grid(alpha=0.3)
    left.set_yscale("log")
    left.set_ylabel("relative error of the merged update\n(lower is better)")
    right.set_yscale("symlog", linthresh=0.1)
    right.set_ylim(0, 1.6 * max(row.change for row in rows) + 0.1)
    right.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    right.set_ylabel("largest change of a metric, percent\n(lower is better)")
    for planes, allowed in ALLOWED.items():
        colour = COLOURS[FORMATS.index(planes)]
        right.axhline(allowed, color=colour, linestyle=":", linewidth=1)
    handles = [
        left.plot([], [], linestyle="", marker="o", color=colour, label=planes)[0]
        for planes, colour in zip(FORMATS, COLOURS, strict=True)
    ] + [
        left.plot([], [], linestyle="", marker=MARKERS[i], color="#555555", label=name)[0]
        for i, name in enumerate(names)
    ]
    handles.append(
        left.plot([], [], linestyle=":", color="#555555", label="allowed, in the format's colour")[0]
    )
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def table(rows: Sequence[Measured]) -> str:
    """Markdown: for each format and experiment the mean over its seeds of bytes and error, and the largest change."""
    lines = [
        "| planes | experiment | bytes | error of the update | largest change |",
        "|---|---|---|---|---|",
    ]
    for planes in FORMATS:
        for name in dict.fromkeys(row.experiment for row in rows):
            own = [row for row in rows if (row.planes, row.experiment) == (planes, name)]
            size, error = np.mean([r.size for r in own]), np.mean([r.error for r in own])
            change = max(r.change for r in own)
            lines.append(f"| {planes} | {name} | {size:.1%} | {error:.2g} | {change:.2f} % |")
    return "\n".join(lines)


def _values(experiment: Experiment, engine: pf.Engine, preference: Sequence[float]) -> list[float]:
    engine.switch(list(preference))
    with torch.no_grad():
        found = experiment.evaluate(engine.module.eval())
    return [float(found[name]) for name in experiment.names]
