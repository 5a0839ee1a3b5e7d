"""Coefficients beside preferences: one for each plane in each part of a model, and what a search found with them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from paretofuse.engine.evaluation import indicators
from paretofuse.engine.evaluation.arguments import Point, reference_point
from paretofuse.fronts import choosing, files

if TYPE_CHECKING:
    from torch import Tensor

    from paretofuse.engine.engine import Engine

Parts = int | Callable[[str], str]
"""Into how many parts an engine's groups are cut, in their order; or a group's name -> the name of its part."""


class Coefficients:
    """Where coefficients belong: a number for each of P planes in each of C parts of an engine's groups.

    Args:
        engine: has the groups and the planes.
        parts: a number cuts the groups, in their order, into so many stretches of nearly equal length, named 1, 2, ...;
            a function names each group's part.

    Attributes:
        names: of the D = C P numbers: the plane's, with more parts than one as "part/plane".

    Raises:
        ValueError: there are not so many groups.
        TypeError: `parts` is neither a whole number nor a function that returns names.
    """

    def __init__(self, engine: Engine, parts: Parts = 1) -> None:
        self._of_group = _part_names(engine.groups, parts)
        self.parts = tuple(dict.fromkeys(self._of_group))
        self.planes = tuple(engine.experts)
        single = len(self.parts) == 1
        self.names = tuple(p if single else f"{part}/{p}" for part in self.parts for p in self.planes)

    @property
    def identity(self) -> str:
        """Tells it from other parts of the same engine."""
        return "\n".join([*self.names, *self._of_group])

    def weights(self, coefficients: Sequence[float] | np.ndarray) -> Tensor:
        """The routing weights [G, P] in float32 that coefficients [D] stand for."""
        import torch

        table = np.asarray(coefficients, dtype=np.float32).reshape(len(self.parts), len(self.planes))
        return torch.from_numpy(table[[self.parts.index(part) for part in self._of_group]])


class CoefficientChoice(NamedTuple):
    """One point of a coefficient front.

    Attributes:
        weights: [G, P] float32, as `engine.switch(weights=...)` and `engine.merge(weights=...)` take them.
        coefficients: the same as numbers by name.
        values: the metrics by name.
    """

    weights: Tensor
    coefficients: dict[str, float]
    values: dict[str, float]


@dataclass(frozen=True, eq=False)
class CoefficientFront:
    """Values of M metrics at P sets of coefficients; made by `pf.search_coefficients`.

    Attributes:
        coefficients: [P, D] float64.
        values: [P, M] float64.
        names: of the D coefficients: the plane's, with more parts than one as "part/plane".
        metrics: names of the M metrics.
        directions: for each metric, whether larger is better.
        layout: which coefficient belongs where in the engine.
    """

    coefficients: np.ndarray
    values: np.ndarray
    names: tuple[str, ...]
    metrics: tuple[str, ...]
    directions: tuple[bool, ...]
    layout: Coefficients

    def __len__(self) -> int:
        return len(self.coefficients)

    def hypervolume(self, ref: Point) -> float:
        """The hypervolume between the front and a reference point, exactly, as of `Front.hypervolume`.

        Raises:
            ValueError: the reference point does not fit the metrics or is not finite; or there are too many points.
        """
        return indicators.exact_hypervolume(self.values, reference_point(ref, self.metrics), self.directions)

    def non_dominated(self) -> np.ndarray:
        """[P] booleans: no other point is as good everywhere and better somewhere; all of a tie count."""
        return indicators.non_dominated(self.values, self.directions)

    def choose(
        self,
        *,
        at_most: Mapping[str, float] | None = None,
        at_least: Mapping[str, float] | None = None,
        best: str | None = None,
    ) -> CoefficientChoice:
        """The point within bounds that is best in a metric, or the knee; `engine.merge(weights=...)` takes its weights.

        Args: as of `Front.choose`.

        Raises:
            ValueError: a name is no metric of the front, a bound is not finite, or no point is within all bounds.
        """
        row = choosing.choose_row(self, at_most or {}, at_least or {}, best)
        numbers = self.coefficients[row].tolist()
        return CoefficientChoice(
            self.layout.weights(numbers),
            dict(zip(self.names, numbers, strict=True)),
            dict(zip(self.metrics, self.values[row].tolist(), strict=True)),
        )

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the front as UTF-8 CSV, making missing parents; `from_csv` gives the very same numbers back.

        Columns: "coefficient:NAME" for each coefficient, "maximize:NAME" or "minimize:NAME" for each metric.
        """
        files.write_table(
            path,
            "coefficient",
            files.Table(self.coefficients, self.values, self.names, self.metrics, self.directions),
        )

    @classmethod
    def from_csv(cls, path: str | os.PathLike[str], engine: Engine, *, parts: Parts = 1) -> CoefficientFront:
        """Read what `to_csv` wrote, for the engine and the parts that it was searched with.

        Raises:
            ValueError: the file is not such a table, or of other coefficients than those of engine and parts.
        """
        layout, table = Coefficients(engine, parts), files.read_table(path, "coefficient")
        if table.names != layout.names:
            raise ValueError(
                f"got {str(path)!r} with the coefficients {list(table.names)}, expected {list(layout.names)}; give the "
                "engine and the parts= that it was searched with"
            )
        return cls(*table, layout)


def _part_names(groups: Sequence[str], parts: Parts) -> list[str]:
    """Each group's part."""
    if callable(parts):
        named = [parts(group) for group in groups]
        for group, name in zip(groups, named, strict=True):
            if not isinstance(name, str):
                raise TypeError(f"got {name!r} from parts for the group {group!r}, expected its part's name")
        return named
    if isinstance(parts, bool) or not isinstance(parts, int):
        raise TypeError(f"got parts={parts!r}, expected a whole number, or a function from group to part")
    if not 1 <= parts <= len(groups):
        raise ValueError(f"got parts={parts}, expected 1 to {len(groups)}, as many as there are groups")
    return [str(at * parts // len(groups) + 1) for at in range(len(groups))]
