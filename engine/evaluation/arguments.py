"""What a user says about metrics - which way is better, a reference point - brought into their order. Needs no torch.

Larger is better unless told otherwise: in `pf.sweep`, `pf.Validation`, `pf.Front` and on the command line alike.
Metrics have names only once something was evaluated, so the kind of what was given is checked before that, and the
names after it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Maximize = bool | Sequence[bool] | Mapping[str, bool]
"""Whether larger is better: for all metrics, or for each in order or by name."""

Point = float | Sequence[float] | Mapping[str, float]
"""A value of all metrics, or of each in order or by name."""


def plain_maximize(maximize: Any) -> bool | list[bool] | dict[str, bool]:
    """Check the kind of `maximize`; numpy's and torch's booleans become Python's.

    Raises:
        TypeError: not a boolean, nor a sequence of them, nor a dict of them by metric name.
    """
    if isinstance(maximize, Mapping):
        return {_name(name, "maximize"): _flag(value, maximize) for name, value in maximize.items()}
    given = _listed(maximize)
    return [_flag(value, maximize) for value in given] if isinstance(given, list) else _flag(given, maximize)


def directions(maximize: Any, metrics: Sequence[str]) -> tuple[bool, ...]:
    """For each of the M metrics, whether larger is better.

    Raises:
        TypeError: as `plain_maximize`.
        ValueError: not one for each metric.
    """
    plain = plain_maximize(maximize)
    if isinstance(plain, bool):
        return (plain,) * len(metrics)
    if isinstance(plain, dict):
        if set(plain) != set(metrics):
            raise ValueError(
                f"got maximize for {sorted(plain)}, expected it for the metrics {sorted(metrics)}"
            )
        return tuple(plain[name] for name in metrics)
    if len(plain) != len(metrics):
        raise ValueError(
            f"got {len(plain)} entries in maximize, expected one for each of {list(metrics)} or one bool"
        )
    return tuple(plain)


def check_function(name: str, given: Any, expected: str) -> None:
    """Check that an argument is a function.

    Raises:
        TypeError: it is not.
    """
    if not callable(given):
        raise TypeError(f"got {name}={given!r} ({type(given).__name__}), expected a function {expected}")


def check_writable(kind: str, names: Sequence[str]) -> None:
    """Check names of objectives or metrics, which stand in tables.

    Raises:
        ValueError: one holds a zero byte, which no table of text can.
    """
    if any("\0" in name for name in names):
        raise ValueError(
            f"got {kind} {list(names)}, expected names without a zero byte; rename the one that has it"
        )


def plain_point(point: Any) -> float | list[float] | dict[str, float]:
    """Check the kind of a reference point; tensors and arrays become numbers.

    Raises:
        TypeError: not a number, nor a sequence of them, nor a dict of them by metric name.
        ValueError: a number is not finite.
    """
    if isinstance(point, Mapping):
        return {_name(name, "a reference point"): _number(value, point) for name, value in point.items()}
    given = _listed(point)
    return [_number(value, point) for value in given] if isinstance(given, list) else _number(given, point)


def reference_point(point: Any, metrics: Sequence[str]) -> list[float]:
    """A number for each of the M metrics.

    Raises:
        TypeError: as `plain_point`.
        ValueError: not one for each metric, or not finite.
    """
    plain = plain_point(point)
    if isinstance(plain, float):
        return [plain] * len(metrics)
    if isinstance(plain, dict):
        if set(plain) != set(metrics):
            raise ValueError(f"got a reference point for {sorted(plain)}, expected one for {sorted(metrics)}")
        return [plain[name] for name in metrics]
    if len(plain) != len(metrics):
        raise ValueError(
            f"got reference point {point}, expected {len(metrics)} finite numbers, one for each of "
            f"{list(metrics)}; give the worst value that still counts"
        )
    return plain


def _listed(given: Any) -> Any:
    """A list where numbers come in sequence, else what it is; arrays and tensors without dimensions are numbers."""
    if hasattr(given, "tolist"):
        return given.tolist()
    return list(given) if isinstance(given, Sequence) and not isinstance(given, str | bytes) else given


def _name(name: Any, what: str) -> str:
    if not isinstance(name, str):
        raise TypeError(f"got the key {name!r} in {what}, expected the name of a metric")
    return name


def _flag(value: Any, maximize: Any) -> bool:
    plain = _listed(value)
    if not isinstance(plain, bool):
        raise TypeError(
            f"got maximize={maximize!r}, expected True or False, a sequence of them in the metrics' order, or a dict "
            "by metric name"
        )
    return plain


def _number(value: Any, point: Any) -> float:
    plain = _listed(value)
    if isinstance(plain, bool) or not isinstance(plain, int | float):
        raise TypeError(
            f"got reference point {point!r}, expected a number, a sequence of them in the metrics' order, or a dict "
            "by metric name"
        )
    if not np.isfinite(plain):
        raise ValueError(f"got reference point {point!r}, expected finite numbers")
    return float(plain)


def finite_bounds(option: str, bounds: Mapping[str, float]) -> dict[str, float]:
    """The bounds of `at_most` or `at_least`, by metric.

    Raises:
        TypeError: they are no dict, or one is no number.
        ValueError: one is not finite.
    """
    if not isinstance(bounds, Mapping):
        raise TypeError(f"got {option}={bounds!r}, expected a dict {{metric: bound}}")
    numbers = {}
    for name, bound in bounds.items():
        try:
            numbers[name] = float(bound)
        except (TypeError, ValueError):
            raise TypeError(f"got {option}={{{name!r}: {bound!r}}}, expected a number") from None
        if not math.isfinite(numbers[name]):
            raise ValueError(f"got {option}={{{name!r}: {bound}}}, expected a finite number")
    return numbers
