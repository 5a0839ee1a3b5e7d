"""The routed gradient: its CPU form, what it refuses, and the GPU; `test_in_interpreter.py` does the rest."""

from __future__ import annotations

import pytest
import torch

from paretofuse.kernels.reference import routed_grad_reference
from paretofuse.kernels.routed_grad import SPAN, grad_partials, group_sums, plan_groups
from tests.support.kernels import routed_grad


def case(seed: int, n: int, tile: int, experts: int, groups: int, device: str = "cpu"):
    g = torch.Generator().manual_seed(seed)
    tiles = -(-n // tile)
    return (
        torch.randn(n, generator=g).to(device),
        torch.randn(experts, n, generator=g).to(device),
        torch.randint(groups, (tiles,), generator=g, dtype=torch.int32).to(device),
    )


@pytest.mark.parametrize("seed", range(4))
def test_cpu_form_agrees_with_the_reference(seed):
    grad, deltas, tile_group = case(seed, n=4096 * 3, tile=4096, experts=3, groups=4)
    found = routed_grad(grad, deltas, tile_group, 4, tile=4096)
    truth = routed_grad_reference(grad, deltas, tile_group, 4, tile=4096)
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-4)


def test_plan_lists_every_block_once_in_layout_order():
    plan = plan_groups(torch.tensor([2, 0, 2, 0]), 4, tile=2048)
    assert plan.block == 1024
    assert plan.order.tolist() == [2, 3, 6, 7, 0, 1, 4, 5]
    assert plan.pieces.tolist() == [0, 4, 8]
    assert plan.starts.tolist() == [0, 1, 1, 2, 2]


def test_a_large_group_is_summed_in_pieces():
    tile_group = torch.zeros(2 * SPAN + 5, dtype=torch.int32)
    tile_group[7::3] = 1
    plan = plan_groups(tile_group, 2, tile=32)
    ones, count = torch.ones(len(tile_group), 1), tile_group.sum().item()
    assert plan.pieces.diff().max() <= SPAN
    assert plan.starts.tolist() == [0, 2, 3]
    sums = group_sums(ones, plan)
    assert sums[:, 0].tolist() == [len(tile_group) - count, count]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"grad": torch.zeros(100, dtype=torch.float64)}, TypeError, "grad: got torch.float64"),
        ({"grad": torch.zeros(200)[::2]}, ValueError, "grad: got strides"),
        ({"grad": torch.zeros(10, 10)}, ValueError, r"grad: got shape \(10, 10\)"),
        ({"deltas": torch.zeros(3, 99)}, ValueError, r"deltas: got shape \(3, 99\), expected \(3, 100\)"),
        ({"deltas": torch.zeros(100)}, ValueError, r"deltas: got shape \(100,\), expected \[E, N\]"),
        ({"deltas": torch.zeros(0, 100)}, ValueError, "deltas: got no experts"),
        ({"tile": 33}, ValueError, "power of two"),
    ],
)
def test_bad_input_is_named(change, error, words):
    arguments = dict(zip(("grad", "deltas", "tile_group"), case(1, 100, 32, 3, 2), strict=True))
    with pytest.raises(error, match=words):
        routed_grad(**{**arguments, "groups": 2, "tile": 32, **change})


def test_partials_are_written_where_they_are_wanted():
    grad, deltas, _ = case(5, n=100, tile=32, experts=3, groups=2)
    whole = torch.full((9, 3), torch.nan)
    rows = whole[2:6]
    assert grad_partials(grad, deltas, out=rows, tile=32) is rows
    assert torch.equal(rows, grad_partials(grad, deltas, tile=32))
    assert whole.isnan().sum() == 5 * 3
    with pytest.raises(ValueError, match=r"out: got shape \(5, 3\), expected \(4, 3\)"):
        grad_partials(grad, deltas, out=whole[:5], tile=32)
    with pytest.raises(TypeError, match=r"out: got torch.float64, expected torch.float32"):
        grad_partials(grad, deltas, out=rows.double(), tile=32)
    with pytest.raises(ValueError, match="out: got strides"):
        grad_partials(grad, deltas, out=torch.zeros(3, 4).T, tile=32)


def test_group_sums_refuses_partials_of_another_layout():
    plan = plan_groups(torch.zeros(3, dtype=torch.int32), 1, tile=32)
    with pytest.raises(ValueError, match=r"partials: got shape \(4, 2\), expected \(3, 2\)"):
        group_sums(torch.zeros(4, 2), plan)


def test_operators_are_sound():
    grad, deltas, tile_group = case(2, n=100, tile=32, experts=3, groups=2)
    plan = plan_groups(tile_group, 2, tile=32)
    partials = grad_partials(grad, deltas, tile=32)
    torch.library.opcheck(
        torch.ops.paretofuse.group_sums.default, (partials, plan.order, plan.pieces, plan.starts)
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_the_gpu(dtype):
    """Right to float32 sums, and the same bits twice."""
    grad, deltas, tile_group = case(3, n=3_000_001, tile=1024, experts=7, groups=5, device="cuda")
    grad, deltas = grad.to(dtype), deltas.to(dtype)
    found = routed_grad(grad, deltas, tile_group, 5)
    assert torch.equal(found, routed_grad(grad, deltas, tile_group, 5))
    pad = (0, -grad.numel() % 1024)
    wide, planes = torch.nn.functional.pad(grad, pad), torch.nn.functional.pad(deltas, pad)
    truth = routed_grad_reference(wide, planes, tile_group, 5, tile=1024)
    plain = routed_grad_reference(wide, planes, tile_group, 5, tile=1024, accumulate=torch.float32)
    assert (found - truth).abs().max() <= 2 * (plain - truth).abs().max()
