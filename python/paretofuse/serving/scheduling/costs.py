"""Which rows share a batch: those of one preference on a merged replica, or rows of several by engine.batched.

The unit is one pass over the base's weights, which is what a small step costs:

    merged, n rows of one preference       1 + n ROW                    for each such preference
    mixed,  n rows of any preferences      (1 + S) (1 + n ROW)          S: bytes of all planes / bytes of the base
    a merge that is needed first           (2 + S) / the steps that will use it

Low-rank planes have S near 0, so that rows of different preferences nearly always share a batch; with E dense planes
S is E, and they do from about E + 2 preferences on. ROW was measured with `python -m benchmarks.run serving`: see
docs/serving.md.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from paretofuse.engine.engine import Engine
from paretofuse.engine.layout import ITEM_SIZE
from paretofuse.serving.scheduling.job import Key

ROW = 0.1
"""What one more row adds to a step, as a share of a pass over the weights."""


@dataclass(frozen=True)
class Plan:
    """How the rows of a step are computed.

    Attributes:
        merged: preferences whose rows run on a replica.
        mixed: those whose rows run together.
    """

    merged: tuple[Key, ...]
    mixed: tuple[Key, ...]


def size_of_planes(engine: Engine) -> float:
    """S: the bytes of all planes by the bytes of the base."""
    planes = sum(plane.nbytes for own in engine.planes.values() for plane in own.values())
    base = sum(spec.numel * ITEM_SIZE[spec.dtype] for spec in engine.layout.tensors)
    return planes / max(1, base)


def make_plan(
    rows: Mapping[Key, int],
    steps: Mapping[Key, int],
    ready: Collection[Key],
    *,
    replicas: int,
    planes: float,
    can_mix: bool,
) -> Plan:
    """The cheapest plan among those that merge the preferences with the most rows.

    Args:
        rows: of each preference.
        steps: that each will still take.
        ready: the preferences that are merged already.
        replicas: how many may be merged at once.
        planes: S.
        can_mix: whether engine.batched can run this model; else there must be no more preferences than replicas.
    """
    order = sorted(rows, key=lambda key: (key not in ready, -rows[key], -steps[key]))
    if not can_mix:
        return Plan(tuple(order), ())

    def cost(count: int) -> float:
        total = 0.0
        for key in order[:count]:
            merge = 0.0 if key in ready else (2 + planes) / max(1, steps[key])
            total += 1 + rows[key] * ROW + merge
        rest = sum(rows[key] for key in order[count:])
        return total + ((1 + planes) * (1 + rest * ROW) if rest else 0.0)

    count = min(range(min(replicas, len(order)) + 1), key=cost)
    return Plan(tuple(order[:count]), tuple(order[count:]))
