"""The routed gradient in Triton's interpreter, against float64; `test_in_interpreter.py` runs it."""

from __future__ import annotations

import itertools
import os
import random

import pytest
import torch

from paretofuse.kernels.launch import GRAD_CONFIGS, filled
from paretofuse.kernels.reference import (
    block_products_reference,
    routed_grad_reference,
    unpacked,
)
from paretofuse.kernels.routed_grad import (
    SPAN,
    grad_partials,
    group_sums,
    partials_launch,
    plan_groups,
)
from paretofuse.kernels.routed_merge import routed_merge
from tests.support.kernels import routed_grad

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in a child process of test_in_interpreter.py", allow_module_level=True)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def make(seed, *, n, experts, grad=torch.float32, delta=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=g).to(grad), torch.randn(experts, n, generator=g).to(delta)


def check(found, truth, grad, deltas):
    """Float32 sums: the error is small against the sum of the products' sizes."""
    assert found.shape == truth.shape
    scale = (grad.double().abs() * deltas.double().abs()).sum(1).max()
    assert (found - truth).abs().max() <= 1e-6 * scale


@pytest.mark.parametrize(("grad", "delta"), list(itertools.product(FLOATS, repeat=2)))
@pytest.mark.parametrize("n", [1, 127, 128, 1000])
def test_partials(grad, delta, n):
    inputs = make(n, n=n, experts=3, grad=grad, delta=delta)
    check(grad_partials(*inputs, tile=128), block_products_reference(*inputs, 128), *inputs)


@pytest.mark.parametrize("use", GRAD_CONFIGS)
@pytest.mark.parametrize("experts", [1, 2, 7, 64])
def test_every_configuration(use, experts):
    inputs = make(experts, n=2500, experts=experts)
    check(
        filled(partials_launch(*inputs, None, 1024, 1024, GRAD_CONFIGS[use])),
        block_products_reference(*inputs, 1024),
        *inputs,
    )


@pytest.mark.parametrize("seed", range(8))
def test_both_stages_on_random_shapes(seed):
    pick = random.Random(seed)
    tile, groups = 2 ** pick.randint(4, 11), pick.randint(1, 5)
    tiles = pick.randint(1, 7)
    inputs = make(
        seed, n=tiles * tile, experts=pick.randint(1, 20), grad=pick.choice(FLOATS), delta=pick.choice(FLOATS)
    )
    tile_group = torch.randint(
        groups, (tiles,), dtype=torch.int32, generator=torch.Generator().manual_seed(seed)
    )
    found = routed_grad(*inputs, tile_group, groups, tile=tile)
    check(found, routed_grad_reference(*inputs, tile_group, groups, tile=tile), *inputs)
    assert torch.equal(found, routed_grad(*inputs, tile_group, groups, tile=tile))


def test_ragged_end_reads_nothing_beyond():
    """A gradient may end inside a tile, of which whole blocks may be missing."""
    grad, deltas = make(1, n=2100, experts=3)
    tile_group = torch.tensor([1, 0], dtype=torch.int32)
    found = routed_grad(grad, deltas, tile_group, 2, tile=2048)
    truth = torch.stack(
        [deltas[:, 2048:].double() @ grad[2048:].double(), deltas[:, :2048].double() @ grad[:2048].double()]
    )
    check(found, truth, grad, deltas)


def test_buckets_give_the_same_bits_as_the_whole():
    grad, deltas = make(2, n=320, experts=5)
    plan = plan_groups(torch.tensor([0, 1, 0, 2, 1], dtype=torch.int32), 3, tile=64)
    whole = group_sums(grad_partials(grad, deltas, tile=64), plan)
    parts = [grad_partials(grad[a:b], deltas[:, a:b], tile=64) for a, b in ((0, 128), (128, 192), (192, 320))]
    assert torch.equal(group_sums(torch.cat(parts), plan), whole)


def test_group_sums_over_many_blocks_and_an_empty_group():
    count = 3 * SPAN + 300  # the groups are summed in two pieces each
    partials = torch.randn(count, 11, generator=torch.Generator().manual_seed(3))
    group = torch.arange(count) % 3
    group[group == 1] = 3
    plan = plan_groups(group, 4, tile=32)
    truth = torch.zeros(4, 11, dtype=torch.float64).index_add_(0, group, partials.double())
    torch.testing.assert_close(group_sums(partials, plan), truth.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("kind", "group"), [("int8", 256), ("int8", 32), ("int4", 32)])
@pytest.mark.parametrize("n", [512, 467])
def test_quantized_deltas(kind, group, n):
    """The last group may be shorter, and of int4 the last byte half used; what lies behind it is not read."""
    grad, _ = make(8, n=n, experts=5)
    g = torch.Generator().manual_seed(8)
    stored = torch.randint(-127, 128, (5, n), generator=g, dtype=torch.int8)
    if kind == "int4":
        stored = torch.randint(256, (5, -(-n // 2)), generator=g, dtype=torch.uint8)
    wide = torch.full((5, -(-n // group) + 3), float("nan"))
    wide[:, :-3] = torch.rand(5, -(-n // group), generator=g) / 127
    scales = wide[:, :-3]
    found = grad_partials(grad, stored, scales=scales, tile=256)
    truth = block_products_reference(grad, stored, 256, scales=scales, group=group)
    check(found, truth, grad, unpacked(stored, scales, n, torch.float32, group))


def test_merge_refuses_gradients_that_do_not_exist():
    base, deltas = make(5, n=32, experts=2)
    tile_group, weights = torch.zeros(1, dtype=torch.int32), torch.ones(1, 2, requires_grad=True)
    with pytest.raises(ValueError, match=r"deltas: got requires_grad=True.*detach"):
        routed_merge(base, deltas.requires_grad_(), tile_group, weights, tile=32)
    for out in (None, torch.empty(32)):
        with pytest.raises(ValueError, match="weights: got requires_grad=True"):
            routed_merge(base, deltas.detach(), tile_group, weights, out=out, tile=32)


def test_operators_are_sound():
    grad, deltas = make(6, n=96, experts=3)
    tile_group = torch.tensor([1, 0, 1], dtype=torch.int32)
    plan = plan_groups(tile_group, 2, tile=32)
    torch.library.opcheck(
        torch.ops.paretofuse.group_sums.default,
        (grad_partials(grad, deltas, tile=32), plan.order, plan.pieces, plan.starts),
    )
