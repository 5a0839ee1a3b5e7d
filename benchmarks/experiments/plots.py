"""The pictures of the experiments' page, from fronts and measures that were read from CSV files."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

import paretofuse as pf
from benchmarks.experiments.tables import Row

INK, GREY, PALE = "#222222", "#8a8a8a", "#e4e4e4"
OURS, SHORT, SEVERAL = "#1b6ca8", "#9cc4e2", "#2aa6b8"
THEIRS, SOUPS, DENSE = "#d1495b", "#4f9d69", "#7d5ba6"
SMALL = 8
MARKERS = "s^v<>DXP*h"
DASHES = ("--", ":", "-.", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))

WORDS = {
    "rewarded soups": "rewarded soups (linear merges)",
    "plain average": "plain average of the experts",
    "task arithmetic": "task arithmetic, best of 10 coefficients",
    "TIES": "TIES merge, best of 10 coefficients",
    "DARE": "DARE merge, best of 10 coefficients",
    "TSV": "TSV merge, best of 10 coefficients",
    "Iso-C": "Iso-C merge, best of 10 coefficients",
    "RegMean": "RegMean merge, best of 10 coefficients",
    "dense scalarization": "a model fine-tuned for each preference",
    "dense, from the average": "the same from the experts' average",
    "dense, from the nearest expert": "the same from the nearest expert",
    "MGDA": "MGDA, a scalar for each tensor",
    "NSGA-II": "NSGA-II over coefficients",
    "entropy, no labels": "entropies instead of labels (AdaMerging's)",
}
"""What contenders of the tables are called in pictures, which have no page of words beside them."""

Fronts = Mapping[str, Mapping[int, pf.Front]]


def in_words(contender: str) -> str:
    """A contender's name for a reader who has seen nothing but the picture."""
    if contender in WORDS:
        return WORDS[contender]
    name, comma, rest = contender.partition(",")
    if contender.startswith("PWEMoE-"):
        solver, mode, start = name.removeprefix("PWEMoE-").split()
        solved = {"LS": "linear scalarization", "EPO": "EPO"}[solver]
        return f"PWEMoE, {solved}, {'MLPs' if mode == 'mlp' else 'all'} routed, start {start}{comma}{rest}"
    own = re.sub(r"^ours\b", "ParetoFuse", name)
    return WORDS.get(own, own) + comma + rest


def colour(name: str, longest: str) -> str:
    """A contender's colour: ours in blues (short runs lighter), PWEMoE in red, single models in grey."""
    if name.startswith("ours"):
        return OURS if name == longest else SEVERAL if re.search(r"preferences|\(", name) else SHORT
    if name.startswith("PWEMoE"):
        return THEIRS
    return DENSE if name.startswith("dense") else SOUPS if name == "rewarded soups" else GREY


