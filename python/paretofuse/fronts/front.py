"""Fronts: what every preference of a sweep reached, and what the field measures on it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from paretofuse.engine.evaluation import indicators
from paretofuse.engine.evaluation.arguments import (
    Point,
    check_writable,
    directions,
    reference_point,
)
from paretofuse.engine.evaluation.wrong_directions import against_preferences
from paretofuse.engine.routing.preference import as_preference
from paretofuse.fronts import choosing, files, table
from paretofuse.fronts.choosing import Choice

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
        ValueError: shapes or names do not fit together, a row is no preference, or a number is not finite.
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
            check_writable(kind, names)
            if len(set(names)) != len(names):
                raise ValueError(
                    f"got {kind} {list(names)}, expected different names; rename the repeated ones"
                )
        for row in preferences.tolist():
            as_preference(row, objectives)
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
        """What one should know about the front, a sentence each, such as metrics that run against their preferences."""
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
        return choosing.point(self, choosing.choose_row(self, {}, {}, metric))

    def knee(self) -> Choice:
        """The point that gives up least: farthest beyond the straight line between the front's ends (Das, 1999).

        It has the largest sum of metrics, each scaled to 0 at its worst and 1 at its best point that is not dominated.
        """
        return choosing.point(self, choosing.choose_row(self, {}, {}, None))

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
        return choosing.point(self, choosing.choose_row(self, at_most or {}, at_least or {}, best))

    def share_non_dominated(self, *, repeats: bool = False) -> float:
        """The share of preferences that no other dominates; points equal to an earlier one count only if `repeats`."""
        return indicators.share_non_dominated(self.values, self.directions, repeats)

    def non_dominated(self) -> np.ndarray:
        """[P] booleans: no other point is as good everywhere and better somewhere; all of a tie count."""
        return indicators.non_dominated(self.values, self.directions)

    def filtered(self) -> Front:
        """The front without its dominated points."""
        keep = self.non_dominated()
        return Front(self.preferences[keep], self.values[keep], self.objectives, self.metrics, self.maximize)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the front as UTF-8 CSV, making missing parents; `from_csv` gives the very same numbers back.

        Columns: "preference:NAME" for each objective, "maximize:NAME" or "minimize:NAME" for each metric.
        """
        columns = files.Table(self.preferences, self.values, self.objectives, self.metrics, self.directions)
        files.write_table(path, "preference", columns)

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
        return cls(*files.read_table(path, "preference"))

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

    def to_html(
        self,
        path: str | os.PathLike[str],
        *,
        points: Mapping[str, Sequence[float] | np.ndarray] | None = None,
        others: Mapping[str, Front] | None = None,
        title: str | None = None,
    ) -> None:
        """Write the front as one HTML file to explore, making missing parents; it opens without a server or a network.

        The page draws what `plot` does, to click and drag on, with sliders for the preference, choice by constraint,
        and the commands that give the model there. Between measured preferences it shows values that are linear
        between their neighbours (of the Delaunay triangulation), and says so.

        Args:
            path: the file.
            points: values [M] of single models by label: the base, averages.
            others: further fronts by label, on the same metrics.
            title: the page's heading.

        Raises:
            ImportError: plotly is missing, whose JavaScript is written into the file (5 MB).
            ValueError: points or others do not have this front's metrics.
        """
        from paretofuse.fronts.html import write_html

        write_html(self, path, points=points, others=others, title=title)


def _table(what: str, given: Any, width: int, of: str) -> np.ndarray:
    cells = np.array(given, dtype=np.float64)
    if cells.ndim != 2 or cells.shape[1] != width or width == 0 or len(cells) == 0:
        raise ValueError(f"got {what} of shape {cells.shape}, expected [P, {width}], a column for each {of}")
    if not np.isfinite(cells).all():
        row, column = (int(i) for i in np.argwhere(~np.isfinite(cells))[0])
        raise ValueError(f"got {cells[row, column]} in {what}[{row}, {column}], expected finite numbers")
    cells.setflags(write=False)
    return cells
