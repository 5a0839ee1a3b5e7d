"""Tensors and plans for tests of the native merge: poisoned, guarded, off every vector boundary."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
import torch

from paretofuse.engine.dtypes import TO_NAME
from paretofuse.engine.merging import native
from paretofuse.engine.planes.memory import Memory

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


BITS = {"F32": torch.int32, "BF16": torch.int16, "F16": torch.int16}


USABLE = [name for name, usable in native.instruction_sets().items() if usable]


GUARD = 33  # elements around every tensor: an odd number, so that tensors start off every vector boundary


isas = pytest.mark.parametrize("isa", USABLE)


mixes = pytest.mark.parametrize(
    ("base_dtype", "delta_dtype", "out_dtype"), list(itertools.product(DTYPES, DTYPES, DTYPES))
)


def dense(values: torch.Tensor) -> Memory:
    return Memory("dense", TO_NAME[values.dtype], values.data_ptr())


def guarded(values: torch.Tensor) -> torch.Tensor:
    """The values in memory of their own, with NaN before and after them."""
    buffer = torch.full((len(values) + 2 * GUARD,), torch.nan, dtype=values.dtype)
    buffer[GUARD : GUARD + len(values)] = values
    return buffer[GUARD : GUARD + len(values)]


def poisoned(length: int, dtype: str) -> torch.Tensor:
    return guarded(torch.full((length,), torch.nan, dtype=DTYPES[dtype]))


def guards_intact(values: torch.Tensor) -> bool:
    storage = torch.empty(0, dtype=values.dtype).set_(values.untyped_storage())
    inside = slice(GUARD, GUARD + len(values))
    outside = torch.ones(len(storage), dtype=torch.bool)
    outside[inside] = False
    return bool(storage[outside].isnan().all())


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.int32 if values.dtype == torch.float32 else torch.int16)


class Model:
    """Random tensors of the given lengths, the plan that merges them, and the float64 truth."""

    def __init__(
        self,
        lengths: list[int],
        *,
        experts: int = 3,
        rows: int = 2,
        dtypes: tuple[str, str, str] = ("F32", "F32", "F32"),
        seed: int = 0,
        unchanged: float = 0.0,
    ) -> None:
        random = torch.Generator().manual_seed(seed)
        base_dtype, delta_dtype, self.out_dtype = dtypes
        self.lengths = lengths
        self.base = [guarded(torch.randn(n, generator=random).to(DTYPES[base_dtype])) for n in lengths]
        self.deltas: list[list[torch.Tensor | None]] = [
            [
                None
                if torch.rand((), generator=random) < unchanged
                else guarded(torch.randn(n, generator=random).to(DTYPES[delta_dtype]))
                for _ in range(experts)
            ]
            for n in lengths
        ]
        self.rows = [s % rows for s in range(len(lengths))]
        count = len(lengths)
        self.plan = native.MergePlan(
            base=[t.data_ptr() for t in self.base],
            planes=[[None if t is None else dense(t) for t in row] for row in self.deltas],
            lengths=lengths,
            rows=self.rows,
            base_dtypes=[base_dtype] * count,
            out_dtypes=[self.out_dtype] * count,
            plane_count=experts,
            row_count=rows,
        )

    def run(
        self, weights: npt.NDArray[np.float32], *, threads: int | None = 2, isa: str | None = None
    ) -> list[list[torch.Tensor]]:
        out = [[poisoned(n, self.out_dtype) for n in self.lengths] for _ in range(len(weights))]
        ran = self.plan.run(weights, [[t.data_ptr() for t in row] for row in out], threads=threads, isa=isa)
        assert isa is None or ran == isa
        assert all(guards_intact(t) for row in out for t in row)
        return out

    def truth(self, weights: npt.NDArray[np.float32], k: int, s: int) -> torch.Tensor:
        total = self.base[s].double()
        for e, delta in enumerate(self.deltas[s]):
            if delta is not None:
                total = total + float(weights[k, self.rows[s], e]) * delta.double()
        return total


def random_weights(preferences: int, rows: int, experts: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(preferences, rows, experts)).astype(np.float32)
