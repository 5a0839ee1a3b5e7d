"""Every kernel compiles for every architecture without a GPU."""

from __future__ import annotations

import pytest
from paretofuse.kernels import aot
from paretofuse.kernels.launch import GRAD_CONFIGS, MERGE_CONFIGS

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.mark.parametrize("architecture", aot.ARCHITECTURES)
def test_merge_and_grad_compile(architecture):
    """Each configuration, in float32 and in bfloat16, becomes a binary of its own kind."""
    makers = (aot.merge_variants, aot.grad_variants)
    variants = [v for d in ("fp32", "bf16") for make in makers for v in make(dtypes=(d,))]
    assert len(variants) == 2 * len(MERGE_CONFIGS) + 2 * 2
    for variant in variants:
        compiled = aot.compile_variant(variant, architecture)
        binary = compiled.asm["cubin" if architecture.startswith("sm_") else "hsaco"]
        assert binary.startswith(b"\x7fELF"), variant.name


def test_bfloat16_is_rounded_by_the_hardware():
    """The compiled kernel uses the conversion to nearest, not the integer form that the interpreter needs."""
    variant = next(aot.merge_variants(dtypes=("bf16",)))
    assert "cvt.rn.bf16x2.f32" in aot.compile_variant(variant, "sm_90").asm["ptx"]


def test_at_most_six_configurations():
    assert len(MERGE_CONFIGS) <= 6
    assert len(GRAD_CONFIGS) <= 6


def test_unknown_architecture_is_named():
    with pytest.raises(ValueError, match=r"'sm_12'.*sm_80"):
        aot.compile_variant(next(aot.merge_variants()), "sm_12")
