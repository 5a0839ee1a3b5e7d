"""The merge kernel in Triton's interpreter, against float64; `test_in_interpreter.py` runs it."""

from __future__ import annotations

import itertools
import os
import random

import pytest
import torch

from paretofuse.kernels.launch import MERGE_CONFIGS
from paretofuse.kernels.reference import routed_merge_reference, unpacked
from paretofuse.kernels.routed_merge import merge_launch, routed_merge

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in a child process of test_in_interpreter.py", allow_module_level=True)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def make(seed, *, tiles, tile, experts, k, groups=3, base=torch.float32, delta=torch.float32):
    g = torch.Generator().manual_seed(seed)
    n = tiles * tile
    return (
        torch.randn(n, generator=g).to(base),
        torch.randn(experts, n, generator=g).to(delta),
        torch.randint(groups, (tiles,), generator=g, dtype=torch.int32),
        torch.randn(k, groups, experts, generator=g) / experts**0.5,
    )


def check(out, inputs, tile):
    """Every element was written; the error is at most twice that of PyTorch's own result in out's dtype."""
    truth = routed_merge_reference(*inputs, tile=tile, dtype=torch.float64, accumulate=torch.float64)
    plain = routed_merge_reference(*inputs, tile=tile, dtype=out.dtype)
    assert not out.isnan().any()
    assert (out - truth).abs().max() <= 2 * (plain - truth).abs().max()


@pytest.mark.parametrize(("base", "delta", "out"), list(itertools.product(FLOATS, repeat=3)))
def test_dtype_mixes(base, delta, out):
    inputs = make(1, tiles=5, tile=64, experts=3, k=2, base=base, delta=delta)
    poisoned = torch.full((2, 320), float("nan"), dtype=out)
    assert routed_merge(*inputs, out=poisoned, tile=64) is poisoned
    check(poisoned, inputs, 64)


@pytest.mark.parametrize("experts", [1, 2, 7, 16, 17, 65])
@pytest.mark.parametrize("k", [1, 2, 5, 9])
def test_experts_and_preferences(experts, k):
    inputs = make(experts * 10 + k, tiles=3, tile=32, experts=experts, k=k)
    poisoned = torch.full((k, 96), float("nan"))
    check(routed_merge(*inputs, out=poisoned, tile=32), inputs, 32)


