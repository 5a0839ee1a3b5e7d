"""What may be shown beside a front: single models and other fronts, on the same metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from paretofuse.fronts.front import Front


def single_models(front: Front, points: Mapping[str, Any] | None) -> dict[str, np.ndarray]:
    """The values [M] of single models by label.

    Raises:
        ValueError: a model does not have one finite number for each metric.
    """
    models = {}
    for name, values in (points or {}).items():
        numbers = np.asarray(values, dtype=np.float64)
        if numbers.shape != (len(front.metrics),) or not np.isfinite(numbers).all():
            raise ValueError(
                f"got {values} for point {name!r}, expected {len(front.metrics)} finite numbers, "
                f"one for each of {list(front.metrics)}"
            )
        models[name] = numbers
    return models


def other_fronts(front: Front, others: Mapping[str, Front] | None) -> dict[str, Front]:
    """Other fronts by label.

    Raises:
        ValueError: one has other metrics.
    """
    for name, other in (others or {}).items():
        if other.metrics != front.metrics:
            raise ValueError(
                f"got front {name!r} with metrics {list(other.metrics)}, expected {list(front.metrics)} "
                "as in the plotted one"
            )
    return dict(others or {})
