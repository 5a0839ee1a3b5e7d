"""Fronts: what every preference of a sweep reached, and what the field measures on it."""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import moocore
import numpy as np

from paretofuse.engine.evaluation import indicators
from paretofuse.engine.evaluation.arguments import (
    Maximize,
    Point,
    check_function,
    directions,
    plain_maximize,
    reference_point,
)
from paretofuse.engine.evaluation.wrong_directions import against_preferences
from paretofuse.engine.routing.preference import as_preference, simplex_grid
from paretofuse.fronts import choosing, table
from paretofuse.fronts.choosing import Choice
from paretofuse.outputs import prepare_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from paretofuse.engine.evaluation.sweep import Evaluate, Switchable

_CSV_KINDS = ("preference", "maximize", "minimize")


@dataclass(frozen=True, eq=False)
class Front:
    """Values of M metrics at P preferences over E objectives.

    Attributes:
        preferences: [P, E] float64, rows on the simplex; read-only.
        values: [P, M] float64, finite; read-only.
        objectives: names of the E objectives.
        metrics: names of the M metrics.
        maximize: whether larger values are better; a tuple of M booleans where metrics differ in that.

    Raises:
        ValueError: shapes or names do not fit together, or a number is not finite.
        TypeError: `maximize` holds something else than booleans.
    """

    preferences: np.ndarray
    values: np.ndarray
    objectives: tuple[str, ...]
    metrics: tuple[str, ...]
    maximize: bool | tuple[bool, ...] = True

    def __post_init__(self) -> None:
        objectives, metrics = tuple(self.objectives), tuple(self.metrics)
        preferences = _table("preferences", self.preferences, len(objectives), "objective")
        values = _table("values", self.values, len(metrics), "metric")
        if len(preferences) != len(values):
            raise ValueError(
                f"got {len(preferences)} preferences and {len(values)} rows of values, expected equal numbers"
            )
        for kind, names in (("objectives", objectives), ("metrics", metrics)):
            if len(set(names)) != len(names):
                raise ValueError(
                    f"got {kind} {list(names)}, expected different names; rename the repeated ones"
                )
        object.__setattr__(self, "preferences", preferences)
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "objectives", objectives)
        object.__setattr__(self, "metrics", metrics)
        larger = directions(self.maximize, metrics)
        object.__setattr__(self, "maximize", larger[0] if len(set(larger)) == 1 else larger)

    def __len__(self) -> int:
        return len(self.preferences)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Front):
            return NotImplemented
        same_names = (self.objectives, self.metrics, self.maximize) == (
            other.objectives,
            other.metrics,
            other.maximize,
        )
        return (
            same_names
            and np.array_equal(self.preferences, other.preferences)
            and np.array_equal(self.values, other.values)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        """The table, which says as well which way is better and what is dominated."""
        return table.as_text(self)

    def _repr_html_(self) -> str:
        """The table, as notebooks show it."""
        return table.as_html(self)

    @property
    def directions(self) -> tuple[bool, ...]:
        """For each of the M metrics, whether larger is better."""
        return self.maximize if isinstance(self.maximize, tuple) else (self.maximize,) * len(self.metrics)

    @property
    def notes(self) -> tuple[str, ...]:
        """What one should know about the front, a sentence each: metrics that run against their preferences."""
        note = against_preferences(
            self.preferences, self.values, self.objectives, self.metrics, self.directions
        )
        return () if note is None else (note,)

    def hypervolume(self, ref: Point) -> float:
        """The hypervolume between the front and a reference point, exactly (moocore).

        Args:
            ref: the reference point: a number for each metric in order, a dict by metric name, or one number
                for all. Points that do not beat it in every metric add nothing.

        Raises:
            ValueError: the reference point does not fit the metrics or is not finite; or there are too many points
                in too many metrics, as for a hundred points in 9 of them.
        """
        return indicators.exact_hypervolume(self.values, reference_point(ref, self.metrics), self.directions)

    def hypervolume_estimate(
        self, ref: Point, *, samples: int = 100_000, seed: int = 0
    ) -> tuple[float, float]:
        """The hypervolume by Monte Carlo and its standard error, for fronts of many metrics.

        Args:
            ref: the reference point, as for `hypervolume`.
            samples: how many; the error falls with their root.
            seed: of the samples; the same seed gives the same estimate.
        """
        return indicators.estimate_hypervolume(
            self.values, reference_point(ref, self.metrics), self.directions, samples, seed
        )

    def spacing(self) -> float:
        """How unevenly the points lie (Schott, 1995), in the metrics' units; 0 is even."""
        return indicators.spacing(self.values)

    def spread(self, span: Sequence[float] | None = None) -> float:
        """How far the points reach, as a share of `span` [M] (1 if None); 0 where all preferences give one model."""
        return indicators.spread(self.values, span)

    def rank_correlation(self) -> dict[str, float]:
        """For each objective, Spearman's correlation of its preference with its metric, signed so that 1 is best.

        Metrics are matched with objectives by name, or in order where the names differ.

        Raises:
            ValueError: there is not one metric for each objective.
        """
        if len(self.metrics) != len(self.objectives):
            raise ValueError(
                f"got metrics {list(self.metrics)} for objectives {list(self.objectives)}, expected one for each; "
                "make a Front of the metrics that belong to them"
            )
        named = set(self.metrics) == set(self.objectives)
        columns = [self.metrics.index(name) if named else i for i, name in enumerate(self.objectives)]
        signs = [self.directions[column] for column in columns]
        found = indicators.rank_correlation(self.preferences, self.values[:, columns], signs)
        return dict(zip(self.objectives, found.tolist(), strict=True))

    def best(self, metric: str) -> Choice:
        """The point that is best in a metric: `engine.switch(front.best("poems").preference)`.

        Raises:
            ValueError: the front has no such metric.
        """
        return choosing.choose(self, {}, {}, metric)

    def knee(self) -> Choice:
        """The point that gives up least: farthest beyond the straight line between the front's ends (Das, 1999).

        It has the largest sum of metrics, each scaled to 0 at its worst and 1 at its best point that is not dominated.
        """
        return choosing.choose(self, {}, {}, None)

    def choose(
        self,
        *,
        at_most: Mapping[str, float] | None = None,
        at_least: Mapping[str, float] | None = None,
        best: str | None = None,
    ) -> Choice:
        """The point within bounds that is best in a metric: `front.choose(at_most={"news": 30.0}, best="poems")`.

        Args:
            at_most: upper bounds by metric.
            at_least: lower bounds by metric.
            best: the metric to be best in; the knee of the points within the bounds if None.

        Raises:
            ValueError: a name is no metric of the front, a bound is not finite, or no point is within all bounds.
        """
        return choosing.choose(self, at_most or {}, at_least or {}, best)

    def share_non_dominated(self, *, repeats: bool = False) -> float:
        """The share of preferences that no other dominates; points equal to an earlier one count only if `repeats`."""
        return indicators.share_non_dominated(self.values, self.directions, repeats)

    def non_dominated(self) -> np.ndarray:
        """[P] booleans: no other point is as good everywhere and better somewhere; all of a tie count."""
        mask = moocore.is_nondominated(self.values, maximise=list(self.directions), keep_weakly=True)
        return np.asarray(mask, dtype=bool)

    def filtered(self) -> Front:
        """The front without its dominated points."""
        keep = self.non_dominated()
        return Front(self.preferences[keep], self.values[keep], self.objectives, self.metrics, self.maximize)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the front as UTF-8 CSV, making missing parents; `from_csv` gives the very same numbers back.

        Columns: "preference:NAME" for each objective, "maximize:NAME" or "minimize:NAME" for each metric.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            with open(beside, "w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(table.header(self))
                for row in np.hstack([self.preferences, self.values]).tolist():
                    writer.writerow([repr(number) for number in row])
            os.replace(beside, target)
        finally:
            beside.unlink(missing_ok=True)

    def to_pandas(self) -> Any:
        """A pandas DataFrame, a row for each preference, with the columns of `to_csv`.

        Raises:
            ImportError: pandas is missing.
        """
        return table.as_frame(self)

    @classmethod
    def from_csv(cls, path: str | os.PathLike[str]) -> Front:
        """Read what `to_csv` wrote.

        Raises:
            ValueError: the file is not such a table; names the line.
        """
        with open(path, encoding="utf-8", newline="") as file:
            rows = [row for row in csv.reader(file) if row]
        columns = [tuple(cell.split(":", 1)) for cell in rows[0]] if rows else []
        kinds = [column[0] for column in columns]
        share = kinds.count("preference")
        ordered = kinds[:share] == ["preference"] * share and 0 < share < len(kinds)
        if not ordered or any(len(column) != 2 or column[0] not in _CSV_KINDS for column in columns):
            raise ValueError(
                f"got {str(path)!r} with header {rows[0] if rows else []}, expected columns preference:NAME, "
                "then maximize:NAME or minimize:NAME; is it a file that Front.to_csv wrote?"
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
        names = [column[1] for column in columns]
        directions = tuple(kind == "maximize" for kind in kinds[share:])
        return cls(cells[:, :share], cells[:, share:], tuple(names[:share]), tuple(names[share:]), directions)

    def plot(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        ax: Axes | None = None,
        points: Mapping[str, Sequence[float] | np.ndarray] | None = None,
        others: Mapping[str, Front] | None = None,
        label: str = "this front",
        title: str | None = None,
    ) -> Figure:
        """Draw the front: 2 objectives as a curve, 3 as ternary heat maps, more as parallel coordinates.

        Args:
            path: where to save the picture; the suffix (.png, .svg, .pdf) says how; missing parents are
                made. Not saved if None.
            ax: draw into these axes instead of a new figure; not for ternary heat maps, which need several.
            points: values [M] of single models by label: experts, the base, averages.
            others: further fronts by label, on the same metrics.
            label: this front's own name in the legend.
            title: written above.

        Raises:
            ImportError: matplotlib is missing.
            ValueError: points or others do not have this front's metrics.
        """
        try:
            from paretofuse.fronts import plots
        except ImportError as error:
            raise ImportError(
                "Front.plot needs matplotlib, which is not installed; pip install 'paretofuse[plot]'"
            ) from error
        return plots.plot_front(self, path, ax=ax, points=points, others=others, label=label, title=title)


def sweep(
    engine: Switchable,
    evaluate: Evaluate,
    preferences: Sequence[Any] | np.ndarray | None = None,
    *,
    maximize: Maximize = True,
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
    on_metrics: Callable[[tuple[str, ...]], object] | None = None,
) -> Front:
    """Merge and evaluate a model for each preference.

    Metrics that get worse as their objective's preference grows are logged as a warning (logger "paretofuse") and stay
    in the front's `notes`: `maximize` is probably wrong.

    Args:
        engine: the engine; switched in place, and left at the last preference.
        evaluate: called with the live module in eval mode, without gradients; returns its metrics as a dict
            of numbers by name, or as a sequence of numbers (one for each objective, in order).
        preferences: [P, E], or a sequence of preferences in any form; a grid of the simplex if None
            (11 points for 2 objectives).
        maximize: whether larger metrics are better (accuracy), True as everywhere, or smaller ones (loss); for each
            metric if they differ, in order or by name.
        out: a CSV file for the front, as by `Front.to_csv`; an earlier front there is replaced at the end. Until then
            each row is kept as it comes in a file beside it (front.partial.csv for front.csv): after an interruption or
            an error the same call goes on there, and evaluates again only what the engine merges differently now.
        progress: show a progress bar where stderr is a terminal.
        on_metrics: called with the metrics' names after the first evaluation; what it raises ends the sweep there.

    Raises:
        ValueError: a preference is invalid, or `out` is there and no front (both before anything is evaluated),
            `maximize` does not fit the metrics (after the first evaluation), or a metric is not finite.
        TypeError: `engine` is none, `evaluate` is no function, `maximize` holds something else than booleans (before
            anything is evaluated), or `evaluate` returned no numbers.
        OSError: `out` cannot be written (before anything is evaluated).
    """
    # The only part of this file that needs torch.
    from paretofuse.engine.distributed import rank_and_size
    from paretofuse.engine.evaluation.kept_rows import KeptRows
    from paretofuse.engine.evaluation.sweep import evaluate_preferences

    if not all(hasattr(engine, name) for name in ("objectives", "module", "switch")):
        raise TypeError(
            f"got {type(engine).__name__} to sweep, expected an engine that pf.stack or pf.load made"
        )
    check_function("evaluate", evaluate, "evaluate(module) that returns metrics")
    plain_maximize(maximize)
    objectives = tuple(engine.objectives)
    grid = default_preferences(len(objectives)) if preferences is None else _grid(preferences, objectives)
    kept = None
    if out is not None:
        _check_replaceable(Path(out))
        kept = KeptRows(Path(out), objectives)

    def check(metrics: tuple[str, ...]) -> None:
        directions(maximize, metrics)
        if on_metrics is not None:
            on_metrics(metrics)

    try:
        values, metrics = evaluate_preferences(engine, evaluate, grid, progress, check, kept)
    except BaseException as error:
        if kept is not None and kept.path.exists() and hasattr(error, "add_note"):  # Python 3.11
            error.add_note(f"the rows until then are kept in {kept.path}; the same sweep goes on from there")
        raise
    front = Front(grid, values, objectives, metrics, directions(maximize, metrics))
    if kept is not None and out is not None and rank_and_size()[0] == 0:
        front.to_csv(out)
        kept.finish()
    if rank_and_size()[0] == 0:
        for note in front.notes:
            logging.getLogger("paretofuse").warning("sweep: %s", note)
    return front


def _grid(preferences: Sequence[Any] | np.ndarray, objectives: tuple[str, ...]) -> np.ndarray:
    """Preferences in any form as [P, E] float64."""
    if not hasattr(preferences, "__len__"):
        raise TypeError(
            f"got preferences={preferences!r}, expected a sequence of them, such as pf.simplex_grid(E, points)"
        )
    grid = np.array([as_preference(row, objectives) for row in preferences], dtype=np.float64)
    if len(grid) == 0:
        raise ValueError("got no preferences, expected at least one; leave them out for a default grid")
    return grid


def _check_replaceable(out: Path) -> None:
    """A sweep writes over a front, and over nothing else; whether it can is tried before the long work."""
    prepare_file(out)
    if out.exists() and out.stat().st_size > 0:
        try:
            Front.from_csv(out)
        except ValueError as error:
            raise ValueError(
                f"got out={str(out)!r}, which is there already and is no front; give another name, or move the file "
                "away"
            ) from error


def default_preferences(objectives: int) -> np.ndarray:
    """A grid of the simplex that is quick enough to sweep: [P, E]; 11 rows for E = 2, 136 for E = 16."""
    points = {2: 11, 3: 8, 4: 5, 5: 4}.get(objectives, 3)
    return np.asarray(simplex_grid(objectives, points), dtype=np.float64)


def _table(what: str, given: Any, width: int, of: str) -> np.ndarray:
    cells = np.array(given, dtype=np.float64)
    if cells.ndim != 2 or cells.shape[1] != width or width == 0 or len(cells) == 0:
        raise ValueError(f"got {what} of shape {cells.shape}, expected [P, {width}], a column for each {of}")
    if not np.isfinite(cells).all():
        row, column = (int(i) for i in np.argwhere(~np.isfinite(cells))[0])
        raise ValueError(f"got {cells[row, column]} in {what}[{row}, {column}], expected finite numbers")
    cells.setflags(write=False)
    return cells
