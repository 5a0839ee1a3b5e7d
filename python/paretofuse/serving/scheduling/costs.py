"""Which rows share a batch: those of one preference on a merged replica, or rows of several by engine.batched.

The unit is a step of one row on a merged model, which on the CPU is one pass over its weights:

    merged, n rows of one preference       min(n, SEVERAL), for each such preference
    mixed,  n rows of any preferences      (1 + S) min(1 + EACH (n - 1), SEVERAL)
                                           S: bytes of all planes / bytes of the base
    a merge that is needed first           (2 + S) / 2, divided by the steps that will use it: its passes stream

SEVERAL: a merged model is an ordinary one, whose products of several rows PyTorch gives to BLAS; that packs the weights
first, which costs as much as SEVERAL rows alone, and then nearly nothing for each row. EACH: mixed products are
oneDNN's (`kernels/few_rows.py`), which packs nothing, and each further row adds a little. S: what planes cost in
products, by what the base costs. A plane that is not low-rank is a product of the base's size, whatever its format.
Low-rank planes have S near 0, so that two preferences already share a batch; with two dense experts (S = 2) four do.
What costs the same is merged, for the next request. Measured at GPT-2's size (float32, one token a row, two cores with
AVX-512 beside other work, milliseconds):

                           merged 1, 4, 16 rows   mixed 1, 4, 16 rows   a merge
    two dense experts      31, 55, 120            77, 110, 165          40
    two LoRAs of rank 8    34, 58, 75             42, 54, 69            34
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from paretofuse.engine.engine import Engine
from paretofuse.engine.planes.lowrank import LowRank
from paretofuse.serving.scheduling.job import Key

SEVERAL = {"cpu": 3.4}
"""By kind of device; on others any number of rows is one pass."""
EACH = 0.07


def merged_step(rows: int, several: float) -> float:
    """What a step of rows on a merged model costs."""
    return min(float(rows), several)


def mixed_step(rows: int, planes: float, several: float) -> float:
    """What a step of rows of any preferences costs."""
    return (1 + planes) * min(1 + EACH * (rows - 1), several) if rows else 0.0


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
    several: float,
    can_mix: bool,
) -> Plan:
    """The cheapest plan among those that merge the preferences with the most rows.

    Args:
        rows: of each preference.
        steps: that each will still take.
        ready: the preferences that are merged already.
        replicas: how many may be merged at once.
        planes: S.
        several: SEVERAL of the device.
        can_mix: whether engine.batched can run this model; else there must be no more preferences than replicas.
    """
    order = sorted(rows, key=lambda key: (key not in ready, -rows[key], -steps[key]))
    if not can_mix:
        return Plan(tuple(order), ())

    def cost(count: int) -> float:
        total = 0.0
        for key in order[:count]:
            merge = 0.0 if key in ready else (2 + planes) / 2 / max(1, steps[key])
            total += merged_step(rows[key], several) + merge
        rest = sum(rows[key] for key in order[count:])
        return total + mixed_step(rest, planes, several)

    count = min(range(min(replicas, len(order)), -1, -1), key=cost)
    return Plan(tuple(order[:count]), tuple(order[count:]))
