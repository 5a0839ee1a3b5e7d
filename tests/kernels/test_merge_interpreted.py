"""The merge kernel in Triton's interpreter, against float64; `test_in_interpreter.py` runs it."""

from __future__ import annotations

import itertools
import os
import random

import pytest
import torch

from paretofuse.kernels.launch import MERGE_CONFIGS
from paretofuse.kernels.quantize import quantize_tiles
from paretofuse.kernels.reference import routed_merge_reference
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
    merge_launch(*inputs, None, out, 1024, config).run()
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


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_byte_deltas(dtype, k):
    base, deltas, tile_group, weights = make(7, tiles=3, tile=64, experts=9, k=k, base=torch.bfloat16)
    quantized, scales = quantize_tiles(deltas, dtype, tile=64)
    for out_dtype in FLOATS:
        out = torch.full((k, 192), float("nan"), dtype=out_dtype)
        routed_merge(base, quantized, tile_group, weights, scales=scales, out=out, tile=64)
        inputs = (base, quantized, tile_group, weights)
        truth = routed_merge_reference(
            *inputs, tile=64, scales=scales, dtype=torch.float64, accumulate=torch.float64
        )
        plain = routed_merge_reference(*inputs, tile=64, scales=scales, dtype=out_dtype)
        assert (out - truth).abs().max() <= 2 * (plain - truth).abs().max()


def test_every_float8_is_decoded_exactly():
    """All 254 numbers, subnormals and both zeros included; the two codes for NaN are no numbers."""
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes.view(torch.float8_e4m3fn)
    out = routed_merge(
        torch.zeros(256),
        values[None],
        torch.zeros(1, dtype=torch.int32),
        torch.ones(1, 1),
        scales=torch.ones(1, 1),
        tile=256,
    )
    numbers = (codes & 0x7F) != 0x7F
    assert numbers.sum() == 254
    assert torch.equal(out[numbers], values.float()[numbers])


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
        torch.ops.paretofuse.routed_merge_out.default, (*inputs, None, torch.zeros(2, 64), 32)
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
