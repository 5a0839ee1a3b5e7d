"""The merge of low-rank planes: where it runs, and the GPU; the interpreter's checks stand beside."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from paretofuse.kernels.lowrank_merge import Factors, Matrix, bind_lowrank_merge

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
PLANES, GROUPS = 4, 3


def make(
    seed: int,
    shapes: list[tuple[int, int]],
    dtype: torch.dtype,
    factors: torch.dtype,
    count: int,
    rows: bool,
    device: str = "cpu",
    beside: torch.dtype | None = None,
) -> tuple[list[Matrix], Tensor, int]:
    """Matrices with planes of ranks 1 to 20, weights [K, G + rows, P], and the length of out.

    With dense planes of the dtype `beside` in the place of some.
    """
    g = torch.Generator().manual_seed(seed)
    pick = random.Random(seed)
    matrices, offset, first_row = [], 0, GROUPS
    for number, (outs, ins) in enumerate(shapes):
        some = pick.sample(range(PLANES), pick.randint(0 if number else 2, PLANES))
        planes, dense = [], []
        for j in some:
            if beside is not None and pick.random() < 0.6:
                dense.append((j, torch.randn(outs, ins, generator=g).to(device, beside)))
                continue
            rank = pick.choice((1, 3, 8, 16, 20))
            b, a = torch.randn(outs, rank, generator=g), torch.randn(rank, ins, generator=g)
            planes.append((j, b.to(device, factors), a.to(device, factors)))
        base = torch.randn(outs, ins, generator=g).to(device, dtype)
        own = rows and pick.random() < 0.7
        matrices.append(Matrix(base, planes, offset, pick.randrange(GROUPS), first_row if own else -1, dense))
        first_row += outs if own else 0
        offset += -(-outs * ins // 1024) * 1024
    weights = torch.randn(count, first_row, PLANES, generator=g)
    return matrices, weights.to(device), offset


def merged(matrix: Matrix, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """The formula in a dtype, for one preference."""
    total = matrix.base.to(dtype)
    for j, b, a in matrix.planes:
        w = weights[matrix.group, j].to(dtype).expand(len(b), 1)
        if matrix.first_row >= 0:
            w = w + weights[matrix.first_row :][: len(b), j, None].to(dtype)
        total = total + (w * b.to(dtype)) @ a.to(dtype)
    for j, plane in matrix.dense:
        w = weights[matrix.group, j].to(dtype).expand(len(plane), 1)
        if matrix.first_row >= 0:
            w = w + weights[matrix.first_row :][: len(plane), j, None].to(dtype)
        total = total + w * plane.to(dtype)
    return total


def check(matrices: list[Matrix], weights: Tensor, out: Tensor) -> None:
    """All outputs are as exact as float32 sums rounded once, and nothing else was written."""
    written = torch.zeros(out.shape[1], dtype=torch.bool, device=out.device)
    for matrix in matrices:
        place = slice(matrix.offset, matrix.offset + matrix.base.numel())
        written[place] = True
        for found, own in zip(out[:, place], weights, strict=True):
            exact, plain = (
                merged(matrix, own, torch.float64),
                merged(matrix, own, torch.float32).to(out.dtype),
            )
            error = (found.view(exact.shape).double() - exact).abs().max()
            assert error <= 2 * (plain.double() - exact).abs().max() + 1e-6 * exact.abs().max()
    assert out[:, ~written].isnan().all()


def test_there_is_no_fallback_on_the_cpu():
    matrices, weights, length = make(0, [(20, 32)], torch.float32, torch.float32, 1, False)
    with pytest.raises((ValueError, ImportError), match="merge_tensor_reference"):
        bind_lowrank_merge(matrices, Factors(matrices), weights, torch.zeros(1, length))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device here")
@pytest.mark.parametrize("factors", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("beside", [None, torch.bfloat16])
@pytest.mark.parametrize("shapes", [[(768, 3072), (2304, 768)], [(70, 131), (16, 33), (300, 48)]])
def test_on_the_gpu(dtype, factors, rows, shapes, beside):
    matrices, weights, length = make(1, shapes, dtype, factors, 3, rows, "cuda", beside)
    out = torch.full((3, length), float("nan"), dtype=dtype, device="cuda")
    bind_lowrank_merge(matrices, Factors(matrices), weights, out, by_row=rows)()
    check(matrices, weights, out)
