"""Preferences: how much each objective matters, as E numbers >= 0 that sum to 1. Needs no torch."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, Protocol

import numpy as np

SUM_TOLERANCE = 1e-5
"""How far the sum of a preference may be from 1: above float32 rounding, below any real mistake."""

_GRID_LIMIT = 10_000_000


class ArrayLike(Protocol):
    """A torch tensor, a numpy array or anything else that turns into (nested) lists of numbers."""

    def tolist(self) -> Any:
        """The numbers as (nested) lists."""


Preference = Mapping[str, float] | Sequence[float] | ArrayLike


def as_preference(preference: Preference, objectives: Sequence[str]) -> np.ndarray:
    """Check a preference and bring it into the order of the objectives.

    Args:
        preference: a dict by objective name, a sequence, or a tensor or array [E]. A dict may leave out
            objectives of weight 0, provided that the given ones sum to 1.
        objectives: the E objectives' names, in order.

    Returns:
        The preference as float64 [E], exactly the numbers given (not rescaled).

    Raises:
        ValueError: a wrong length, an unknown name, a negative or non-finite number, or a sum that is not 1.
        TypeError: not a dict, sequence or tensor of numbers.
    """
    objectives = tuple(objectives)
    # A list, as nearly always, needs no search for its kind.
    if type(preference) is not list and isinstance(preference, Mapping):
        unknown = [name for name in preference if name not in objectives]
        if unknown:
            raise ValueError(
                f"got a preference for {_quoted(unknown)}, expected only the objectives "
                f"{_quoted(objectives)}; correct the name"
            )
        missing = [name for name in objectives if name not in preference]
        numbers = [_number(preference.get(name, 0.0), name) for name in objectives]
    else:
        missing = []
        entries = preference if type(preference) is list else _entries(preference)
        if len(entries) != len(objectives):
            raise ValueError(
                f"got a preference of {len(entries)} numbers, expected {len(objectives)}: one for each of "
                f"{_quoted(objectives)}"
            )
        numbers = [_number(value, name) for name, value in zip(objectives, entries, strict=True)]
    for name, number in zip(objectives, numbers, strict=True):
        if not math.isfinite(number):
            raise ValueError(
                f"got {number} for objective {name!r} in preference {_shown(numbers)}, expected finite numbers >= 0"
            )
        if number < 0:
            raise ValueError(
                f"got {number:g} for objective {name!r} in preference {_shown(numbers)}, expected numbers >= 0 "
                "that sum to 1; set it to 0 and divide the rest by their sum"
            )
    total = math.fsum(numbers)
    if abs(total - 1) > SUM_TOLERANCE:
        shown = _shown(numbers)
        if missing:
            remedy = f"give {_quoted(missing)} as well"
            if total > 0:
                remedy += f", or divide by the sum: {_shown([number / total for number in numbers])}"
        elif total > 0 and math.isfinite(total):
            remedy = f"divide by the sum: {_shown([number / total for number in numbers])}"
        else:
            remedy = f"for equal weights use {_shown([1 / len(numbers)] * len(numbers))}"
        raise ValueError(f"got preference {shown} with sum {total:g}, expected a sum of 1; {remedy}")
    return np.array(numbers, dtype=np.float64)


def one_or_several(preference: Any, objectives: Sequence[str]) -> np.ndarray:
    """A checked preference [M], or of several (`is_grid`) [K, M]; ValueError also if there are none."""
    if not is_grid(preference):
        return as_preference(preference, objectives)
    if len(preference) == 0:
        raise ValueError("got no preferences [0, M], expected at least one")
    return np.stack([as_preference(row, objectives) for row in preference])


def by_name(preference: Preference, objectives: Sequence[str]) -> dict[str, float]:
    """Each objective's share of a preference; errors as `as_preference`."""
    return dict(zip(objectives, as_preference(preference, objectives).tolist(), strict=True))


def is_grid(preference: object) -> bool:
    """Whether these are several preferences rather than one.

    Several are a tensor or an array [K, E], such as `simplex_grid` makes, or a list of preferences.
    """
    if isinstance(preference, list | tuple):
        first = preference[0] if preference else 0.0
        return isinstance(first, Mapping | list | tuple) or getattr(first, "ndim", 0) == 1
    return getattr(preference, "ndim", 1) == 2


def simplex_grid(objectives: int, points: int) -> np.ndarray:
    """Evenly spaced preferences (Das and Dennis, 1998): all multiples of 1 / (points - 1) that sum to 1.

    Args:
        objectives: number of objectives E.
        points: grid points along an edge of the simplex, both ends included; at least 2.

    Returns:
        float64 [P, E] with P = binomial(points + E - 2, E - 1), the first axis descending from [1, 0, ..].

    Raises:
        ValueError: fewer than 1 objective or 2 points, or a grid of more than ten million preferences.
        TypeError: not integers.
    """
    try:
        objectives, points = operator.index(objectives), operator.index(points)
    except TypeError:
        raise TypeError(
            f"got {type(objectives).__name__} objectives and {type(points).__name__} points, expected two "
            "integers, as in simplex_grid(2, 11)"
        ) from None
    if objectives < 1:
        raise ValueError(
            f"got {objectives} objectives, expected at least 1; use simplex_grid(len(engine.objectives), 11)"
        )
    if points < 2:
        raise ValueError(f"got {points} points along an edge, expected at least 2 (both ends)")
    steps = points - 1
    count = math.comb(steps + objectives - 1, objectives - 1)
    if count > _GRID_LIMIT:
        raise ValueError(
            f"got a grid of {count} preferences ({objectives} objectives, {points} points), expected at most "
            f"{_GRID_LIMIT}; take fewer points"
        )
    # Stars and bars: E - 1 bars among steps + E - 1 places; the gaps between bars are the shares.
    places = steps + objectives - 1
    bars = np.array(list(combinations(range(places), objectives - 1)), dtype=np.int64).reshape(
        count, objectives - 1
    )
    edges = np.concatenate([np.full((count, 1), -1), bars, np.full((count, 1), places)], axis=1)  # [P, E + 1]
    shares = np.diff(edges, axis=1) - 1  # [P, E], integers that sum to `steps`, first axis ascending
    return shares[::-1].astype(np.float64) / steps


def _entries(preference: Any) -> list[Any]:
    if is_grid(preference):
        raise TypeError(
            f"got {len(preference)} preferences, expected one preference: a number for each objective; take one at a "
            "time"
        )
    if hasattr(preference, "tolist"):
        try:
            preference = preference.tolist()
        except RuntimeError:
            raise TypeError(
                "got a preference whose numbers cannot be read, expected a dense tensor that is not on the meta device"
            ) from None
    if isinstance(preference, str | bytes) or not isinstance(preference, Sequence):
        raise TypeError(
            f"got a preference of type {type(preference).__name__}, expected a dict by objective name, a "
            "sequence or a tensor of one number for each objective"
        )
    return list(preference)


def _number(value: Any, objective: str) -> float:
    if type(value) is float:  # as nearly always: every switch asks
        return value
    try:
        if isinstance(value, str | bytes | bool | list | tuple):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"got {type(value).__name__} for objective {objective!r} in a preference, expected one number"
        ) from None


def _shown(numbers: Sequence[float]) -> str:
    return "[" + ", ".join(f"{number:.6g}" for number in numbers) + "]"


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)
