"""TIES: of each difference the largest elements, and of these those whose sign the sum has (arXiv 2306.01708)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from paretofuse.engine.methods.deltas import DeltaMethod, Mask, largest
from paretofuse.engine.methods.numbers import Floats
from paretofuse.engine.methods.random import Key


class Ties(DeltaMethod):
    """Keeps the share `density` of each difference: its largest elements, one at least."""

    name = "ties"
    elects = True
    parameters = DeltaMethod.common(normalize=True, rescale=False)

    def keep(self, delta: Floats, options: Mapping[str, Any], key: Key) -> Mask | None:
        """The largest magnitudes."""
        density = options["density"]
        if density >= 1:
            return None
        if density <= 0 or not delta.size:
            return np.zeros(delta.shape, bool)
        return largest(np.abs(delta), 0, max(1, int(density * delta.size)))
