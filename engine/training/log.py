"""Training logs: a CSV file, a TensorBoard directory, a tracker by name, or an object that takes the records."""

from __future__ import annotations

import csv
import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from paretofuse.engine.training.trackers import TRACKERS, open_tracker


@runtime_checkable
class Log(Protocol):
    """Takes a record for each step."""

    def write(self, record: Mapping[str, float]) -> bool | None:
        """Write one step's record; its "step" counts from 1. Returning True ends the training after it."""

    def close(self) -> None:
        """Flush and close."""


def open_log(path: str | os.PathLike[str] | Log, resumed_step: int) -> Log:
    """A CSV log where the path ends in .csv, a run of the tracker that it names, a TensorBoard directory otherwise.

    Args:
        path: the file or directory, a tracker's name, or what takes the records itself.
        resumed_step: records after this step come from a run that was cut short, and are dropped (0: a new run).

    Raises:
        ValueError: the path is a file that is no log of `pf.fit`; it is left as it is. Or it is nearly a tracker's
            name, and no directory of that name is there.
        TypeError: it is none of these.
        ImportError: the tracker is not installed, or for a directory tensorboard.
    """
    if not isinstance(path, str | os.PathLike):
        if isinstance(path, Log):
            return path
        raise TypeError(
            f"got log of type {type(path).__name__}, expected a path, a tracker's name, or an object with "
            "write(record) and close()"
        )
    if path in TRACKERS:
        return open_tracker(str(path))
    if Path(path).suffix == ".csv":
        return CsvLog(Path(path), resumed_step)
    if isinstance(path, str) and os.sep not in path and not os.path.isdir(path):
        near = difflib.get_close_matches(path.lower(), TRACKERS, n=1, cutoff=0.75)
        if near:
            raise ValueError(
                f"got log={path!r}, which looks like the tracker {near[0]!r}; give that name, a .csv file or a "
                f"TensorBoard directory, {f'./{path}'!r} if that is its name"
            )
    return TensorBoardLog(Path(path), resumed_step)


class CsvLog:
    """One line a step; the first line names the columns. Only an earlier log is written over."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        earlier = _earlier_steps(path) if path.is_file() else []
        kept = [row for row in earlier if int(row["step"]) <= resumed_step]
        self._file = path.open("w", newline="", encoding="utf-8")
        self._writer: csv.DictWriter[str] | None = None
        for row in kept:
            self._write(row)

    def write(self, record: Mapping[str, float]) -> None:
        """Append a line."""
        self._write(record)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, row: Mapping[str, Any]) -> None:
        if self._writer is None:
            self._writer = csv.DictWriter(self._file, fieldnames=list(row))
            self._writer.writeheader()
        self._writer.writerow(row)
        self._file.flush()


def _earlier_steps(path: Path) -> list[dict[str, str]]:
    """The lines of an earlier log, none of an empty file.

    Raises:
        ValueError: the file is something else.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = list(csv.reader(file))
    except (UnicodeDecodeError, csv.Error):
        lines = [[]]
    if not lines:
        return []
    header, rows = lines[0], lines[1:]
    ours = header[:2] == ["step", "lr"] and any(name.startswith("loss/") for name in header)
    if not ours or not all(row and row[0].isdecimal() for row in rows):
        raise ValueError(
            f"got log={str(path)!r}, which is there already and is no log of pf.fit; give another name, or move the "
            "file away"
        )
    return [dict(zip(header, row, strict=False)) for row in rows]  # the last line may have been cut short


class TensorBoardLog:
    """A scalar for each column and step."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                f"log={str(path)!r} is a TensorBoard directory, which needs `pip install tensorboard`; "
                "or end it in .csv"
            ) from error
        self._writer = SummaryWriter(str(path), purge_step=resumed_step + 1 if resumed_step else None)

    def write(self, record: Mapping[str, float]) -> None:
        """Add one point to each scalar."""
        for name, value in record.items():
            if name != "step":
                self._writer.add_scalar(name, value, int(record["step"]))

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()
