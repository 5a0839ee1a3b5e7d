"""Task arithmetic: the weighted sum of the differences to the base (arXiv 2212.04089)."""

from __future__ import annotations

from paretofuse.engine.methods.deltas import DeltaMethod


class TaskArithmetic(DeltaMethod):
    """All elements of all differences, no election."""

    name = "task_arithmetic"
    parameters = DeltaMethod.common(normalize=False, rescale=False)
