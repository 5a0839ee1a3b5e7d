"""Breadcrumbs: of each difference neither the largest nor the smallest elements (arXiv 2312.06795)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from paretofuse.engine.methods import native
from paretofuse.engine.methods.deltas import DeltaMethod, Mask, largest
from paretofuse.engine.methods.method import Parameter
from paretofuse.engine.methods.native import Thinned
from paretofuse.engine.methods.numbers import Floats, Numbers
from paretofuse.engine.methods.random import Key


class Breadcrumbs(DeltaMethod):
    """Leaves out the share `gamma` of largest elements, then keeps the share `density`.

    Where both do not fit into the difference, fewer of the largest are left out.
    """

    name = "breadcrumbs"
    parameters = (
        *DeltaMethod.common(normalize=False, rescale=False),
        Parameter("gamma", float, 0.01, each=True, low=0.0, high=1.0),
    )

    def keep(self, delta: Floats, options: Mapping[str, Any], key: Key) -> Mask | None:
        """The magnitudes in the middle."""
        if options["density"] >= 1:
            return None
        first, count = kept_span(delta.size, options["density"], options["gamma"])
        return largest(np.abs(delta), first, count)

    def select(
        self, model: Numbers, base: Numbers, options: Mapping[str, Any], key: Key, threads: int | None
    ) -> Thinned:
        """The same in C++."""
        if options["density"] >= 1:
            return native.ALL
        first, count = kept_span(base.numel, options["density"], options["gamma"])
        return native.keep_largest(model, base, first, count, threads)


class BreadcrumbsTies(Breadcrumbs):
    """The same with TIES' election of signs."""

    name = "breadcrumbs_ties"
    elects = True


def kept_span(size: int, density: float, gamma: float) -> tuple[int, int]:
    """How many of the largest elements are left out, and how many of the next are kept."""
    count = max(0, int(density * size))
    below = max(0, size - count - int(gamma * size))
    return size - below - count, count
