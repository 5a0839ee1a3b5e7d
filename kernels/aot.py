"""Kernels compiled ahead of time, for GPUs that need not be present.

A `Variant` is everything that fixes a kernel's machine code: argument types, which arguments are multiples of
16, compile-time constants, warps. The tests compile every variant for every architecture in `ARCHITECTURES`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from paretofuse.kernels.launch import GRAD_CONFIGS, MERGE_CONFIGS, grad_config
from paretofuse.kernels.routed_grad import (
    MAX_BLOCK,
    SUM_BLOCKS,
    SUM_EXPERTS,
    group_sums_kernel,
    partials_kernel,
)
from paretofuse.kernels.routed_merge import merge_kernel
from paretofuse.kernels.triton_or_none import interpreted, triton

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
"""A100, H100 and H200, B200, MI300X."""

FLOATS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Variant:
    """One kernel with all that its machine code depends on.

    Attributes:
        name: unique, fit for a file name.
        kernel: the Triton function.
        arguments: run-time arguments in order, name -> Triton type, e.g. "*bf16" or "i64".
        constants: compile-time arguments.
        aligned: arguments that are multiples of 16 (bytes for pointers), which wide loads need.
        warps: warps per program.
        stages: depth of software pipelining.
        grid: the launch grid, in words and argument names.
    """

    name: str
    kernel: Any
    arguments: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: tuple[str, ...]
    warps: int
    grid: str
    stages: int = 3


def merge_variants(tile: int = 1024, dtypes: tuple[str, ...] = FLOATS) -> Iterator[Variant]:
    """Every configuration of the merge in every mix of base, delta and output dtypes."""
    for (use, config), (base, delta, out) in product(MERGE_CONFIGS.items(), product(dtypes, repeat=3)):
        yield Variant(
            name=f"merge_{use.replace(', ', '_').replace(' ', '_')}_{base}_{delta}_{out}",
            kernel=merge_kernel,
            arguments={
                "base": f"*{base}", "deltas": f"*{delta}", "tile_group": "*i32", "weights": "*fp32",
                "out": f"*{out}", "n": "i64", "experts": "i32", "groups": "i32", "preferences": "i32",
                "delta_stride": "i64", "out_stride": "i64",
            },
            constants={
                "TILE": tile, "K_BLOCK": config.k_block, "BLOCK": min(config.block, tile),
                "E_CHUNK": config.e_chunk, "INTERPRETED": False,
            },
            aligned=("base", "deltas", "tile_group", "weights", "out", "n", "delta_stride", "out_stride"),
            warps=config.warps,
            grid="ceil(preferences / K_BLOCK) * n / BLOCK, 1, 1",
        )  # fmt: skip


def grad_variants(tile: int = 1024, dtypes: tuple[str, ...] = FLOATS) -> Iterator[Variant]:
    """Every configuration of the gradient's first stage that its size rule gives to a dtype, and the second stage."""
    for grad, delta in product(dtypes, repeat=2):
        config = grad_config(4 if delta == "fp32" else 2)
        use = next(use for use, other in GRAD_CONFIGS.items() if other is config)
        yield Variant(
            name=f"grad_{use.replace(' ', '_')}_{grad}_{delta}",
            kernel=partials_kernel,
            arguments={
                "grad": f"*{grad}", "deltas": f"*{delta}", "partials": "*fp32", "n": "i64", "experts": "i32",
                "delta_stride": "i64",
            },
            constants={"BLOCK": min(tile, MAX_BLOCK), "E_CHUNK": config.e_chunk},
            aligned=("grad", "deltas", "partials", "n", "delta_stride"),
            warps=config.warps,
            grid="ceil(n / BLOCK), 1, 1",
        )  # fmt: skip
    yield Variant(
        name="group_sums",
        kernel=group_sums_kernel,
        arguments={
            "partials": "*fp32", "order": "*i32", "starts": "*i32", "out": "*fp32", "experts": "i32",
        },
        constants={"BLOCKS": SUM_BLOCKS, "EXPERTS": SUM_EXPERTS},
        aligned=("partials", "order", "starts", "out"),
        warps=4,
        grid="G, ceil(experts / EXPERTS), 1",
    )  # fmt: skip


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
        target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    else:
        target = GPUTarget("hip", architecture, 64)
    signature = {**variant.arguments, **dict.fromkeys(variant.constants, "constexpr")}
    names = list(signature)
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned}
    source = ASTSource(variant.kernel, signature, dict(variant.constants), attributes)
    return triton.compile(
        source, target=target, options={"num_warps": variant.warps, "num_stages": variant.stages}
    )
