"""Task arithmetic: the weighted sum of the differences to the base (arXiv 2212.04089)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paretofuse.engine.methods import native
from paretofuse.engine.methods.deltas import DeltaMethod
from paretofuse.engine.methods.native import Thinned
from paretofuse.engine.methods.numbers import Numbers
from paretofuse.engine.methods.random import Key


class TaskArithmetic(DeltaMethod):
    """All elements of all differences, no election."""

    name = "task_arithmetic"
    parameters = DeltaMethod.common(normalize=False, rescale=False)

    def select(
        self, model: Numbers, base: Numbers, options: Mapping[str, Any], key: Key, threads: int | None
    ) -> Thinned:
        """All of them: nothing is read for it."""
        return native.ALL
