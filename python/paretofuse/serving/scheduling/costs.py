"""Which rows share a batch: those of one preference on a merged replica, or rows of several by engine.batched.

The unit is a step of one row on a merged model, which on the CPU is one pass over its weights:

    step(n) = 1 + EACH (n - 1)             n rows on one model
    merged, n rows of one preference       step(n), for each such preference
    mixed,  n rows of any preferences      (1 + S) step(n)              S: bytes of all planes / bytes of the base
    a merge that is needed first           (2 + S) / 2, divided by the steps that will use it: its passes stream

EACH is oneDNN's, which multiplies in both (`kernels/few_rows.py`). S: what planes cost in products, by what the base
costs. A plane that is not low-rank is a product of the base's size, whatever its format. Low-rank planes have S near 0,
so that two preferences already share a batch; with two dense experts (S = 2) four do, or as soon as there are more than
replicas. What costs the same is merged, for the next request. Measured at GPT-2's size (float32, one token a row, two
cores with AVX-512 beside other work, milliseconds):

                           merged 1, 4, 16 rows   mixed 1, 4, 16 rows   a merge
    two dense experts      43, 57, 88             77, 110, 165          40
    two LoRAs of rank 8                           42, 54, 69            34
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from paretofuse.engine.engine import Engine
from paretofuse.engine.planes.lowrank import LowRank
from paretofuse.serving.scheduling.job import Key

EACH = {"cpu": 0.07}
"""By kind of device; on others any number of rows is one pass."""


def step(rows: int, each: float) -> float:
    """What a step of rows on one model costs."""
    return 1 + each * (rows - 1) if rows else 0.0


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
    """S: the numbers that a product with all planes reads, by those of the base."""
    sizes = {spec.name: spec.numel for spec in engine.layout.tensors}
    planes = sum(
        plane.a.numel() + plane.b.numel() if isinstance(plane, LowRank) else sizes[name]
        for own in engine.planes.values()
        for name, plane in own.items()
    )
    return planes / max(1, sum(sizes.values()))


def make_plan(
    rows: Mapping[Key, int],
    steps: Mapping[Key, int],
    ready: Collection[Key],
    *,
    replicas: int,
    planes: float,
    each: float,
    can_mix: bool,
) -> Plan:
    """The cheapest plan among those that merge the preferences with the most rows.

    Args:
        rows: of each preference.
        steps: that each will still take.
        ready: the preferences that are merged already.
        replicas: how many may be merged at once.
        planes: S.
        each: EACH of the device.
        can_mix: whether engine.batched can run this model; else there must be no more preferences than replicas.
    """
    order = sorted(rows, key=lambda key: (key not in ready, -rows[key], -steps[key]))
    if not can_mix:
        return Plan(tuple(order), ())

    def cost(count: int) -> float:
        total = 0.0
        for key in order[:count]:
            merge = 0.0 if key in ready else (2 + planes) / 2 / max(1, steps[key])
            total += step(rows[key], each) + merge
        rest = sum(rows[key] for key in order[count:])
        return total + (1 + planes) * step(rest, each)

    count = min(range(min(replicas, len(order)), -1, -1), key=cost)
    return Plan(tuple(order[:count]), tuple(order[count:]))
