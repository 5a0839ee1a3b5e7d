"""Which format each plane takes: what the user asked for, and what the numbers allow.

"auto" keeps LoRA experts as their factors and takes int8 where the merged tensor is as exact as with dense planes;
other words ask for one format. Vectors (norms, biases) and tensors too small to matter stay dense, hence exact.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from paretofuse.engine.dtypes import TO_NAME
from paretofuse.engine.layout import TILE, columns_of, rows_of
from paretofuse.engine.planes.dense import Dense
from paretofuse.engine.planes.groups import SMALLEST
from paretofuse.engine.planes.int4 import Int4
from paretofuse.engine.planes.int8 import Int8
from paretofuse.engine.planes.lowrank import LowRank
from paretofuse.engine.planes.plane import Plane, merged_error
from paretofuse.kernels.dtypes import float_dtype

DENSE = ("dense", "fp32", "bf16", "fp16")
"""Words for dense planes: in whatever dtype the deltas have, or in one of their own (by any usual name of it)."""

TOLERANCE = 1.02
"""Error of a merged update, against that of dense planes, up to which int8 counts as exact as they."""

_LOW_RANK = re.compile(r"lowrank:(?:(?P<rank>[1-9][0-9]{0,5})|(?P<percent>[0-9]{1,2}(?:\.[0-9]+)?)%)")


@dataclass(frozen=True)
class Wanted:
    """The format that was asked for.

    Attributes:
        kind: "auto", "dense", "int8", "int4" or "lowrank".
        dtype: of dense planes, where the word says it.
        rank: of "lowrank:32".
        energy: of "lowrank:99%".
    """

    kind: str
    dtype: str | None = None
    rank: int | None = None
    energy: float = 1.0


def parse(planes: str | torch.dtype) -> Wanted:
    """What a user's word asks for; a dtype, or any usual name of one, asks for dense planes in it.

    Raises:
        ValueError: not such a word.
    """
    if (dtype := float_dtype(planes)) is not None:
        return Wanted("dense", TO_NAME[dtype])
    if isinstance(planes, str):
        if planes in ("auto", "dense", "int8", "int4"):
            return Wanted(planes)
        if match := _LOW_RANK.fullmatch(planes):
            if match["rank"]:
                return Wanted("lowrank", rank=int(match["rank"]))
            return Wanted("lowrank", energy=float(match["percent"]) / 100)
    raise ValueError(
        f"got planes={planes!r}, expected one of auto, {', '.join(DENSE)}, int8, int4, lowrank:RANK (lowrank:32) or "
        "lowrank:ENERGY% (lowrank:99%)"
    )


def may_be_small(shape: tuple[int, ...]) -> bool:
    """Whether a tensor may take a format that is not exact: a matrix or more, of whole groups."""
    numel = math.prod(shape)
    return len(shape) > 1 and numel >= TILE and numel % SMALLEST == 0


def encode(wanted: Wanted, delta: Tensor, base: Tensor, delta_dtype: torch.dtype, plane_count: int) -> Plane:
    """The plane of one expert and tensor, with its error measured.

    Args:
        wanted: the format that was asked for.
        delta: float32, what the expert adds.
        base: the base tensor, in the merged dtype.
        delta_dtype: of dense planes.
        plane_count: how many planes are merged together.
    """

    def measured(plane: Plane) -> tuple[Plane, float]:
        error = merged_error(base, delta, plane.decode(), base.dtype, plane_count**-0.5)
        return replace(plane, error=error), error  # type: ignore[type-var]

    shape = tuple(delta.shape)
    dense, dense_error = measured(Dense.encode(delta, delta_dtype))
    if wanted.kind == "dense" or not may_be_small(shape):
        return dense
    if wanted.kind == "int4":
        return measured(Int4.encode(delta))[0]
    if wanted.kind == "lowrank":
        factors = LowRank.encode(delta, wanted.rank, wanted.energy)
        larger = factors.rank * (rows_of(shape) + columns_of(shape)) >= math.prod(shape)
        rounded = LowRank(factors.b.to(delta_dtype), factors.a.to(delta_dtype), shape)
        return dense if larger else measured(rounded)[0]
    plane, error = measured(Int8.encode(delta, TILE))
    if error > TOLERANCE * dense_error:
        plane, error = measured(Int8.encode(delta, SMALLEST))
    return plane if wanted.kind == "int8" or error <= TOLERANCE * dense_error else dense