def picture(fronts: Fronts, rows: Sequence[Row], metric: str, title: str, path: Path) -> None:
    """Draw one experiment: its fronts (with more objectives than two: metric against preference) and hypervolumes."""
    some = next(iter(fronts["rewarded soups"].values()))
    better = f"{metric} ({'higher' if some.directions[0] else 'lower'} is better)"
    panels = 1 if len(some.objectives) == 2 else len(some.objectives)
    contenders = len({row.contender for row in rows})
    figure = Figure(figsize=(6.2 + 3.5 * panels, max(5.4, 2.4 + 0.19 * contenders)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(wspace=0.04)
    axes = figure.subplots(1, panels + 1, squeeze=False, width_ratios=[1.0] * panels + [0.95])[0]
    shown = chosen(rows)
    if panels == 1:
        _fronts(axes[0], fronts, shown, better)
    else:
        for index in range(panels):
            _following(axes[index], fronts, shown, index, better)
    _bars(axes[-1], rows)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside lower left", ncols=3 if panels == 1 else 4, fontsize=SMALL, frameon=False
    )
    figure.suptitle(title, fontsize=10, color=INK, x=0.01, ha="left")
    figure.savefig(path, dpi=130)


def style(number: int, name: str, names: Sequence[str], fronts: Fronts) -> dict[str, Any]:
    """How a front is drawn: the longest run of ours solid, each other one with dashes; seeds that are missing told."""
    solid = name == longest(names)
    seeds, most = len(fronts[name]), max(len(fronts[other]) for other in names)
    fewer = f" ({seeds} of {most} seeds)" if seeds < most else ""
    return {
        "color": colour(name, longest(names)), "ls": "-" if solid else DASHES[number % len(DASHES)],
        "lw": 1.8 if solid else 1.4, "marker": "o", "ms": 3.2, "label": in_words(name) + fewer,
    }  # fmt: skip


def chosen(rows: Sequence[Row]) -> list[str]:
    """The fronts to draw: a few of ours, rewarded soups, dense scalarization, PWEMoE's best of most steps and seeds.

    Of ours the shortest and the two longest runs, and the longest of hundreds of numbers.
    """
    means = {
        name: mean(rows, name) for name in dict.fromkeys(row.contender for row in rows if row.kind == "front")
    }
    theirs = [name for name in means if name.startswith("PWEMoE")]
    seeds = Counter(row.contender for row in rows)
    steps = {row.contender: row.steps or 0 for row in rows}
    best = max(theirs, key=lambda name: (steps[name], seeds[name], means[name])) if theirs else None
    runs = [name for name in runs_of_ours(list(means)) if not re.search(r"preferences|\(", name)]
    ours = [*runs[:1], *runs[-2:]] or [name for name in means if name.startswith("ours")]
    scalar = [name for name in means if name.startswith("ours (scalar)")][-1:]
    return [name for name in means if name in {"rewarded soups", "dense scalarization", best, *ours, *scalar}]


def mean(rows: Sequence[Row], name: str) -> float:
    """A contender's mean hypervolume."""
    return statistics.mean(row.hypervolume for row in rows if row.contender == name)


def runs_of_ours(names: Sequence[str]) -> list[str]:
    """Ours with so many steps, of one preference or of several: other families first, then the shortest first."""
    pattern = r"ours( \([^)]+\))?, \d+ steps( of \d+ preferences)?"
    found = [name for name in names if re.fullmatch(pattern, name)]
    return sorted(found, key=lambda name: ("(" not in name, numbers_of(name)))


def numbers_of(run: str) -> list[int]:
    """How long one of `runs_of_ours` is: its steps, and the preferences of each if there are several."""
    return [int(number) for number in re.findall(r"\d+", run.partition(", ")[2])]


def longest(names: Sequence[str]) -> str:
    """The longest run of ours, else any other of ours; "" if there is none."""
    others = [name for name in names if name.startswith("ours")]
    return ["", *others, *runs_of_ours(names)][-1]


def _fronts(ax: Axes, fronts: Fronts, shown: Sequence[str], better: str) -> None:
    """Means over seeds at each preference, and each seed as a faint line."""
    first = next(iter(fronts[shown[0]].values())).objectives
    for number, name in enumerate(shown):
        front = list(fronts[name].values())
        average = np.mean([f.values for f in front], axis=0)
        if len(front) > 1:
            for one in front:
                ax.plot(*one.values.T, color=colour(name, longest(shown)), lw=0.5, alpha=0.35, zorder=2)
        ax.plot(*average.T, zorder=4, **style(number, name, shown, fronts))
    singles = [name for name, seeds in fronts.items() if all(len(front) == 1 for front in seeds.values())]
    for name, marker in zip(singles, cycle(MARKERS)):
        x, y = np.mean([front.values[0] for front in fronts[name].values()], axis=0)
        ax.plot(x, y, ls="", marker=marker, ms=5.5, color=INK, mfc="white", zorder=5, label=in_words(name))
    ax.set_xlabel(f"{first[0]} {better}", fontsize=SMALL + 1)
    ax.set_ylabel(f"{first[1]} {better}", fontsize=SMALL + 1)
    seeds = max(len(fronts[name]) for name in shown)
    ax.set_title(_seeds(seeds, "mean", "; faint: each seed"), fontsize=SMALL, color=GREY)
    _plain(ax)


def _following(ax: Axes, fronts: Fronts, shown: Sequence[str], index: int, better: str) -> None:
    """An objective's metric against its share of the preference, averaged over what the others get and over seeds."""
    name = ""
    for number, contender in enumerate(shown):
        front = next(iter(fronts[contender].values()))
        name = front.objectives[index]
        shares = front.preferences[:, index].round(9)
        values = np.mean([f.values[:, index] for f in fronts[contender].values()], axis=0)
        levels = np.unique(shares)
        heights = [values[shares == level].mean() for level in levels]
        ax.plot(levels, heights, **style(number, contender, shown, fronts))
    ax.set_xlabel(f"preference for {name} (share of 1)", fontsize=SMALL + 1)
    ax.set_ylabel(f"{name} {better}", fontsize=SMALL + 1)
    seeds = _seeds(max(len(fronts[name]) for name in shown), "mean")
    ax.set_title(f"{seeds}, mean over the other shares", fontsize=SMALL, color=GREY)
    _plain(ax)


def _bars(ax: Axes, rows: Sequence[Row]) -> None:
    names = list(dict.fromkeys(row.contender for row in rows))[::-1]
    most = len({row.seed for row in rows})
    digits = 3 if max(row.hypervolume for row in rows) < 100 else 0
    for place, name in enumerate(names):
        values = [row.hypervolume for row in rows if row.contender == name]
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        height = statistics.mean(values)
        ax.barh(place, height, xerr=deviation or None, color=colour(name, longest(names)), height=0.72,
                error_kw={"lw": 0.8, "ecolor": INK})  # fmt: skip
        alone = "" if len(values) == most else f" ({len(values)} of {most} seeds)"
        ax.text(height + deviation, place, f" {height:.{digits}f}{alone}", va="center",
                fontsize=SMALL - 1, color=INK)  # fmt: skip
    ax.set_yticks(range(len(names)), [in_words(name) for name in names])
    ax.set_xlabel("hypervolume (higher is better)", fontsize=SMALL + 1)
    ax.set_title(
        _seeds(len({row.seed for row in rows}), "mean ± standard deviation"), fontsize=SMALL, color=GREY
    )
    ax.margins(x=0.18)
    _plain(ax)
    ax.grid(axis="y", visible=False)


def _seeds(count: int, what: str, more: str = "") -> str:
    return f"{what} of {count} seeds{more}" if count > 1 else "one seed"


def ablation(changes: Mapping[str, Sequence[float]], title: str, path: Path) -> None:
    """Draw each setting's change of hypervolume: a dot for each seed, a bar for the mean."""
    names = sorted(changes, key=lambda name: statistics.mean(changes[name]))
    figure = Figure(figsize=(8.2, 1.4 + 0.23 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    for place, name in enumerate(names):
        height = statistics.mean(changes[name])
        ax.barh(place, height, color=OURS if height > 0 else THEIRS, alpha=0.55, height=0.7)
        ax.plot(changes[name], [place] * len(changes[name]), ls="", marker="o", ms=3, color=INK)
    ax.axvline(0, color=INK, lw=0.8)
    every = [value for values in changes.values() for value in values]
    high, where = max(every), ""
    if (
        high > 0 and min(every) < -2.5 * high
    ):  # one harmful setting would hide all differences between the others
        step = 10.0 ** np.floor(np.log10(high))
        linear = float(step * np.ceil(high / step))
        ax.set_xscale("symlog", linthresh=linear, linscale=1.5)
        ax.xaxis.set_major_locator(FixedLocator(_ticks(min(every), linear)))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xlim(left=1.4 * min(every))
        where = f"; logarithmic below −{linear:g}"
    labels = [re.sub(r"^ours\b", "our settings", name) for name in names]
    ax.set_yticks(range(len(names)), labels)
    ax.set_xlabel(f"change of hypervolume (higher is better){where}", fontsize=SMALL + 1)
    ax.set_title(title, fontsize=10, color=INK, loc="left")
    _plain(ax)
    ax.grid(axis="y", visible=False)
    handles = [
        Patch(color=OURS, alpha=0.55, label="mean over seeds, better than plain"),
        Patch(color=THEIRS, alpha=0.55, label="mean over seeds, worse"),
        Line2D([], [], ls="", marker="o", ms=3, color=INK, label="one seed"),
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=3, fontsize=SMALL, frameon=False)
    figure.savefig(path, dpi=130)


def _ticks(low: float, linear: float) -> list[float]:
    """Even ticks where the scale is linear, fourfold ones below."""
    ticks = [-linear * 4.0**power for power in range(1, 6) if -linear * 4.0**power > low * 1.4]
    return [*ticks[::-1], -linear, -linear / 2, 0.0, linear / 2, linear]


def _plain(ax: Axes) -> None:
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(GREY)
    ax.tick_params(labelsize=SMALL, color=GREY, labelcolor=INK)
    ax.grid(color=PALE, lw=0.5)
    ax.set_axisbelow(True)
