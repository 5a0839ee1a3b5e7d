"""The pictures of the experiments' page, from fronts and measures that were read from CSV files."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import paretofuse as pf
from benchmarks.experiments.tables import Row

INK, GREY, PALE = "#222222", "#8a8a8a", "#e4e4e4"
OURS, SHORT, SEVERAL = "#1b6ca8", "#9cc4e2", "#2aa6b8"
THEIRS, SOUPS, DENSE = "#d1495b", "#4f9d69", "#7d5ba6"
SMALL = 8
MARKERS = "s^v<>oDXP*"

Fronts = Mapping[str, Mapping[int, pf.Front]]


def colour(name: str, longest: str) -> str:
    """A contender's colour: ours in blues (short runs lighter), PWEMoE in red, single models in grey."""
    if name.startswith("ours"):
        return OURS if name == longest else SEVERAL if "preferences" in name else SHORT
    if name.startswith("PWEMoE"):
        return THEIRS
    return {"rewarded soups": SOUPS, "dense scalarization": DENSE}.get(name, GREY)


def picture(fronts: Fronts, rows: Sequence[Row], metric: str, title: str, path: Path) -> None:
    """Draw one experiment: its fronts (with more objectives than two: metric against preference) and hypervolumes."""
    some = next(iter(fronts["rewarded soups"].values()))
    panels = 1 if len(some.objectives) == 2 else len(some.objectives)
    figure = Figure(figsize=(4.6 + 3.6 * panels, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels + 1, squeeze=False, width_ratios=[1.0] * panels + [0.95])[0]
    shown = chosen(rows)
    if panels == 1:
        _fronts(axes[0], fronts, shown, metric)
    else:
        for index in range(panels):
            _following(axes[index], fronts, shown, index, metric)
    _bars(axes[-1], rows)
    figure.suptitle(title, fontsize=10, color=INK)
    figure.savefig(path, dpi=130)


def chosen(rows: Sequence[Row]) -> list[str]:
    """The fronts to draw: ours, rewarded soups, dense scalarization, and the best PWEMoE of most seeds."""
    means = {
        name: mean(rows, name) for name in dict.fromkeys(row.contender for row in rows if row.kind == "front")
    }
    theirs = [name for name in means if name.startswith("PWEMoE")]
    seeds = Counter(row.contender for row in rows)
    best = max(theirs, key=lambda name: (seeds[name], means[name])) if theirs else None
    ours = runs_of_ours(list(means)) or [name for name in means if name.startswith("ours")]
    return [name for name in means if name == best or name in ours or not name.startswith(("PWEMoE", "ours"))]


def mean(rows: Sequence[Row], name: str) -> float:
    """A contender's mean hypervolume."""
    return statistics.mean(row.hypervolume for row in rows if row.contender == name)


def runs_of_ours(names: Sequence[str]) -> list[str]:
    """Ours with so many steps, of one preference or of several, the shortest first."""
    found = [name for name in names if re.fullmatch(r"ours, \d+ steps( of \d+ preferences)?", name)]
    return sorted(found, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])


def longest(names: Sequence[str]) -> str:
    """The longest run of ours, else any other of ours; "" if there is none."""
    others = [name for name in names if name.startswith("ours")]
    return ["", *others, *runs_of_ours(names)][-1]


def _fronts(ax: Axes, fronts: Fronts, shown: Sequence[str], metric: str) -> None:
    """Means over seeds at each preference, and each seed as a faint line."""
    first = next(iter(fronts[shown[0]].values())).objectives
    for name in shown:
        front = list(fronts[name].values())
        tint = colour(name, longest(shown))
        average = np.mean([f.values for f in front], axis=0)
        if len(front) > 1:
            for one in front:
                ax.plot(*one.values.T, color=tint, lw=0.5, alpha=0.35, zorder=2)
        style = "-" if name == longest(shown) else "--"
        ax.plot(*average.T, style, color=tint, lw=1.6, marker="o", ms=3.2, label=name, zorder=4)
    singles = [name for name, seeds in fronts.items() if all(len(front) == 1 for front in seeds.values())]
    for name, marker in zip(singles, cycle(MARKERS)):
        x, y = np.mean([front.values[0] for front in fronts[name].values()], axis=0)
        ax.plot(x, y, ls="", marker=marker, ms=5, color=GREY, mfc="white", zorder=5, label=name)
    ax.set_xlabel(f"{first[0]} {metric}", fontsize=SMALL + 1)
    ax.set_ylabel(f"{first[1]} {metric}", fontsize=SMALL + 1)
    _plain(ax)
    ax.legend(fontsize=SMALL - 1, frameon=False, loc="best")


