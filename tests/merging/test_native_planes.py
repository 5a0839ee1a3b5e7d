"""Planes of every format through the C++ core: against float64 on decoded planes, the same bits on every instruction
set, gradients, coefficients for each row, and what is refused."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from paretofuse.engine.dtypes import TO_NAME, TO_TORCH
from paretofuse.engine.layout import columns_of, rows_of
from paretofuse.engine.merging import native
from paretofuse.engine.planes.dense import Dense
from paretofuse.engine.planes.int4 import Int4
from paretofuse.engine.planes.int8 import Int8
from paretofuse.engine.planes.lowrank import LowRank
from paretofuse.engine.planes.memory import Memory
from paretofuse.engine.planes.plane import Plane, memories
from paretofuse.kernels.reference import spread

USABLE = [name for name, usable in native.instruction_sets().items() if usable]
DTYPES = ["F32", "BF16", "F16"]
SHAPES = [(1,), (63,), (1000003,), (3, 50), (2, 32), (17, 96), (40, 768), (5, 7, 11), (3, 20011)]
FORMATS = ["dense", "int8:1024", "int8:32", "int4", "lowrank", "mixed"]
STEP = {"F32": 2.0**-22, "BF16": 2.0**-8, "F16": 2.0**-11}

isas = pytest.mark.parametrize("isa", USABLE)


def plane(kind: str, shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Plane:
    random = torch.Generator().manual_seed(seed)
    delta = torch.randn(shape, generator=random)
    if kind == "lowrank":
        b, a = (
            torch.randn(rows_of(shape), 5, generator=random),
            torch.randn(5, columns_of(shape), generator=random),
        )
        return LowRank(b.to(dtype) / 2, a.to(dtype), shape)
    if kind == "int4":
        return Int4.encode(delta)
    if kind.startswith("int8"):
        return Int8.encode(delta, int(kind.partition(":")[2]))
    return Dense.encode(delta, dtype)


def planes_of(kind: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Plane | None]:
    """Four planes, one of them absent; of every format where kind is "mixed"."""
    kinds = ["int8:1024", "lowrank", "int4", "dense"] if kind == "mixed" else [kind] * 3
    planes: list[Plane | None] = [plane(k, shape, i, dtype) for i, k in enumerate(kinds)]
    planes.insert(1, None)
    return planes


def run(
    base: Tensor,
    planes: Sequence[Plane | None],
    weights: np.ndarray,
    out_dtype: str,
    *,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
    isa: str | None = None,
    threads: int = 2,
    shift: int = 0,
) -> Tensor:
    """Outputs [K, *shape], which were NaN before; `shift` moves them off their cache lines."""
    count = base.numel()
    room = torch.full((len(weights), count + 64), torch.nan, dtype=TO_TORCH[out_dtype])
    out = room[:, shift : shift + count]
    plan = native.MergePlan(
        base=[base.data_ptr()],
        planes=[memories(planes)],
        lengths=[count],
        rows=[0],
        columns=[columns_of(tuple(base.shape))],
        base_dtypes=[TO_NAME[base.dtype]],
        out_dtypes=[out_dtype],
        plane_count=len(planes),
        row_count=1,
    )
    ran = plan.run(
        weights,
        [[row.data_ptr()] for row in out],
        row_weights=None if rows is None else [[own.data_ptr()] for own in rows],
        column_weights=None if columns is None else [[own.data_ptr()] for own in columns],
        isa=isa,
        threads=threads,
    )
    assert isa is None or ran == isa
    assert room[:, :shift].isnan().all()
    assert room[:, shift + count :].isnan().all()
    return out.clone().view(len(weights), *base.shape)


def truth(base: Tensor, planes: Sequence[Plane | None], weights: Tensor) -> Tensor:
    """float64; weights [P] or [P, rows]."""
    total = base.double()
    for weight, own in zip(weights.double(), planes, strict=True):
        if own is not None:
            total = total + spread(weight, own.shape) * own.decode().double()
    return total


def random_weights(preferences: int, count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(preferences, 1, count)).astype(np.float32)


@isas
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_format_and_size_matches_float64(isa: str, kind: str, shape: tuple[int, ...]) -> None:
    base = torch.randn(shape, generator=torch.Generator().manual_seed(9))
    planes = planes_of(kind, shape)
    weights = random_weights(2, len(planes))
    out = run(base, planes, weights, "F32", isa=isa)
    for k in range(2):
        expected = truth(base, planes, torch.from_numpy(weights[k, 0]))
        assert (out[k].double() - expected).abs().max() <= 2e-5


@isas
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(("base_dtype", "out_dtype"), list(itertools.product(DTYPES, DTYPES)))
def test_every_dtype_matches_float64(isa: str, kind: str, base_dtype: str, out_dtype: str) -> None:
    shape = (37, 160)
    base = torch.randn(shape, generator=torch.Generator().manual_seed(8)).to(TO_TORCH[base_dtype])
    for dtype in DTYPES if kind in ("dense", "lowrank", "mixed") else ["F32"]:
        planes = planes_of(kind, shape, TO_TORCH[dtype])
        weights = random_weights(1, len(planes), 1)
        out = run(base, planes, weights, out_dtype, isa=isa)[0]
        expected = truth(base, planes, torch.from_numpy(weights[0, 0]))
        assert ((out.double() - expected).abs() <= expected.abs() * STEP[out_dtype] + 2.0**-15).all()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("shape", [(70001,), (131, 768), (19, 50)])
@pytest.mark.parametrize("dtypes", [("F32", "F32"), ("BF16", "BF16")])
def test_same_bits_everywhere(kind: str, shape: tuple[int, ...], dtypes: tuple[str, str]) -> None:
    base = torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(TO_TORCH[dtypes[0]])
    planes = planes_of(kind, shape, TO_TORCH[dtypes[0]])
    weights = random_weights(3, len(planes), 2)
    first = run(base, planes, weights, dtypes[1], isa="scalar", threads=1)
    for isa, threads, shift in itertools.product(USABLE, (1, 2, 5), (0, 7)):
        again = run(base, planes, weights, dtypes[1], isa=isa, threads=threads, shift=shift)
        assert torch.equal(again, first), (isa, threads, shift)
    alone = [run(base, planes, weights[k : k + 1], dtypes[1])[0] for k in range(3)]
    assert torch.equal(torch.stack(alone), first)


@isas
@pytest.mark.parametrize("kind", ["int8:32", "int4"])
@pytest.mark.parametrize(
    "size", [2.0**-10, 2.0**-78, 2.0**-101, 2.0**-120, 2.0**-140, 0.0, math.inf, math.nan]
)
def test_weights_of_any_size_give_the_same_bits(isa: str, kind: str, size: float) -> None:
    # Vectors may hold quantized numbers 2^24 times too large and lower the weight by as much: not where that rounds.
    base = torch.zeros(7, 96)
    planes = [plane(kind, (7, 96), i) for i in range(3)]
    weights = (random_weights(1, 3) * size).astype(np.float32)
    found, expected = (run(base, planes, weights, "F32", isa=name) for name in (isa, "scalar"))
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@isas
@pytest.mark.parametrize("kind", ["dense", "int8:32", "int4"])
def test_every_number_of_steps_gives_the_same_bits(isa: str, kind: str) -> None:
    for length, dtype in itertools.product((31, 32, 33, 64, 95, 96, 128, 160, 200), DTYPES):
        base = torch.randn(length, generator=torch.Generator().manual_seed(length)).to(TO_TORCH[dtype])
        planes = planes_of(kind, (length,), TO_TORCH[dtype])
        weights = random_weights(1, len(planes), 3)
        for shift in (0, 1):
            found = run(base, planes, weights, dtype, isa=isa, shift=shift)
            assert torch.equal(found, run(base, planes, weights, dtype, isa="scalar")), (length, dtype, shift)


@isas
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("shape", [(9, 50), (37, 160), (3, 20011)])
def test_coefficients_for_each_row(isa: str, kind: str, shape: tuple[int, ...]) -> None:
    base = torch.randn(shape, generator=torch.Generator().manual_seed(6))
    planes = planes_of(kind, shape)
    weights = random_weights(2, len(planes), 3)
    rows = torch.randn(2, len(planes), shape[0], generator=torch.Generator().manual_seed(5))
    out = run(base, planes, weights, "F32", rows=rows, isa=isa)
    for k in range(2):
        expected = truth(base, planes, torch.from_numpy(weights[k, 0])[:, None] + rows[k])
        assert (out[k].double() - expected).abs().max() <= 2e-5
    zero = run(base, planes, weights, "F32", rows=torch.zeros_like(rows), isa=isa)
    assert torch.equal(zero, run(base, planes, weights, "F32", isa=isa))
    assert torch.equal(out, run(base, planes, weights, "F32", rows=rows, isa="scalar"))


@isas
@pytest.mark.parametrize("kind", FORMATS)
def test_zero_weights_give_back_the_base(isa: str, kind: str) -> None:
    base = torch.randn(11, 64).bfloat16()
    planes = planes_of(kind, (11, 64))
    assert torch.equal(run(base, planes, np.zeros((1, 1, len(planes)), np.float32), "BF16", isa=isa)[0], base)


@isas
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(63,), (3, 50), (37, 160), (3, 20011)])
def test_inner_matches_float64(isa: str, kind: str, dtype: str, shape: tuple[int, ...]) -> None:
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(TO_TORCH[dtype])
    planes = planes_of(kind, shape, TO_TORCH[dtype])
    wide = [None if p is None else gradient.double() * p.decode().double() for p in planes]

    def inner(isa: str, threads: int = 2, by: Literal["whole", "row", "column"] = "whole") -> np.ndarray:
        return native.inner(
            gradient.data_ptr(),
            memories(planes),
            gradient.numel(),
            grad_dtype=dtype,
            columns=columns_of(shape),
            by=by,
            threads=threads,
            isa=isa,
        )

    found, found_rows, found_columns = inner(isa), inner(isa, by="row"), inner(isa, by="column")
    assert found_rows.shape == (len(planes), rows_of(shape))
    assert found_columns.shape == (len(planes), columns_of(shape))
    for j, products in enumerate(wide):
        if products is None:
            assert found[j] == 0
            assert (found_rows[j] == 0).all()
            assert (found_columns[j] == 0).all()
            continue
        # What float32 sums of at most 128 products may lose, of the sizes of all terms of a low-rank one.
        slack = 2e-6 * float(products.abs().sum()) * (20 if kind in ("lowrank", "mixed") else 1)
        assert abs(found[j] - float(products.sum())) <= slack
        rows = products.reshape(rows_of(shape), -1).sum(1).numpy()
        np.testing.assert_allclose(found_rows[j], rows, rtol=0, atol=slack)
        columns = products.reshape(rows_of(shape), -1).sum(0).numpy()
        np.testing.assert_allclose(found_columns[j], columns, rtol=0, atol=slack)
    for other, threads in itertools.product(USABLE, (1, 5)):
        np.testing.assert_array_equal(inner(other, threads), found)
        np.testing.assert_array_equal(inner(other, threads, by="row"), found_rows)
        np.testing.assert_array_equal(inner(other, threads, by="column"), found_columns)


def test_inner_is_the_gradient_of_the_merge() -> None:
    shape = (6, 64)
    planes = planes_of("mixed", shape)
    base = torch.randn(shape)
    weights = torch.randn(len(planes), dtype=torch.float64, requires_grad=True)
    merged = truth(base, planes, weights)
    loss = merged.sin().sum()
    (expected,) = torch.autograd.grad(loss, weights)
    gradient = merged.detach().cos().float()
    found = native.inner(
        gradient.data_ptr(), memories(planes), gradient.numel(), grad_dtype="F32", columns=columns_of(shape)
    )
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-5)


@isas
def test_packed_numbers_at_any_address(isa: str) -> None:
    # A file may place its tensors at any byte.
    shape = (16, 64)
    base = torch.randn(shape)
    for kind in ("int8:32", "int4", "lowrank", "dense"):
        own = plane(kind, shape, 3)
        moved = []
        for tensor in own.tensors().values():
            room = np.zeros(tensor.numel() * tensor.element_size() + 1, np.uint8)
            room[1:] = tensor.contiguous().view(torch.uint8).numpy().reshape(-1)
            moved.append(room)
        memory = own.memory()
        values, factors = (moved[1], moved[0]) if kind == "lowrank" else (moved[0], moved[-1])
        shifted = memory._replace(
            values=values.ctypes.data + 1, factors=factors.ctypes.data + 1 if memory.factors else 0
        )
        weights = np.full((1, 1, 1), 0.7, np.float32)
        out = torch.full(shape, torch.nan)
        native.MergePlan(
            base=[base.data_ptr()], planes=[[shifted]], lengths=[1024], rows=[0], columns=[64], base_dtypes=["F32"],
            out_dtypes=["F32"], plane_count=1, row_count=1,
        ).run(weights, [[out.data_ptr()]], isa=isa)  # fmt: skip
        assert torch.equal(out, run(base, [own], weights, "F32")[0])


def bad(**changes: object) -> Memory:
    return Memory("int8", "F32", 64, 64, 32)._replace(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        (bad(format="int5"), "format: got 'int5', expected one of dense, int8, int4, lowrank"),
        (bad(dtype="I8"), "dtype: got 'I8'"),
        (bad(factors=0), "factors of plane 0 of segment 0: got a null address"),
        (bad(size=16), "group of plane 0 of segment 0: got 16 elements, expected a power of two from 32 on"),
        (bad(size=96), "group of plane 0 of segment 0: got 96 elements"),
        (bad(format="lowrank", size=0), "rank of plane 0 of segment 0: got 0"),
    ],
)
def test_planes_that_do_not_fit_are_refused(memory: Memory, message: str) -> None:
    base = torch.zeros(64)
    with pytest.raises(ValueError, match=message):
        native.MergePlan(
            base=[base.data_ptr()], planes=[[memory]], lengths=[64], rows=[0], base_dtypes=["F32"],
            out_dtypes=["F32"], plane_count=1, row_count=1,
        )  # fmt: skip
    if "format: got" not in message and "dtype" not in message:
        with pytest.raises(ValueError, match=message.split(" of segment")[0]):
            native.inner(base.data_ptr(), [memory], 64, grad_dtype="F32")


@pytest.mark.parametrize("columns", [0, -1, 48])
def test_columns_that_do_not_divide_the_tensor_are_refused(columns: int) -> None:
    base = torch.zeros(64)
    own = plane("lowrank", (2, 32), 0)
    with pytest.raises(
        ValueError, match=f"columns of plane 0 of segment 0: got {columns}, expected a divisor"
    ):
        native.MergePlan(
            base=[base.data_ptr()], planes=[memories([own])], lengths=[64], rows=[0], columns=[columns],
            base_dtypes=["F32"], out_dtypes=["F32"], plane_count=1, row_count=1,
        )  # fmt: skip
    with pytest.raises(ValueError, match="columns: got"):
        native.inner(base.data_ptr(), [None], 64, grad_dtype="F32", columns=columns, by="row")
    with pytest.raises(ValueError, match="columns: got"):
        native.inner(base.data_ptr(), [None], 64, grad_dtype="F32", columns=columns, by="column")


def test_outputs_over_scales_or_factors_are_refused() -> None:
    shape = (2, 32)
    base = torch.zeros(shape)
    for own in (plane("int8:32", shape, 0), plane("lowrank", shape, 0)):
        plan = native.MergePlan(
            base=[base.data_ptr()], planes=[memories([own])], lengths=[64], rows=[0], columns=[32],
            base_dtypes=["F32"], out_dtypes=["F32"], plane_count=1, row_count=1,
        )  # fmt: skip
        for tensor in own.tensors().values():
            with pytest.raises(ValueError, match="overlaps the base or a plane"):
                plan.run(np.ones((1, 1, 1), np.float32), [[tensor.data_ptr()]])
