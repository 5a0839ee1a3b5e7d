"""Any aggregator of the library torchjd as a solver (optional extra: paretofuse[torchjd])."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor

from paretofuse.engine.solvers.common import check_inputs


@dataclass(frozen=True)
class TorchJD:
    """Hand the Jacobian, as a matrix [M, G * E], to an aggregator that returns a vector [G * E].

    Source: Quinton and Rey, "Jacobian descent for multi-objective optimization", arXiv 2406.16232 (UPGrad), and
    each aggregator's own. Aggregators that keep state from step to step are not part of a checkpoint.

    Attributes:
        aggregator: the name of a class of torchjd.aggregation, such as "UPGrad"; or any callable from a matrix to
            a vector; or, with preference="vector", a callable from the preference [M] to such a callable.
        preference: "scale" multiplies each gradient by its preference first, "vector" gives the preference to the
            aggregator's own argument `pref_vector`, "ignore" does neither.
    """

    aggregator: str | Callable[[Tensor], Any]
    preference: Literal["scale", "vector", "ignore"] = "scale"

    def __post_init__(self) -> None:
        if self.preference not in ("scale", "vector", "ignore"):
            raise ValueError(f'got preference={self.preference!r}, expected "scale", "vector" or "ignore"')
        if isinstance(self.aggregator, str):
            object.__setattr__(self, "aggregator", _named(self.aggregator, self.preference == "vector"))
        elif not callable(self.aggregator):
            raise TypeError(
                f"got aggregator of type {type(self.aggregator).__name__}, expected a class name of "
                "torchjd.aggregation or a callable from a matrix to a vector"
            )

    def __call__(self, losses: Tensor, jacobian: Tensor, preference: Tensor) -> Tensor:
        """The aggregator's direction, [G, P]; see Solver.

        Raises:
            ValueError: shapes do not fit together, a number is not finite, or the aggregator returned another
                shape than [G * E].
        """
        check_inputs(losses, jacobian, preference)
        matrix = jacobian.detach().to("cpu", torch.float64).flatten(1)
        share = preference.detach().to("cpu", torch.float64)
        aggregate: Any = self.aggregator
        if self.preference == "vector":
            aggregate = aggregate(share)
        elif self.preference == "scale":
            matrix = matrix * share[:, None]
        direction = aggregate(matrix)
        if not isinstance(direction, Tensor) or direction.shape != matrix.shape[1:]:
            raise ValueError(
                f"got {tuple(getattr(direction, 'shape', ()))} ({type(direction).__name__}) from {aggregate}, expected "
                f"a vector [{matrix.shape[1]}]; for a factory that takes the preference use preference='vector'"
            )
        return direction.detach().reshape(jacobian.shape[1:]).to(jacobian.device, jacobian.dtype)


def _named(name: str, with_preference: bool) -> Callable[[Tensor], Any]:
    try:
        library = import_module("torchjd.aggregation")
    except ImportError as error:
        raise ImportError(
            f"aggregator {name!r} needs torchjd, which is not installed; pip install 'paretofuse[torchjd]'"
        ) from error
    known = [kind for kind in library.__all__ if issubclass(getattr(library, kind), library.Aggregator)]
    if name not in known:
        raise ValueError(f"got aggregator {name!r}, expected one of torchjd's {sorted(known)}")
    kind = getattr(library, name)
    if with_preference:
        return lambda share: kind(pref_vector=share)
    try:
        return kind()  # type: ignore[no-any-return]
    except TypeError as error:
        raise ValueError(
            f"got aggregator {name!r}, which needs arguments ({error}); give the object instead, as in "
            f"TorchJD(torchjd.aggregation.{name}(...))"
        ) from error
