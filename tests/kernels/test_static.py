"""The machine code keeps its promises: no spills, 128-bit accesses, each byte once, tensor cores where they belong."""

from __future__ import annotations

import dataclasses
import re
from itertools import product

import pytest
import torch

from benchmarks.gpu import static
from paretofuse.kernels.aot import build, variants
from tests.support.kernels import needs_triton

triton = needs_triton()

MATRIX = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
EVERYTHING = list(product(build.ARCHITECTURES, variants.FLOATS))
SAMPLE = [("sm_80", "bf16"), ("sm_90", "fp32"), ("sm_100", "bf16"), ("gfx942", "bf16")]
"""float16 is compiled as bfloat16 is, and float32 as on sm_90."""


def check(architecture, dtype):
    if architecture == "sm_100" and triton.__version__.startswith("3.6."):
        pytest.skip("the compiler of Triton 3.6 fails on routed_linear with float32 planes for sm_100")
    found = list(static.findings([architecture], [dtype]))
    assert {f.kernel: f.faults for f in found if f.faults} == {}
    streaming = [f for f in found if f.kernel.startswith(("merge", "grad", "layer_merge"))]
    assert all((f.least_loads > 0) != ("any_row" in f.kernel) for f in streaming)
    # Of x in float32 only TF32 is for matrix instructions: NVIDIA has none that multiply float32 exactly.
    products = [
        f
        for f in found
        if f.kernel.startswith(("linear", "rows", "weights_grad", "lowrank"))
        and not f.kernel.endswith("fp32")
    ]
    assert all(MATRIX[architecture] in f.tensor_core for f in products)
    # 0 would mean that its shared memory or registers do not fit
    assert {f.kernel: f.occupancy for f in found if not 0 < f.occupancy <= 1} == {}
    return streaming, products


def test_sm_90_in_bfloat16():
    """On Hopper the products run as warp-group instructions."""
    streaming, products = check("sm_90", "bf16")
    assert len(streaming) >= 13
    assert len(products) >= 22


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "dtype"), SAMPLE)
def test_architectures(architecture, dtype):
    check(architecture, dtype)


@pytest.mark.long
@pytest.mark.parametrize(("architecture", "dtype"), [case for case in EVERYTHING if case not in SAMPLE])
def test_everything(architecture, dtype):
    check(architecture, dtype)


def test_faults_are_found():
    """A spill, a narrow load, and a narrow store each make a finding faulty; so does code for unaligned addresses."""
    variant = next(variants.merge_variants(("bf16",)))
    good = static.inspect(variant, "sm_90")
    assert good.faults == []
    assert "8 spilled" in dataclasses.replace(good, spills=8).faults[0]
    unaligned = static.inspect(dataclasses.replace(variant, aligned=()), "sm_90")
    assert len(unaligned.faults) == 3  # loads and stores that move too little, and narrow stores
    assert unaligned.other_accesses > good.other_accesses


def test_traffic_is_counted():
    """A product reads two tensors and writes one; a view is free."""
    a = torch.empty(8, 4, device="meta")
    with static.Traffic() as traffic:
        (a * a).view(4, 8).sum(0)
    assert traffic.launches == 2
    assert traffic.bytes == 4 * (32 + 32 + 32) + 4 * (32 + 8)


def test_traffic_in_place_is_counted():
    a = torch.empty(8, 4, device="meta")
    with static.Traffic() as traffic:
        a.add_(a)
    assert traffic.launches == 1
    assert traffic.bytes == 4 * (32 + 32 + 32)


def test_tf32_runs_as_matrix_instructions_and_exact_products_do_not():
    """What `torch.set_float32_matmul_precision("high")` asks for, on sm_90; also without spills."""
    makers = (variants.linear_variants, variants.weights_grad_variants, variants.rows_variants)
    kinds = [
        v
        for make in makers
        for v in make(("fp32",))
        if "_linear_" in v.name and not re.search("loop|pieces", v.name)
    ]
    tf32 = [static.inspect(v, "sm_90") for v in kinds if v.name.endswith("tf32")]
    assert {v.kernel.fn.__name__ for v in kinds if v.name.endswith("tf32")} == {
        "linear_kernel", "weights_grad_kernel", "rows_kernel", "rows_weights_grad_kernel",
    }  # fmt: skip
    assert [f.faults for f in tf32 if f.faults] == []
    assert all("wgmma.mma_async" in f.tensor_core for f in tf32)
    exact = next(v for v in kinds if v.name.endswith("fp32"))
    assert static.inspect(exact, "sm_90").tensor_core == ""
