"""Every kernel in every form that the launch rules can choose, as the compiler needs it described.

A `Variant` is everything that fixes a kernel's machine code: argument types, which arguments are multiples of 16,
compile-time constants, warps. Tests compile each for each architecture; `benchmarks.gpu.static` reads the results.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from paretofuse.kernels.launch import (
    GRAD_CONFIGS,
    LINEAR_CONFIGS,
    MERGE_CONFIGS,
    ROWS_CONFIGS,
    WEIGHTS_GRAD_CONFIGS,
    grad_config,
)
from paretofuse.kernels.routed_grad import (
    MAX_BLOCK,
    SUM_BLOCKS,
    SUM_EXPERTS,
    SUM_THREADS,
    group_sums_kernel,
    partials_kernel,
)
from paretofuse.kernels.routed_linear import linear_kernel, weights_grad_kernel
from paretofuse.kernels.routed_merge import merge_kernel
from paretofuse.kernels.routed_rows import rows_kernel, rows_weights_grad_kernel

FLOATS = ("fp32", "bf16", "fp16")
BYTES = ("i8", "u8", "fp8e4nv")
"""Deltas in one byte: int8; float8 e4m3 decoded by hand; float8 e4m3 converted by the GPU (NVIDIA from sm_89 on)."""

TILE = 1024
"""Elements per tile of the flat buffers that the ahead-of-time kernels are for."""

LAYOUTS = {"linear": ("stride_i", "stride_o"), "conv1d": ("stride_o", "stride_i")}
"""Of a weight [O, I]: the stride that is 1, and the other."""


@dataclass(frozen=True)
class Variant:
    """One kernel with all that its machine code depends on.

    Attributes:
        name: unique, fit for a file name.
        kernel: the Triton function.
        arguments: run-time arguments in order, name -> Triton type, e.g. "*bf16" or "i64".
        constants: compile-time arguments.
        aligned: arguments that are multiples of 16 (bytes for pointers), which wide loads need.
        warps: warps per program where a warp has 32 threads.
        wide_warps: the same where it has 64 (AMD).
        stages: depth of software pipelining.
        grid: the launch grid, in words and argument names.
    """

    name: str
    kernel: Any
    arguments: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: tuple[str, ...]
    warps: int
    wide_warps: int
    grid: str
    stages: int = 3


def _name(*parts: str) -> str:
    """The parts as one name of letters, digits and underscores."""
    return "_".join(parts).replace(", ", "_").replace(" ", "_")


def merge_variants(dtypes: tuple[str, ...] = FLOATS) -> Iterator[Variant]:
    """The merge, for every mix of base, delta and output dtypes, in the configurations that its rule gives them."""
    for (use, config), (base, delta, out) in product(
        MERGE_CONFIGS.items(), product(dtypes, (*dtypes, *BYTES), dtypes)
    ):
        scaled = delta in BYTES
        if scaled != ("byte" in use):
            continue
        yield Variant(
            name=_name("merge", use, base, delta, out),
            kernel=merge_kernel,
            arguments={
                "base": f"*{base}", "deltas": f"*{delta}", "tile_group": "*i32", "weights": "*fp32",
                "scales": "*fp32", "out": f"*{out}", "n": "i64", "experts": "i32", "groups": "i32",
                "preferences": "i32", "delta_stride": "i64", "out_stride": "i64",
            },
            constants={
                "TILE": TILE, "K_BLOCK": config.k_block, "BLOCK": config.block, "E_CHUNK": config.e_chunk,
                "HAS_SCALES": scaled, "INTERPRETED": False,
            },
            aligned=("base", "deltas", "tile_group", "weights", "scales", "out", "n", "delta_stride", "out_stride"),
            warps=max(1, config.threads // 32),
            wide_warps=max(1, config.threads // 64),
            grid="ceil(preferences / K_BLOCK) * n / BLOCK, 1, 1",
        )  # fmt: skip


def grad_variants(dtypes: tuple[str, ...] = FLOATS) -> Iterator[Variant]:
    """The gradient's first stage, for every mix of dtypes in the configuration of each, and the second stage."""
    for grad, delta in product(dtypes, (*dtypes, *BYTES)):
        config = grad_config(4 if delta == "fp32" else 2)
        use = next(use for use, other in GRAD_CONFIGS.items() if other is config)
        yield Variant(
            name=_name("grad", use, grad, delta),
            kernel=partials_kernel,
            arguments={
                "grad": f"*{grad}", "deltas": f"*{delta}", "partials": "*fp32", "n": "i64", "experts": "i32",
                "delta_stride": "i64",
            },
            constants={"BLOCK": MAX_BLOCK, "E_CHUNK": config.e_chunk},
            aligned=("grad", "deltas", "partials", "n", "delta_stride"),
            warps=max(1, config.threads // 32),
            wide_warps=max(1, config.threads // 64),
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
        warps=SUM_THREADS // 32,
        wide_warps=SUM_THREADS // 64,
        grid="G, ceil(experts / EXPERTS), 1",
    )  # fmt: skip


def linear_variants(dtypes: tuple[str, ...] = FLOATS) -> Iterator[Variant]:
    """Every configuration of the routed linear for tensors of one dtype, in both weight layouts, E small and large."""
    for dtype, layout, (use, config) in product(dtypes, LAYOUTS, LINEAR_CONFIGS.items()):
        if (use == "float32") != (dtype == "fp32"):
            continue
        one, other = LAYOUTS[layout]
        for one_chunk in (True,) if "few experts" in use else (True, False):
            yield Variant(
                name=_name("linear", use, *(() if one_chunk else ("loop",)), layout, dtype),
                kernel=linear_kernel,
                arguments={
                    "x": f"*{dtype}", "base": f"*{dtype}", "deltas": f"*{dtype}", "weights": "*fp32",
                    "bias": f"*{dtype}", "y": f"*{dtype}", "rows": "i32", "outs": "i32", "ins": "i32",
                    "experts": "i32", other: "i32", "delta_stride": "i64",
                },
                constants={
                    one: 1, "BM": config.rows, "BO": config.outs, "BI": config.ins,
                    "E_CHUNK": config.e_chunk if one_chunk else config.loop_chunk,
                    "ONE_CHUNK": one_chunk, "HAS_BIAS": True, "INTERPRETED": False,
                },
                aligned=("x", "base", "deltas", "bias", "y", "outs", "ins", other, "delta_stride"),
                warps=config.warps,
                wide_warps=config.warps,
                stages=config.stages,
                grid="ceil(rows / BM) * ceil(outs / BO), 1, 1",
            )  # fmt: skip


def weights_grad_variants(dtypes: tuple[str, ...] = FLOATS) -> Iterator[Variant]:
    """Every configuration of the routed linear's gradient of the weights, in both weight layouts."""
    for dtype, layout in product(dtypes, LAYOUTS):
        use = "float32" if dtype == "fp32" else "half"
        config = WEIGHTS_GRAD_CONFIGS[use]
        one, other = LAYOUTS[layout]
        yield Variant(
            name=_name("weights_grad", use, layout, dtype),
            kernel=weights_grad_kernel,
            arguments={
                "grad": f"*{dtype}", "x": f"*{dtype}", "deltas": f"*{dtype}", "partials": "*fp32", "rows": "i32",
                "outs": "i32", "ins": "i32", "experts": "i32", other: "i32", "delta_stride": "i64",
            },
            constants={
                one: 1, "BM": config.rows, "BO": config.outs, "BI": config.ins, "INTERPRETED": False,
            },
            aligned=("grad", "x", "deltas", "partials", "outs", "ins", other, "delta_stride"),
            warps=config.warps,
            wide_warps=config.warps,
            stages=config.stages,
            grid="ceil(outs / BO) * ceil(ins / BI), 1, 1",
        )  # fmt: skip


def rows_variants(dtypes: tuple[str, ...] = FLOATS) -> Iterator[Variant]:
    """Every configuration of the kernels with a preference for each row, in both weight layouts."""
    for dtype, layout, (use, config) in product(dtypes, LAYOUTS, ROWS_CONFIGS.items()):
        if (use == "float32") != (dtype == "fp32"):
            continue
        one, other = LAYOUTS[layout]
        tiles = {one: 1, "BM": config.rows, "BO": config.outs, "BI": config.ins, "INTERPRETED": False}
        floats, sizes = f"*{dtype}", ("rows", "outs", "ins", "experts")
        yield Variant(
            name=_name("rows", use, layout, dtype),
            kernel=rows_kernel,
            arguments={
                "x": floats, "base": floats, "deltas": floats, "weights": "*fp32", "bias": floats, "y": floats,
                **dict.fromkeys(sizes, "i32"), "per": "i32", other: "i32", "delta_stride": "i64",
                "bias_stride": "i64",
            },
            constants={**tiles, "HAS_BIAS": True},
            aligned=("x", "base", "deltas", "bias", "y", "outs", "ins", other, "delta_stride", "bias_stride"),
            warps=config.warps,
            wide_warps=config.warps,
            stages=config.stages,
            grid="ceil(rows / BM) * ceil(outs / BO), 1, 1",
        )  # fmt: skip
        yield Variant(
            name=_name("rows_weights_grad", use, layout, dtype),
            kernel=rows_weights_grad_kernel,
            arguments={
                "grad": floats, "x": floats, "deltas": floats, "partials": "*fp32",
                **dict.fromkeys(sizes, "i32"), other: "i32", "delta_stride": "i64",
            },
            constants=tiles,
            aligned=("grad", "x", "deltas", "partials", "outs", "ins", other, "delta_stride"),
            warps=config.warps,
            wide_warps=config.warps,
            stages=config.stages,
            grid="ceil(rows / BM) * ceil(outs / BO), 1, 1",
        )  # fmt: skip
