"""DARE: of each difference random elements, rescaled (arXiv 2311.03099)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paretofuse.engine.methods import native
from paretofuse.engine.methods.deltas import DeltaMethod, Mask
from paretofuse.engine.methods.native import Thinned
from paretofuse.engine.methods.numbers import Floats, Numbers
from paretofuse.engine.methods.random import Key, draws, threshold


class DareLinear(DeltaMethod):
    """Keeps every element with the probability `density`."""

    name = "dare_linear"
    parameters = DeltaMethod.common(normalize=False, rescale=True)

    def keep(self, delta: Floats, options: Mapping[str, Any], key: Key) -> Mask | None:
        """Each by a draw of its own."""
        if options["density"] >= 1:
            return None
        kept: Mask = draws(key, delta.size) < threshold(max(0.0, options["density"]))
        return kept.reshape(delta.shape)

    def select(
        self, model: Numbers, base: Numbers, options: Mapping[str, Any], key: Key, threads: int | None
    ) -> Thinned:
        """The same in C++."""
        if options["density"] >= 1:
            return native.ALL
        below = int(threshold(max(0.0, options["density"])))
        return native.keep_drawn(model, base, key, below, threads)


class DareTies(DareLinear):
    """The same with TIES' election of signs."""

    name = "dare_ties"
    elects = True