def _following(ax: Axes, fronts: Fronts, shown: Sequence[str], index: int, metric: str) -> None:
    """An objective's metric against its share of the preference, averaged over what the others get and over seeds."""
    name = ""
    for contender in shown:
        front = next(iter(fronts[contender].values()))
        name = front.objectives[index]
        shares = front.preferences[:, index].round(9)
        values = np.mean([f.values[:, index] for f in fronts[contender].values()], axis=0)
        levels = np.unique(shares)
        heights = [values[shares == level].mean() for level in levels]
        style = "-" if contender == longest(shown) else "--"
        ax.plot(
            levels,
            heights,
            style,
            color=colour(contender, longest(shown)),
            marker="o",
            ms=3.2,
            label=contender,
        )
    ax.set_xlabel(f"preference for {name}", fontsize=SMALL + 1)
    ax.set_ylabel(f"{name} {metric}", fontsize=SMALL + 1)
    _plain(ax)
    if index == 0:
        ax.legend(fontsize=SMALL - 1, frameon=False, loc="best")


def _bars(ax: Axes, rows: Sequence[Row]) -> None:
    names = list(dict.fromkeys(row.contender for row in rows))[::-1]
    for place, name in enumerate(names):
        values = [row.hypervolume for row in rows if row.contender == name]
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        height = statistics.mean(values)
        ax.barh(place, height, xerr=deviation or None, color=colour(name, longest(names)), height=0.72,
                error_kw={"lw": 0.8, "ecolor": INK})  # fmt: skip
        ax.text(height + deviation, place, f" {height:.3f}" if height < 100 else f" {height:.0f}", va="center",
                fontsize=SMALL - 1, color=INK)  # fmt: skip
    ax.set_yticks(range(len(names)), names)
    ax.set_xlabel("hypervolume (mean ± sd over seeds)", fontsize=SMALL + 1)
    ax.margins(x=0.16)
    _plain(ax)
    ax.grid(axis="y", visible=False)


def ablation(changes: Mapping[str, Sequence[float]], title: str, path: Path) -> None:
    """Draw each setting's change of hypervolume: a dot for each seed, a bar for the mean."""
    names = sorted(changes, key=lambda name: statistics.mean(changes[name]))
    figure = Figure(figsize=(7.2, 0.9 + 0.23 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    for place, name in enumerate(names):
        height = statistics.mean(changes[name])
        ax.barh(place, height, color=OURS if height > 0 else THEIRS, alpha=0.55, height=0.7)
        ax.plot(changes[name], [place] * len(changes[name]), ls="", marker="o", ms=3, color=INK)
    ax.axvline(0, color=INK, lw=0.8)
    every = [value for values in changes.values() for value in values]
    low, high = min([0.0, *every]), max([0.0, *every])
    cut = -2.5 * high
    if high > 0 and low < cut:  # one harmful setting would hide all differences between the others
        ax.set_xlim(cut, 1.12 * high)
        for place, name in enumerate(names):
            if min(changes[name]) < cut:
                ax.text(
                    cut,
                    place,
                    f" ← {statistics.mean(changes[name]):.3f}",
                    va="center",
                    fontsize=SMALL,
                    color=INK,
                )
    ax.set_yticks(range(len(names)), names)
    ax.set_xlabel("change of hypervolume; dots are seeds", fontsize=SMALL + 1)
    ax.set_title(title, fontsize=10, color=INK)
    _plain(ax)
    ax.grid(axis="y", visible=False)
    figure.savefig(path, dpi=130)


def _plain(ax: Axes) -> None:
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(GREY)
    ax.tick_params(labelsize=SMALL, color=GREY, labelcolor=INK)
    ax.grid(color=PALE, lw=0.5)
    ax.set_axisbelow(True)
