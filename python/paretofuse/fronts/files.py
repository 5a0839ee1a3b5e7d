"""The CSV files of fronts: what was merged, and what it reached."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from paretofuse.engine.store.atomic import write_file


class Table(NamedTuple):
    """A front's numbers and names.

    Attributes:
        points: [P, D]: what was merged.
        values: [P, M]: the metrics.
        names: of the D columns of points.
        metrics: of the M columns of values.
        directions: for each metric, whether larger is better.
    """

    points: np.ndarray
    values: np.ndarray
    names: tuple[str, ...]
    metrics: tuple[str, ...]
    directions: tuple[bool, ...]


def header(kind: str, names: Sequence[str], metrics: Sequence[str], directions: Sequence[bool]) -> list[str]:
    """The columns' titles: "KIND:NAME" for each name, "maximize:NAME" or "minimize:NAME" for each metric."""
    ways = ["maximize" if larger else "minimize" for larger in directions]
    return [
        *(f"{kind}:{name}" for name in names),
        *(f"{way}:{name}" for way, name in zip(ways, metrics, strict=True)),
    ]


def write_table(path: str | os.PathLike[str], kind: str, table: Table) -> None:
    """Write a table as UTF-8 CSV, whole or not at all, making missing parents.

    Args:
        path: the file.
        kind: what the points are: "preference" or "coefficient".
        table: what to write.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(header(kind, table.names, table.metrics, table.directions))
    for row in np.hstack([table.points, table.values]).tolist():
        writer.writerow([repr(number) for number in row])
    write_file(path, text.getvalue().encode())


def read_table(path: str | os.PathLike[str], kind: str) -> Table:
    """Read what `write_table` wrote: the very same numbers.

    Raises:
        ValueError: the file is not such a table; names the line.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:  # spreadsheets begin it with a mark
            rows = [row for row in csv.reader(file) if row]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"got {str(path)!r}, expected a CSV file that to_csv wrote: {error}") from error
    columns = [tuple(cell.split(":", 1)) for cell in rows[0]] if rows else []
    kinds = [column[0] for column in columns]
    share = kinds.count(kind)
    ordered = kinds[:share] == [kind] * share and 0 < share < len(kinds)
    known = (kind, "maximize", "minimize")
    if not ordered or any(len(column) != 2 or column[0] not in known for column in columns):
        raise ValueError(
            f"got {str(path)!r} with header {rows[0] if rows else []}, expected columns {kind}:NAME, "
            "then maximize:NAME or minimize:NAME; is it a file that to_csv wrote?"
        )
    numbers = []
    for line, row in enumerate(rows[1:], start=2):
        try:
            if len(row) != len(columns):
                raise ValueError
            numbers.append([float(cell) for cell in row])
        except ValueError:
            raise ValueError(
                f"got {row} in row {line} of {str(path)!r}, expected {len(columns)} numbers; "
                "the file is truncated or was edited"
            ) from None
    cells = np.array(numbers, dtype=np.float64).reshape(len(numbers), len(columns))
    names = tuple(column[1] for column in columns)
    larger = tuple(way == "maximize" for way in kinds[share:])
    return Table(cells[:, :share], cells[:, share:], names[:share], names[share:], larger)
