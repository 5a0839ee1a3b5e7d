"""Kernels compiled ahead of time, for GPUs that need not be present."""

from __future__ import annotations

from typing import Any

from paretofuse.kernels.triton_or_none import interpreted, triton
from paretofuse.kernels.variants import Variant

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
"""A100, H100 and H200, B200, MI300X."""


def supports(variant: Variant, architecture: str) -> bool:
    """Whether an architecture has the instructions for a variant: only NVIDIA's from sm_89 on convert float8 e4m3."""
    return "*fp8e4nv" not in variant.arguments.values() or architecture in ("sm_90", "sm_100")


def compile_variant(variant: Variant, architecture: str) -> Any:
    """Compile for one of `ARCHITECTURES`; needs no GPU.

    Returns:
        Triton's CompiledKernel: `.asm` holds each stage, the binary as "cubin" or "hsaco".

    Raises:
        ImportError: Triton is not installed.
        RuntimeError: the kernel's module was imported under TRITON_INTERPRET=1.
        ValueError: an unknown architecture.
    """
    if triton is None:
        raise ImportError("compiling kernels needs Triton, which is not installed; pip install triton")
    if interpreted(variant.kernel):
        raise RuntimeError(
            "got kernels defined under TRITON_INTERPRET=1, expected compiled ones; unset it and restart"
        )
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture: got {architecture!r}, expected one of {', '.join(ARCHITECTURES)}")
    if architecture.startswith("sm_"):
        target, warps = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32), variant.warps
    else:
        target, warps = GPUTarget("hip", architecture, 64), variant.wide_warps
    signature = {**variant.arguments, **dict.fromkeys(variant.constants, "constexpr")}
    attributes = {
        (variant.kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned
    }
    source = ASTSource(variant.kernel, signature, dict(variant.constants), attributes)
    return triton.compile(source, target=target, options={"num_warps": warps, "num_stages": variant.stages})
