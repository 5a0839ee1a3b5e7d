"""Metrics that run against their preferences: the sign of a loss that is taken for a score."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from paretofuse.engine.evaluation.indicators import rank_correlation

_AGAINST = -0.5
"""A rank correlation that chance does not reach in 11 preferences more often than in one of 17 cases."""


def against_preferences(
    preferences: np.ndarray,
    values: np.ndarray,
    objectives: Sequence[str],
    metrics: Sequence[str],
    larger: Sequence[bool],
) -> str | None:
    """A sentence about metrics that get worse as the preference for their objective grows; None where there are none.

    Only where metrics have the objectives' names (what belongs to what is a guess otherwise) and there are five
    preferences or more (a rank correlation of fewer says little). Between experts that were never trained a metric may
    rise or fall, so this is no error.

    Args:
        preferences: [P, E].
        values: [P, M].
        objectives: the E objectives.
        metrics: the M metrics.
        larger: for each metric, whether larger is better.
    """
    if set(metrics) != set(objectives) or len(preferences) < 5:
        return None
    order = [list(metrics).index(name) for name in objectives]
    found = rank_correlation(preferences, values[:, order], [larger[column] for column in order])
    against = [name for name, correlation in zip(objectives, found, strict=True) if correlation <= _AGAINST]
    if not against:
        return None
    said = dict(zip(metrics, larger, strict=True))
    meant = {name: said[name] is not (name in against) for name in metrics}
    remedy = next(iter(meant.values())) if len(set(meant.values())) == 1 else meant
    return (
        f"the metrics of {against} get worse as their objective's preference grows; if they were given the wrong "
        f"direction (a loss is better when smaller), pass maximize={remedy}; else look whether experts or metrics are "
        "swapped"
    )
