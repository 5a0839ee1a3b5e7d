"""Every kernel compiles for every architecture without a GPU."""

from __future__ import annotations

import pytest
from paretofuse.kernels import aot, variants
from paretofuse.kernels.launch import (
    GRAD_CONFIGS,
    LINEAR_CONFIGS,
    MERGE_CONFIGS,
    ROWS_CONFIGS,
    WEIGHTS_GRAD_CONFIGS,
)

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.mark.parametrize("architecture", aot.ARCHITECTURES)
def test_merge_and_grad_compile(architecture):
    """Each configuration, in float32 and in bfloat16, becomes a binary of its own kind."""
    makers = (variants.merge_variants, variants.grad_variants)
    chosen = [v for d in ("fp32", "bf16") for make in makers for v in make(dtypes=(d,))]
    assert len(chosen) == 2 * len(MERGE_CONFIGS) + 2 * 2
    for variant in chosen:
        compiled = aot.compile_variant(variant, architecture)
        binary = compiled.asm["cubin" if architecture.startswith("sm_") else "hsaco"]
        assert binary.startswith(b"\x7fELF"), variant.name


LINEAR = (variants.linear_variants, variants.weights_grad_variants, variants.rows_variants)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", aot.ARCHITECTURES)
def test_linear_compiles(architecture):
    for variant in (v for make in LINEAR for v in make(("bf16",))):
        compiled = aot.compile_variant(variant, architecture)
        limit = {"sm_80": 163, "gfx942": 64}.get(architecture, 227) * 1024
        assert compiled.metadata.shared <= limit, variant.name


def test_bfloat16_is_rounded_by_the_hardware():
    """The compiled kernel uses the conversion to nearest, not the integer form that the interpreter needs."""
    variant = next(variants.merge_variants(dtypes=("bf16",)))
    assert "cvt.rn.bf16x2.f32" in aot.compile_variant(variant, "sm_90").asm["ptx"]


def test_at_most_six_configurations():
    assert (
        max(map(len, (MERGE_CONFIGS, GRAD_CONFIGS, LINEAR_CONFIGS, WEIGHTS_GRAD_CONFIGS, ROWS_CONFIGS))) <= 6
    )


def test_unknown_architecture_is_named():
    with pytest.raises(ValueError, match=r"'sm_12'.*sm_80"):
        aot.compile_variant(next(variants.merge_variants()), "sm_12")