@pytest.mark.parametrize("use", MERGE_CONFIGS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_configuration(use, dtype):
    """Each configuration at the most experts that it holds, the last one beyond its chunk; at any K."""
    config = MERGE_CONFIGS[use]
    experts = config.e_chunk if config.one_chunk else config.e_chunk + 3
    inputs = make(2, tiles=2, tile=1024, experts=experts, k=3, base=dtype, delta=dtype)
    out = torch.full((3, 2048), float("nan"), dtype=dtype)
    merge_launch(*inputs, None, None, out, 1024, 0, config).run()
    check(out, inputs, 1024)


@pytest.mark.parametrize("seed", range(12))
def test_random_shapes(seed):
    pick = random.Random(seed)
    tile = 2 ** pick.randint(4, 11)
    inputs = make(
        seed, tiles=pick.randint(1, 9), tile=tile, experts=pick.randint(1, 20), k=pick.randint(1, 12),
        groups=pick.randint(1, 6), base=pick.choice(FLOATS), delta=pick.choice(FLOATS),
    )  # fmt: skip
    out = torch.full((len(inputs[3]), len(inputs[0])), float("nan"), dtype=pick.choice(FLOATS))
    check(routed_merge(*inputs, out=out, tile=tile), inputs, tile)


def quantized(seed, kind, group, *, experts, n):
    """Random stored planes and their scales."""
    g = torch.Generator().manual_seed(seed)
    if kind == "int8":
        stored = torch.randint(-127, 128, (experts, n), generator=g, dtype=torch.int8)
    else:
        stored = torch.randint(256, (experts, n // 2), generator=g, dtype=torch.uint8)
    return stored, torch.rand(experts, n // group, generator=g) / 127


@pytest.mark.parametrize(
    ("kind", "group", "k", "experts"),
    [("int8", 64, 3, 9), ("int8", 32, 1, 2), ("int4", 32, 3, 3), ("int4", 16, 1, 9)],
)
@pytest.mark.parametrize("dtype", FLOATS)
def test_quantized_deltas(kind, group, k, experts, dtype):
    base, _, tile_group, weights = make(7, tiles=3, tile=64, experts=experts, k=k, base=dtype)
    deltas, scales = quantized(7, kind, group, experts=experts, n=192)
    inputs = (base, deltas, tile_group, weights)
    for out_dtype in FLOATS:
        out = torch.full((k, 192), float("nan"), dtype=out_dtype)
        routed_merge(*inputs, scales=scales, out=out, tile=64)
        truth = routed_merge_reference(
            *inputs, tile=64, scales=scales, dtype=torch.float64, accumulate=torch.float64
        )
        plain = routed_merge_reference(*inputs, tile=64, scales=scales, dtype=out_dtype)
        assert not out.isnan().any()
        assert (out - truth).abs().max() <= 2 * (plain - truth).abs().max()


# Two tensors: rows of 48 elements over three tiles, the last one in part, and one of a tile without coefficients.
ROWS, SHORT = 13, 48
CHOSEN = [[1, 0, SHORT, 5, 17], [2, 1, SHORT, 5, 17], [3, 2, SHORT, 5, 17], [0, 0, 1, -1, -1]]


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("shared", [0, 16, 1])
@pytest.mark.parametrize("k", [1, 3])
def test_chosen_tiles_and_row_coefficients(kind, shared, k):
    """Tiles in another order than they lie in, one left out, with a coefficient for each row of a tensor or none."""
    tile, experts, groups = 256, 3, 5
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    base, deltas, tile_group, _ = make(
        9, tiles=5, tile=tile, experts=experts, k=k, groups=groups, base=dtype, delta=dtype
    )
    scales = None
    if kind in ("int8", "int4"):
        deltas, scales = quantized(9, kind, 64, experts=experts, n=5 * tile)
    weights = torch.randn(
        k, groups + (ROWS if shared else 0), experts, generator=torch.Generator().manual_seed(9)
    )
    numbers = unpacked(deltas, scales, 5 * tile, torch.float64)
    out = torch.full((k, 4 * tile), float("nan"), dtype=dtype)
    routed_merge(
        base, deltas, tile_group, weights, scales=scales, places=torch.tensor(CHOSEN, dtype=torch.int32),
        shared=shared, out=out, tile=tile,
    )  # fmt: skip
    for i, (source, number, columns, first, last) in enumerate(CHOSEN):
        span = slice(source * tile, (source + 1) * tile)
        w = weights.double()[:, tile_group[source].long(), :, None]  # [k, E, 1]
        if shared and first >= 0:
            row = (first + (number * tile + torch.arange(tile)) // columns).clamp(max=last)
            w = w + weights.double()[:, row].mT  # [k, E, tile]
        truth = base.double()[span] + (w * numbers[:, span]).sum(1)
        found = out[:, i * tile : (i + 1) * tile].double()
        torch.testing.assert_close(found, truth, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_what_chosen_tiles_lack_is_named():
    base, deltas, tile_group, weights = make(4, tiles=3, tile=32, experts=2, k=1)
    places = torch.zeros(2, 5, dtype=torch.int32)
    for given, words in (
        ({"places": places}, "out: got None with places"),
        ({"places": places[:, :4]}, r"places: got shape \(2, 4\), expected \(2, 5\)"),
        ({"places": places, "out": torch.zeros(1, 96)}, r"out: got shape \(1, 96\), expected \(1, 64\)"),
        ({"places": places, "shared": 24, "out": torch.zeros(1, 64)}, "shared: got 24"),
        ({"shared": 16}, "shared: got 16 with places of none"),
    ):
        with pytest.raises(ValueError, match=words):
            routed_merge(base, deltas, tile_group, weights, tile=32, **given)


def test_planes_and_rows_may_have_gaps():
    base, deltas, tile_group, weights = make(3, tiles=3, tile=32, experts=3, k=2)
    wide = torch.full((3, 130), float("nan"))
    wide[:, :96] = deltas
    out = torch.full((2, 100), 7.0)
    routed_merge(base, wide[:, :96], tile_group, weights, out=out[:, :96], tile=32)
    check(out[:, :96], (base, deltas, tile_group, weights), 32)
    assert (out[:, 96:] == 7.0).all()


def test_one_preference_and_default_out():
    base, deltas, tile_group, weights = make(4, tiles=3, tile=32, experts=2, k=1, base=torch.bfloat16)
    out = routed_merge(base, deltas, tile_group, weights[0], tile=32)
    assert out.dtype == torch.bfloat16
    check(out[None], (base, deltas, tile_group, weights), 32)


def test_empty():
    base, deltas, tile_group, weights = make(5, tiles=0, tile=32, experts=2, k=2)
    assert routed_merge(base, deltas, tile_group, weights, tile=32).shape == (2, 0)
    base, deltas, tile_group, weights = make(5, tiles=1, tile=32, experts=2, k=0)
    assert routed_merge(base, deltas, tile_group, weights, tile=32).shape == (0, 32)


def test_rounds_to_nearest_even_and_keeps_infinities():
    """Halfway cases, overflow, infinities and NaN come out as PyTorch's own conversion makes them."""
    base = torch.tensor(
        [1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.4e38, float("inf"), -float("inf"), float("nan"), 1e-40]
    )
    base = base.repeat(4)
    out = routed_merge(
        base, torch.zeros(1, 32), torch.zeros(1, dtype=torch.int32), torch.zeros(1, 1),
        out=torch.zeros(32, dtype=torch.bfloat16), tile=32,
    )  # fmt: skip
    torch.testing.assert_close(out, base.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)


def test_operator_is_sound():
    inputs = make(6, tiles=2, tile=32, experts=2, k=2)
    torch.library.opcheck(
        torch.ops.paretofuse.routed_merge_out.default, (*inputs, None, None, torch.zeros(2, 64), 32, 0)
    )


def test_compiles_and_exports_as_one_node():
    base, deltas, tile_group, weights = make(8, tiles=2, tile=32, experts=2, k=2)

    class Merge(torch.nn.Module):
        def forward(self, weights):
            return routed_merge(base, deltas, tile_group, weights, tile=32)

    truth = Merge()(weights)
    compiled = torch.compile(Merge(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(weights), truth)
    program = torch.export.export(Merge(), (weights,))
    assert torch.ops.paretofuse.routed_merge.default in [node.target for node in program.graph.nodes]
    assert torch.equal(program.module()(weights), truth)
