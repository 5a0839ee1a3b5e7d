"""Solvers by name, with their options checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from paretofuse.engine.solvers.common import Solver
from paretofuse.engine.solvers.cosmos import COSMOS
from paretofuse.engine.solvers.epo import EPO
from paretofuse.engine.solvers.hypervolume import HypervolumeMaximization
from paretofuse.engine.solvers.linear import LinearScalarization
from paretofuse.engine.solvers.mgda import MGDA
from paretofuse.engine.solvers.tchebycheff import SmoothTchebycheff, Tchebycheff
from paretofuse.engine.solvers.torchjd import TorchJD

SOLVERS: dict[str, type] = {
    "ls": LinearScalarization,
    "epo": EPO,
    "tchebycheff": Tchebycheff,
    "stch": SmoothTchebycheff,
    "mgda": MGDA,
    "cosmos": COSMOS,
    "hypervolume": HypervolumeMaximization,
    "torchjd": TorchJD,
}
"""Every solver by the name that `method=` takes."""


def get_solver(method: str | Solver, options: Mapping[str, Any] | None = None) -> Solver:
    """The solver of a name, or the given one.

    Args:
        method: one of SOLVERS, or any callable of Solver's shape.
        options: the solver's own options by name, such as {"tolerance": 1e-3} for "epo"; only with a name.

    Raises:
        ValueError: the name or an option is unknown, or an option is missing.
        TypeError: neither a name nor a callable, or options that are no dict.
    """
    if options is not None and not isinstance(options, Mapping):
        raise TypeError(f"got options of type {type(options).__name__}, expected a dict by option name")
    options = dict(options or {})
    if isinstance(method, str):
        if method not in SOLVERS:
            raise ValueError(f"got method {method!r}, expected one of {sorted(SOLVERS)} or a solver")
        kind = SOLVERS[method]
        known = {field.name: field.default is MISSING for field in fields(kind)}
        unknown = sorted(set(options) - set(known))
        missing = sorted(name for name, needed in known.items() if needed and name not in options)
        if unknown or missing:
            problem = f"unknown options {unknown}" if unknown else f"no {missing}"
            raise ValueError(f"got {problem} for method {method!r}, expected options among {sorted(known)}")
        solver: Solver = kind(**options)
        return solver
    if isinstance(method, type):
        raise TypeError(f"got method {method.__name__}, a class, expected a solver: {method.__name__}(...)")
    if not callable(method):
        raise TypeError(
            f"got method of type {type(method).__name__}, expected a name or a solver (a callable)"
        )
    if options:
        raise ValueError(
            f"got options {sorted(options)} beside a solver, expected none; give them to the solver itself"
        )
    return method
