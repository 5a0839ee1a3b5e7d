"""Every kernel compiles for every architecture without a GPU."""

from __future__ import annotations

import pytest

from paretofuse.kernels import (
    launch,
    layer_merge,
    lowrank_merge,
    pieces,
    routed_grad,
    routed_linear,
    routed_merge,
    rows_kernels,
)
from paretofuse.kernels.aot import build, variants
from tests.support.kernels import needs_triton

needs_triton()

STREAMING = (
    variants.merge_variants,
    variants.chosen_variants,
    variants.row_merge_variants,
    variants.grad_variants,
    variants.layer_variants,
    variants.lowrank_variants,
)
LINEAR = (variants.linear_variants, variants.weights_grad_variants, variants.rows_variants)


def of(makers, dtype):
    return [variant for make in makers for variant in make((dtype,))]


def check(variant, architecture):
    """The binary is of its own kind and fits the shared memory of a multiprocessor."""
    compiled = build.compile_variant(variant, architecture)
    assert compiled.asm["cubin" if architecture.startswith("sm_") else "hsaco"].startswith(b"\x7fELF")
    assert compiled.metadata.shared <= {"sm_80": 163, "gfx942": 64}.get(architecture, 227) * 1024


@pytest.mark.parametrize("architecture", build.ARCHITECTURES)
def test_streaming_kernels_compile(architecture):
    """Each configuration in bfloat16, with int8 and int4 deltas too."""
    for variant in of(STREAMING, "bf16"):
        if variants.is_launched(variant, architecture):
            check(variant, architecture)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_89", "sm_120"])
def test_products_of_half_inputs_and_float32_planes_fit_the_smallest_devices(architecture):
    """As under autocast; sm_86, sm_89 and sm_120 give a program 99 KB."""
    found = [v for v in of(LINEAR, "bf16") if "*fp32" in (v.arguments.get("base"), v.arguments["deltas"])]
    assert {v.kernel.fn.__name__ for v in found} == {
        "linear_kernel", "weights_grad_kernel", "rows_kernel", "rows_weights_grad_kernel",
    }  # fmt: skip
    for variant in found:
        compiled = build.compile_variant(variant, architecture)
        assert compiled.metadata.shared <= 99 * 1024, variant.name


def test_every_configuration_is_among_the_variants():
    names = "\n".join(variant.name for dtype in ("fp32", "bf16") for variant in of(STREAMING + LINEAR, dtype))
    for prefix, configs in (
        ("merge", launch.MERGE_CONFIGS), ("grad", launch.GRAD_CONFIGS), ("linear", launch.LINEAR_CONFIGS),
        ("weights_grad", launch.WEIGHTS_GRAD_CONFIGS), ("rows", launch.ROWS_CONFIGS),
    ):  # fmt: skip
        assert len(configs) <= 8
        for use in set(configs) - {"any row"}:
            assert f"{prefix}_{use.replace(', ', '_').replace(' ', '_')}" in names


def test_every_kernel_is_among_the_variants():
    """What a launcher can launch has a variant: the functions that Triton compiles and are named kernels."""
    described = {variant.kernel.fn.__name__ for make in STREAMING + LINEAR for variant in make()}
    modules = (layer_merge, lowrank_merge, pieces, routed_grad, routed_linear, routed_merge, rows_kernels)
    defined = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert described == defined
    assert len(defined) == 10


def test_names_are_unique():
    names = [variant.name for make in STREAMING + LINEAR for variant in make()]
    assert len(names) == len(set(names))


def test_bfloat16_is_rounded_by_the_hardware():
    """The compiled kernel uses the conversion to nearest, not the integer form that the interpreter needs."""
    variant = next(variants.merge_variants(("bf16",)))
    assert "cvt.rn.bf16x2.f32" in build.compile_variant(variant, "sm_90").asm["ptx"]


def test_unknown_architecture_is_named():
    with pytest.raises(ValueError, match=r"'sm_12'.*sm_80"):
        build.compile_variant(next(variants.merge_variants()), "sm_12")
