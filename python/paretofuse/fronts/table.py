"""A front as a table: for a terminal, for a notebook, for pandas."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from paretofuse.fronts.files import header

if TYPE_CHECKING:
    from paretofuse.fronts.front import Front

ROWS = 24
"""More rows than these are shown by their first and last ones."""


def as_text(front: Front) -> str:
    """Aligned columns: preferences, metrics with the direction of better, a mark at dominated points."""
    heads, rows = _cells(front)
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [heads, *rows]
    ]
    return "\n".join([_summary(front), *lines, *(f"note: {note}" for note in front.notes)])


def as_html(front: Front) -> str:
    """The same as an HTML table; names are escaped."""
    heads, rows = _cells(front)
    top = "".join(f"<th>{escape(cell)}</th>" for cell in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    notes = "".join(f"<p>note: {escape(note)}</p>" for note in front.notes)
    return f"<p>{escape(_summary(front))}</p><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>{notes}"


def as_frame(front: Front) -> Any:
    """A pandas DataFrame with the columns of Front.to_csv.

    Raises:
        ImportError: pandas is missing.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError(
            "Front.to_pandas needs pandas, which is not installed; pip install pandas"
        ) from error
    names = header("preference", front.objectives, front.metrics, front.directions)
    return pandas.DataFrame(np.hstack([front.preferences, front.values]), columns=names)


def _summary(front: Front) -> str:
    kept = int(front.non_dominated().sum())
    return f"Front of {len(front)} preferences over {', '.join(front.objectives)}: {kept} not dominated"


def _cells(front: Front) -> tuple[list[str], list[list[str]]]:
    better = [
        f"{name} ({'higher' if up else 'lower'} is better)"
        for name, up in zip(front.metrics, front.directions, strict=True)
    ]
    heads = [*(f"share of {name}" for name in front.objectives), *better, ""]
    kept = front.non_dominated()
    shown = (
        range(len(front))
        if len(front) <= ROWS
        else [*range(ROWS // 2), -1, *range(len(front) - ROWS // 2, len(front))]
    )
    rows = []
    for row in shown:
        if row < 0:
            rows.append(["..."] * (len(heads) - 1) + [""])
            continue
        shares = [f"{share:.3g}" for share in front.preferences[row]]
        values = [f"{value:.5g}" for value in front.values[row]]
        rows.append([*shares, *values, "" if kept[row] else "dominated"])
    return heads, rows
