"""The picture of `gpu_bench.csv`: how near to a copy's bandwidth each contender comes, case by case.

    python -m benchmarks.gpu.plot benchmarks/data/gpu_bench.csv -o docs/gpu_bench.png

Draws the last run in the file (the rows with its last date); with several dates of one day, the last of each case.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

from paretofuse.fronts.style import INK, OKABE_ITO, new_figure

BAR = 0.21
"""Inches of a contender's bar."""


def latest(path: Path) -> dict[str, list[dict[str, str]]]:
    """The newest measured rows of every case, by its name; failed contenders are left out.

    Raises:
        ValueError: there is none.
    """
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if not row["error"]]
    if not rows:
        raise ValueError(f"{path} has no measured row; run python -m benchmarks.gpu.bench first")
    newest = {row["case"]: row["date"] for row in rows}  # later rows replace earlier ones
    found: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        if row["date"] == newest[row["case"]]:
            found.setdefault(row["case"], []).append(row)
    return found


def draw(path: Path, picture: Path) -> None:
    """Draw one panel a case, a bar for each contender, ours in colour; times stand at the bars' ends."""
    cases = latest(path)
    heights = [0.75 + BAR * len(rows) for rows in cases.values()]
    figure = new_figure(8.5, sum(heights))
    panels = figure.subplots(
        len(cases), 1, squeeze=False, gridspec_kw={"height_ratios": heights}, sharex=True
    )
    for axes, (case, rows) in zip(panels[:, 0], cases.items(), strict=True):
        shares = [100 * float(row["share_of_copy"]) for row in rows]
        colours = [
            OKABE_ITO[0] if row["contender"].startswith(("ours", "engine")) else "#bbbbbb" for row in rows
        ]
        axes.barh(range(len(rows)), shares, color=colours, height=0.7)
        axes.set_yticks(range(len(rows)), [row["contender"] for row in rows], fontsize=8)
        axes.invert_yaxis()
        for place, (row, share) in enumerate(zip(rows, shares, strict=True)):
            time = float(row["median_ms"])
            text = f" {time:.3g} ms" if time < 1000 else f" {time:.0f} ms"
            axes.text(share, place, text, va="center", fontsize=7.5, color=INK)
        axes.set_title(case, fontsize=9, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.12)
    panels[-1, 0].set_xlabel("% of a copy's bandwidth over the bytes that have to move (more is better)")
    first = next(iter(cases.values()))[0]
    figure.suptitle(f"{first['device']}, torch {first['torch']}, Triton {first['triton']}", fontsize=10)
    figure.savefig(picture, dpi=110)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.plot", description=__doc__)
    parser.add_argument("csv", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True, help="the PNG file")
    options = parser.parse_args(arguments)
    draw(options.csv, options.output)
    print(f"wrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
