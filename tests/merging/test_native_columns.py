"""Merges with a coefficient for each column, and sums by column, through the C++ core: against float64 on decoded
planes, the same bits on every instruction set and at every number of threads, and what is refused."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from paretofuse.engine.dtypes import TO_TORCH
from paretofuse.engine.merging import native
from paretofuse.engine.planes.plane import Plane, memories
from tests.merging.test_native_planes import (
    DTYPES,
    FORMATS,
    STEP,
    USABLE,
    isas,
    planes_of,
    random_weights,
    run,
)

# One row, one column, rows off the steps, pieces that start and end within rows, rows longer than a piece.
SHAPES = [
    (1, 1),
    (1, 63),
    (63, 1),
    (2, 32),
    (9, 50),
    (37, 160),
    (131, 768),
    (1, 1000003),
    (3, 70016),
    (70001, 2),
]


def coefficients(preferences: int, count: int, length: int, seed: int) -> Tensor:
    return torch.randn(preferences, count, length, generator=torch.Generator().manual_seed(seed))


def truth(
    base: Tensor, planes: list[Plane | None], weights: np.ndarray, rows: Tensor | None, columns: Tensor
) -> Tensor:
    """float64; weights [P], rows [P, R] or none, columns [P, C]."""
    total = base.double()
    for p, own in enumerate(planes):
        if own is None:
            continue
        weight = float(weights[p]) + columns[p].double()[None, :]
        if rows is not None:
            weight = weight + rows[p].double()[:, None]
        total = total + weight * own.decode().double()
    return total


@isas
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_format_and_size_matches_float64(
    isa: str, kind: str, shape: tuple[int, int], by_row: bool
) -> None:
    base = torch.randn(shape, generator=torch.Generator().manual_seed(9))
    planes = planes_of(kind, shape)
    count = len(planes)
    weights = random_weights(2, count)
    rows = coefficients(2, count, shape[0], 5) if by_row else None
    columns = coefficients(2, count, shape[1], 6)
    out = run(base, planes, weights, "F32", rows=rows, columns=columns, isa=isa)
    for k in range(2):
        expected = truth(base, planes, weights[k, 0], None if rows is None else rows[k], columns[k])
        assert (out[k].double() - expected).abs().max() <= 6e-5
    if isa != "scalar":
        for threads, shift in ((1, 0), (3, 7)):
            again = run(
                base, planes, weights, "F32", rows=rows, columns=columns, isa="scalar", threads=threads,
                shift=shift,
            )  # fmt: skip
            assert torch.equal(again, out), (threads, shift)
        alone = [
            run(base, planes, weights[k : k + 1], "F32", rows=None if rows is None else rows[k : k + 1],
                columns=columns[k : k + 1], isa=isa, threads=3)[0]
            for k in range(2)
        ]  # fmt: skip
        assert torch.equal(torch.stack(alone), out)


@isas
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(("base_dtype", "out_dtype"), list(itertools.product(DTYPES, DTYPES)))
def test_every_dtype_matches_float64(isa: str, kind: str, base_dtype: str, out_dtype: str) -> None:
    shape = (37, 160)
    base = torch.randn(shape, generator=torch.Generator().manual_seed(8)).to(TO_TORCH[base_dtype])
    for dtype in DTYPES if kind in ("dense", "lowrank", "mixed") else ["F32"]:
        planes = planes_of(kind, shape, TO_TORCH[dtype])
        weights = random_weights(1, len(planes), 1)
        rows, columns = coefficients(1, len(planes), 37, 3), coefficients(1, len(planes), 160, 4)
        out = run(base, planes, weights, out_dtype, rows=rows, columns=columns, isa=isa)[0]
        expected = truth(base, planes, weights[0, 0], rows[0], columns[0])
        assert ((out.double() - expected).abs() <= expected.abs() * STEP[out_dtype] + 2.0**-13).all()
        for threads in (1, 3):
            again = run(
                base, planes, weights, out_dtype, rows=rows, columns=columns, isa="scalar", threads=threads
            )
            assert torch.equal(again[0], out)


@isas
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("shape", [(9, 50), (37, 160), (3, 70016)])
@pytest.mark.parametrize("by_row", [False, True])
def test_zeros_give_the_bits_of_a_merge_without_them(
    isa: str, kind: str, shape: tuple[int, int], by_row: bool
) -> None:
    base = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    planes = planes_of(kind, shape)
    weights = random_weights(2, len(planes))
    rows = coefficients(2, len(planes), shape[0], 1) if by_row else None
    zeros = torch.zeros(2, len(planes), shape[1])
    for dtype in ("F32", "BF16"):
        found = run(base, planes, weights, dtype, rows=rows, columns=zeros, isa=isa)
        assert torch.equal(found, run(base, planes, weights, dtype, rows=rows, isa=isa))
    nothing = run(base, planes, np.zeros_like(weights), "F32", columns=zeros, isa=isa)
    assert torch.equal(nothing, base.expand(2, *shape))


@isas
def test_tensors_and_preferences_without_them_keep_their_bits(isa: str) -> None:
    # Null addresses stand beside others, for matrices with rows' coefficients and without, and for a vector.
    shapes = [(40, 96), (7, 33), (500,)]
    bases = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes)]
    planes = [
        planes_of(kind, shape) for kind, shape in zip(("mixed", "dense", "int8:32"), shapes, strict=True)
    ]
    planes[1].append(None)
    planes[2].append(None)
    weights = random_weights(2, 5)
    rows, columns = coefficients(1, 5, 40, 1)[0], coefficients(1, 5, 96, 2)[0]
    plan = native.MergePlan(
        base=[base.data_ptr() for base in bases], planes=[memories(own) for own in planes],
        lengths=[base.numel() for base in bases], rows=[0, 0, 0], columns=[96, 33, 500], base_dtypes=["F32"] * 3,
        out_dtypes=["F32"] * 3, plane_count=5, row_count=1,
    )  # fmt: skip
    out = [[torch.full(shape, torch.nan) for shape in shapes] for _ in range(2)]
    plan.run(
        weights, [[t.data_ptr() for t in own] for own in out],
        row_weights=[[rows.data_ptr(), 0, 0], [0, 0, 0]], column_weights=[[columns.data_ptr(), 0, 0], [0, 0, 0]],
        isa=isa,
    )  # fmt: skip
    for k, s in itertools.product(range(2), range(3)):
        own = {"rows": rows[None], "columns": columns[None]} if (k, s) == (0, 0) else {}
        alone = run(bases[s], planes[s], weights[k : k + 1], "F32", isa=isa, **own)[0]  # type: ignore[arg-type]
        assert torch.equal(out[k][s], alone), (k, s)


@isas
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 63), (200, 1), (67, 1000), (1100, 33), (3000, 64)])
def test_sums_by_column_match_float64(isa: str, kind: str, shape: tuple[int, int]) -> None:
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    planes = planes_of(kind, shape)
    for dtype, threads in (("F32", 1), ("BF16", 3)):
        grad = gradient.to(TO_TORCH[dtype])
        sums = [
            native.inner(
                grad.data_ptr(), memories(planes), grad.numel(), grad_dtype=dtype, columns=shape[1], by="column",
                threads=count, isa=name,
            )
            for count, name in ((threads, isa), (2, "scalar"))
        ]  # fmt: skip
        np.testing.assert_array_equal(sums[0], sums[1])
        for found, own in zip(sums[0], planes, strict=True):
            if own is None:
                assert not found.any()
                continue
            products = grad.double() * own.decode().double()
            # What float32 sums of at most 128 products may lose, of the sizes of all terms of a low-rank one.
            slack = 2e-6 * products.abs().sum(0).max() * (20 if kind in ("lowrank", "mixed") else 1) + 1e-6
            assert (torch.from_numpy(found) - products.sum(0)).abs().max() <= slack


def test_a_matrix_of_no_rows_has_sums_of_zero() -> None:
    sums = native.inner(0, [None, None], 0, grad_dtype="F32", columns=5, by="column")
    np.testing.assert_array_equal(sums, np.zeros((2, 5)))


def test_what_does_not_fit_is_refused_and_nothing_written() -> None:
    base = torch.zeros(6, 8)
    own = planes_of("dense", (6, 8))
    weights = random_weights(1, len(own))
    columns = coefficients(1, len(own), 8, 0)
    out = torch.full((6, 8), torch.nan)

    def plan(columns: int) -> native.MergePlan:
        return native.MergePlan(
            base=[base.data_ptr()], planes=[memories(own)], lengths=[48], rows=[0], columns=[columns],
            base_dtypes=["F32"], out_dtypes=["F32"], plane_count=len(own), row_count=1,
        )  # fmt: skip

    addresses = [[columns.data_ptr()]]
    with pytest.raises(ValueError, match=r"column_weights: got shape \[1, 2\], expected \[1, 1\]"):
        plan(8).run(weights, [[out.data_ptr()]], column_weights=[[columns.data_ptr(), 0]])
    for wrong in (0, -1, 7):
        with pytest.raises(
            ValueError, match=f"columns of segment 0: got {wrong}, expected a divisor of the 48"
        ):
            plan(wrong).run(weights, [[out.data_ptr()]], column_weights=addresses)
    assert out.isnan().all()
    with pytest.raises(ValueError, match="by: got 'columns', expected whole, row or column"):
        native.inner(base.data_ptr(), memories(own), 48, grad_dtype="F32", columns=8, by="columns")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="grad: got a null address"):
        native.inner(0, memories(own), 48, grad_dtype="F32", columns=8, by="column")
    with pytest.raises(ValueError, match="threads: got 0"):
        native.inner(base.data_ptr(), memories(own), 48, grad_dtype="F32", columns=8, by="column", threads=0)
    assert USABLE
