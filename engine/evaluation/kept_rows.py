"""A sweep's rows on disk as they come, so that a sweep that was cut short goes on where it ended."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from paretofuse.engine.distributed import rank_and_size
from paretofuse.engine.store.atomic import write_file

_SAMPLE = 64
"""Numbers of each tensor that tell one merged model from another."""


class KeptRows:
    """The rows beside a sweep's result: front.partial.csv beside front.csv, until that is written.

    A row counts only for the very model that it was measured on: after more training, or with another store, the same
    preference is evaluated again. With several processes (torchrun) each writes a file of its own and reads all, so any
    number of them goes on. Columns: "preference:NAME" or "coefficient:NAME", "value:METRIC", "model".

    Args:
        out: the result's file.
        objectives: the E objectives, or the names of the D numbers of what else was merged.
        kind: what that is, for the columns.

    Raises:
        ValueError: a file of that name holds something else.
    """

    def __init__(self, out: Path, objectives: Sequence[str], kind: str = "preference") -> None:
        self.path = out.with_name(f"{out.stem}.partial{rank_and_size()[0] or ''}{out.suffix}")
        self._out = out
        self._objectives = tuple(objectives)
        self._kind = kind
        self._rows: dict[tuple[float, ...], dict[str, list[float]]] = {}  # values [M] by preference and model
        self._written = (
            False  # whether the file holds these rows and no others, so that a row may be added to it
        )
        self.metrics: tuple[str, ...] = ()
        for path in self._files():
            self._read(path)

    def at(self, preference: Sequence[float]) -> dict[str, dict[str, float]]:
        """The metrics by name at a preference, for each model that was evaluated there."""
        rows = self._rows.get(tuple(preference), {})
        return {model: dict(zip(self.metrics, row, strict=True)) for model, row in rows.items()}

    def add(
        self, preference: Sequence[float], values: Sequence[float], model: str, metrics: Sequence[str]
    ) -> None:
        """Keep a row, at once: the first writes the file anew, whole or not at all, and later ones are added to it.

        Of a row that was cut short by a crash or a full disk nothing counts.
        """
        self._take_metrics(tuple(metrics))
        self._rows.setdefault(tuple(preference), {})[model] = list(values)
        if self._written:
            with self.path.open("a", encoding="utf-8", newline="") as file:
                file.write(_lines([[*map(repr, preference), *map(repr, values), model]]))
            return
        rows = [
            [*map(repr, shares), *map(repr, numbers), digest]
            for shares, models in self._rows.items()
            for digest, numbers in models.items()
        ]
        write_file(self.path, _lines([self._heading(), *rows]).encode())
        self._written = True

    def finish(self) -> None:
        """The result is written: drop what every process kept."""
        for path in self._files():
            path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        """What the processes of this sweep, or of earlier ones into the same file, keep."""
        files = []
        for path in sorted(self._out.parent.iterdir()):
            rank = path.name.removeprefix(f"{self._out.stem}.partial").removesuffix(self._out.suffix)
            ours = path.name == f"{self._out.stem}.partial{rank}{self._out.suffix}"
            if ours and (rank == "" or rank.isdecimal()):
                files.append(path)
        return files

    def _heading(self) -> list[str]:
        names = [f"{self._kind}:{name}" for name in self._objectives]
        return [*names, *(f"value:{name}" for name in self.metrics), "model"]

    def _take_metrics(self, metrics: tuple[str, ...]) -> None:
        """Rows of other metrics are of another evaluation, and of no use to this one."""
        if metrics != self.metrics:
            self._rows.clear()
            self._written = False
            self.metrics = metrics

    def _read(self, path: Path) -> None:
        wrong = ValueError(
            f"got {str(path)!r}, which does not hold what a sweep of {list(self._objectives)} keeps there; give "
            "another out=, or move that file away"
        )
        count = len(self._objectives)
        try:
            text = path.read_bytes().decode("utf-8")
            heading, *rows = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1], newline="")))
            self._take_metrics(tuple(name.removeprefix("value:") for name in heading[count:-1]))
            if heading != self._heading() or not self.metrics:
                raise wrong
            for row in rows:
                numbers = [float(cell) for cell in row[:-1]]
                if len(row) != len(heading):
                    raise wrong
                self._rows.setdefault(tuple(numbers[:count]), {})[row[-1]] = numbers[count:]
        except (ValueError, csv.Error) as error:  # UnicodeDecodeError is a ValueError
            raise wrong from error


def _lines(rows: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def model_digest(module: torch.nn.Module, evaluate: Callable[..., Any]) -> str:
    """Tells what is evaluated here from other models and other evaluations: numbers of each tensor, spread evenly."""
    sampled = []
    for tensor in (*module.parameters(), *module.buffers()):
        flat = tensor.detach().reshape(-1)
        sampled.append(flat[:: max(1, len(flat) // _SAMPLE)][:_SAMPLE].to(torch.float64))
    digest = hashlib.sha256(getattr(evaluate, "__qualname__", type(evaluate).__qualname__).encode())
    for device in dict.fromkeys(part.device for part in sampled):  # one copy from each device
        digest.update(torch.cat([part for part in sampled if part.device == device]).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
