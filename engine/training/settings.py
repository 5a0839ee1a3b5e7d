"""The numbers of a training run, and the learning rate that they give."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from paretofuse.engine.distributed import rank_and_size
from paretofuse.engine.routing.families import check_family
from paretofuse.engine.routing.sampling import SamplerName

ROWS_ONLY = ("row_lr", "row_shrinkage")
"""The settings that runs without row coefficients do not have."""

PLANES_ONLY = ("plane_lr", "plane_shrinkage", "plane_orthogonality")
"""Those that runs without trained planes do not have."""

_LEAST = {"steps": 1, "corner_every": 0, "preferences_per_step": 1, "accumulate": 1, "seed": 0, "sketch": 1}
"""The whole numbers among the settings, and the least that each may be."""

LAST_SEED = 2**63 - 1
"""The largest number that torch's generators start from."""


@dataclass(frozen=True)
class Settings:
    """What a run's result depends on besides the engine, the data and the solver; the arguments of `pf.fit`."""

    steps: int
    lr: float
    lr_end: float
    sampler: SamplerName
    alpha: float
    corner_every: int
    preferences_per_step: int
    accumulate: int
    seed: int
    regularization: float = 0.0
    family: str = "scalar"
    row_lr: float = 3e-2
    row_shrinkage: float = 0.0
    plane_lr: float = 3e-3
    plane_shrinkage: float = 0.0
    plane_orthogonality: float = 0.0
    sketch: int | None = None

    def check(self) -> None:
        """Raise TypeError unless each is of its kind, and ValueError unless it is in its range."""
        for name in (field.name for field in fields(self) if field.name not in ("sampler", "family")):
            if name != "sketch" or self.sketch is not None:
                check_number(
                    name, getattr(self, name), _LEAST.get(name), LAST_SEED if name == "seed" else None
                )
        check_family(self.family)
        for name in ("lr", "alpha", "row_lr", "plane_lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"got {name}={getattr(self, name)}, expected a number above 0")
        if not 0 <= self.lr_end <= 1:
            raise ValueError(f"got lr_end={self.lr_end}, expected a share of lr from 0 to 1")
        for name in ("regularization", "row_shrinkage", "plane_shrinkage", "plane_orthogonality"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"got {name}={getattr(self, name)}, expected a number of at least 0")
        for kind, rate, share in (
            ("row", self.row_lr, self.row_shrinkage),
            ("plane", self.plane_lr, self.plane_shrinkage),
        ):
            if rate * share > 1:
                raise ValueError(
                    f"got {kind}_shrinkage={share} at {kind}_lr={rate}, expected at most 1 / {kind}_lr, where a step "
                    f"takes all of the {'row coefficients' if kind == 'row' else 'trained planes'} away"
                )
        if self.plane_lr * self.plane_orthogonality > 1:
            raise ValueError(
                f"got plane_orthogonality={self.plane_orthogonality} at plane_lr={self.plane_lr}, expected at most 1 / "
                "plane_lr, beyond which a step turns planes too far"
            )
        size = rank_and_size()[1]
        if self.accumulate < size:
            raise ValueError(
                f"got accumulate={self.accumulate} with {size} processes, which share out a step's batches: each "
                f"needs one; pass accumulate={size} or more"
            )

    def rate(self, step: int, start: float | None = None) -> float:
        """The learning rate of a step (from 0): a cosine from the start (`lr` unless told) down to its lr_end."""
        start = self.lr if start is None else start
        return start * (self.lr_end + (1 - self.lr_end) * (1 + math.cos(math.pi * step / self.steps)) / 2)


def check_number(name: str, value: object, least: int | None = None, most: int | None = None) -> None:
    """Check an argument that is a whole number of at least `least`, or any finite number where that is None.

    Raises:
        TypeError: it is of another kind.
        ValueError: it is below `least`, above `most`, or not finite.
    """
    kind = "a number" if least is None else "a whole number"
    plain = value.item() if type(value).__module__ == "numpy" and hasattr(value, "item") else value
    if isinstance(plain, bool) or not isinstance(plain, int if least is not None else int | float):
        raise TypeError(f"got {name}={value!r} ({type(value).__name__}), expected {kind}")
    if not math.isfinite(plain):
        raise ValueError(f"got {name}={value}, expected a finite number")
    if least is not None and plain < least:
        raise ValueError(f"got {name}={value}, expected at least {least}")
    if most is not None and plain > most:
        raise ValueError(f"got {name}={value}, expected at most {most}")
