"""DELLA: of each difference random elements, large ones more probably, rescaled (arXiv 2406.11617)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from paretofuse.engine.methods import native
from paretofuse.engine.methods.deltas import DeltaMethod, Mask
from paretofuse.engine.methods.method import Parameter
from paretofuse.engine.methods.native import Thinned
from paretofuse.engine.methods.numbers import Floats, Numbers
from paretofuse.engine.methods.random import Key, draws, threshold


class DellaLinear(DeltaMethod):
    """Keeps each element with a probability that grows with its rank in its row.

    From density - epsilon for the row's smallest magnitude to density + epsilon for its largest, in equal steps.
    """

    name = "della_linear"
    parameters = (
        *DeltaMethod.common(normalize=False, rescale=True),
        Parameter("epsilon", float, 0.15, each=True),
    )

    def keep(self, delta: Floats, options: Mapping[str, Any], key: Key) -> Mask | None:
        """Each by a draw of its own."""
        density, epsilon = options["density"], options["epsilon"]
        if density >= 1:
            return None
        if density <= 0 or not delta.size:
            return np.zeros(delta.shape, bool)
        check_epsilon(density, epsilon)
        ranks = ranks_in_rows(np.abs(delta)).reshape(-1)
        steps = max(1, row_length(delta.shape) - 1)
        share = ranks.astype(np.float32) / np.float32(steps)
        probabilities = np.float32(density - epsilon) + share * np.float32(2 * epsilon)
        kept: Mask = draws(key, delta.size) < threshold(probabilities)
        return kept.reshape(delta.shape)

    def select(
        self, model: Numbers, base: Numbers, options: Mapping[str, Any], key: Key, threads: int | None
    ) -> Thinned:
        """The same in C++."""
        density, epsilon = options["density"], options["epsilon"]
        if not 0 < density < 1 or len(base.shape) > 2:
            return super().select(model, base, options, key, threads)
        check_epsilon(density, epsilon)
        columns = row_length(base.shape)
        return native.keep_ranked(model, base, columns, key, density - epsilon, 2 * epsilon, threads)


class Della(DellaLinear):
    """The same with TIES' election of signs, normalized."""

    name = "della"
    elects = True
    parameters = (
        *DeltaMethod.common(normalize=True, rescale=True),
        Parameter("epsilon", float, 0.15, each=True),
    )


def check_epsilon(density: float, epsilon: float) -> None:
    """ValueError where probabilities would not lie between 0 and 1."""
    if density + epsilon >= 1 or density - epsilon <= 0:
        raise ValueError(
            f"got density: {density} and epsilon: {epsilon}, expected density - epsilon above 0 and density + epsilon "
            "below 1"
        )


def row_length(shape: tuple[int, ...]) -> int:
    """Elements along the axis that magnitudes are ranked along: the second, of vectors the only one."""
    return shape[1] if len(shape) > 1 else (shape[0] if shape else 1)


def ranks_in_rows(magnitudes: Floats) -> npt.NDArray[np.int64]:
    """The rank of each element along that axis, 0 for the smallest; equal ones in the order of their positions."""
    axis = 1 if magnitudes.ndim > 1 else 0
    if magnitudes.ndim == 0:
        return np.zeros((), np.int64)
    order = np.argsort(magnitudes, axis=axis, kind="stable")
    ranks = np.empty(order.shape, np.int64)
    places = np.arange(order.shape[axis]).reshape([-1 if a == axis else 1 for a in range(order.ndim)])
    np.put_along_axis(ranks, order, np.broadcast_to(places, order.shape), axis)
    return ranks
