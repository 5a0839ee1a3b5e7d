"""TIES: of each difference the largest elements, and of these those whose sign the sum has (arXiv 2306.01708)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from paretofuse.engine.methods import native
from paretofuse.engine.methods.deltas import DeltaMethod, Mask, largest
from paretofuse.engine.methods.native import Thinned
from paretofuse.engine.methods.numbers import Floats, Numbers
from paretofuse.engine.methods.random import Key


class Ties(DeltaMethod):
    """Keeps the share `density` of each difference: its largest elements, one at least."""

    name = "ties"
    elects = True
    parameters = DeltaMethod.common(normalize=True, rescale=False)

    def keep(self, delta: Floats, options: Mapping[str, Any], key: Key) -> Mask | None:
        """The largest magnitudes."""
        count = kept_count(delta.size, options["density"])
        return None if count is None else largest(np.abs(delta), 0, count)

    def select(
        self, model: Numbers, base: Numbers, options: Mapping[str, Any], key: Key, threads: int | None
    ) -> Thinned:
        """The same in C++."""
        count = kept_count(base.numel, options["density"])
        return native.ALL if count is None else native.keep_largest(model, base, 0, count, threads)


def kept_count(size: int, density: float) -> int | None:
    """How many elements stay; None for all."""
    if density >= 1:
        return None
    return 0 if density <= 0 else min(size, max(1, int(density * size)))
