"""The merge of low-rank planes in Triton's interpreter, against float64; `test_in_interpreter.py` runs it."""

from __future__ import annotations

import os
import random

import pytest
import torch

from paretofuse.kernels.lowrank_merge import Factors, Matrix, bind_lowrank_merge
from tests.kernels.test_lowrank import FLOATS, check, make

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in a child process of test_in_interpreter.py", allow_module_level=True)


@pytest.mark.parametrize("factors", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [False, True])
def test_every_dtype(dtype, factors, rows):
    matrices, weights, length = make(1, [(70, 144), (16, 33)], dtype, factors, 2, rows)
    out = torch.full((2, length), float("nan"), dtype=dtype)
    bind_lowrank_merge(matrices, Factors(matrices), weights, out, by_row=rows)()
    check(matrices, weights, out)


@pytest.mark.parametrize("beside", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [False, True])
def test_dense_planes_beside_those_of_low_rank(dtype, beside, rows):
    """In one pass, for two preferences, each with its own weights; some matrices have dense planes alone."""
    matrices, weights, length = make(3, [(70, 144), (16, 33), (9, 64)], dtype, dtype, 2, rows, beside=beside)
    assert any(matrix.dense and matrix.planes for matrix in matrices)
    out = torch.full((2, length), float("nan"), dtype=dtype)
    bind_lowrank_merge(matrices, Factors(matrices), weights, out, by_row=rows)()
    check(matrices, weights, out)


@pytest.mark.parametrize("seed", range(6))
def test_random_shapes_and_preferences(seed):
    pick = random.Random(seed)
    shapes = [(pick.randint(1, 140), pick.choice((1, 32, 48, 131))) for _ in range(pick.randint(1, 4))]
    count, rows = pick.choice((1, 3)), pick.random() < 0.5
    matrices, weights, length = make(seed, shapes, pick.choice(FLOATS), pick.choice(FLOATS), count, rows)
    out = torch.full((count, length + 16), float("nan"), dtype=pick.choice(FLOATS))
    merge = bind_lowrank_merge(matrices, Factors(matrices), weights, out, by_row=rows)
    merge()
    check(matrices, weights, out)
    weights.mul_(-0.5)  # rewritten where they lie
    merge()
    check(matrices, weights, out)


def test_trained_factors_are_read_anew_and_frozen_ones_once():
    matrices, weights, length = make(7, [(20, 32), (33, 16)], torch.float32, torch.float32, 1, False)
    b, a = torch.randn(20, 2, requires_grad=True), torch.randn(2, 32, requires_grad=True)
    own = Matrix(matrices[0].base, [*matrices[0].planes, (3, b, a)], 0, 0, -1)
    out = torch.full((1, length), float("nan"))
    given = [own, matrices[1]]
    merge = bind_lowrank_merge(given, Factors(given), weights, out)
    with torch.no_grad():
        a.add_(1)
        b.mul_(3)
    merge()
    check(
        [Matrix(own.base, [*own.planes[:-1], (3, b.detach(), a.detach())], 0, 0, -1), matrices[1]],
        weights,
        out,
    )
    assert b.grad is None


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"base": torch.zeros(6)}, ValueError, r"base: got shape \(6,\), expected \[O, I\]"),
        ({"base": torch.zeros(20, 32, dtype=torch.float64)}, TypeError, "base: got torch.float64"),
        ({"base": torch.zeros(32, 20).T}, ValueError, "base: got strides"),
        ({"base": torch.zeros(20, 32).half()}, TypeError, "expected one dtype"),
        ({"offset": 10**6}, ValueError, "offset: got 1000000 for 640 elements"),
        ({"planes": [(0, torch.zeros(19, 2), torch.zeros(2, 32))]}, ValueError, r"B: got shape \(19, 2\)"),
        ({"planes": [(0, torch.zeros(20, 2), torch.zeros(2, 31))]}, ValueError, r"A: got shape \(2, 31\)"),
    ],
)
def test_bad_input_is_named(change, error, words):
    matrices, weights, length = make(8, [(16, 16), (20, 32)], torch.float32, torch.float32, 1, False)
    fields = {name: getattr(matrices[1], name) for name in ("base", "planes", "offset", "group", "first_row")}
    with pytest.raises(error, match=words):
        bind_lowrank_merge(
            [matrices[0], Matrix(**{**fields, **change})], Factors(matrices), weights, torch.zeros(1, length)
        )
    with pytest.raises(ValueError, match="matrices: got none"):
        bind_lowrank_merge([], Factors(matrices), weights, torch.zeros(1, length))
