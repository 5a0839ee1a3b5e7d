"""Every kernel in every form that the launch rules can choose, as the compiler needs it described.

A `Variant` is everything that fixes a kernel's machine code: argument types, which arguments are multiples of 16,
compile-time constants, warps. It is read off what the kernel's own launcher would launch on tensors without memory, so
that nothing is said twice. Tests compile each for each architecture; `benchmarks.gpu.static` reads the results.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from paretofuse.kernels import launch
from paretofuse.kernels.launch import Launch
from paretofuse.kernels.layer_merge import layer_merge_launch
from paretofuse.kernels.lowrank_merge import Factors, Matrix, lowrank_merge_launch
from paretofuse.kernels.pieces import add_pieces_launch
from paretofuse.kernels.routed_grad import MAX_BLOCK, partials_launch, sums_launch
from paretofuse.kernels.routed_linear import linear_launch, weights_grad_launch
from paretofuse.kernels.routed_merge import merge_launch
from paretofuse.kernels.rows_kernels import rows_launch
from paretofuse.kernels.rows_kernels import weights_grad_launch as rows_weights_grad_launch

FLOATS = ("fp32", "bf16", "fp16")
QUANTIZED = {"i8": ("i8", 1024), "i8x32": ("i8", 32), "u8": ("u8", 32)}
"""Deltas in int8, and int4 two to a byte, with the groups that a store gives them: type, and elements of a group."""

DTYPES = {
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64, "i32": torch.int32,
    "i64": torch.int64, "i8": torch.int8, "u8": torch.uint8,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}

TILE = 1024
"""Elements per tile of the flat buffers that the ahead-of-time kernels are for."""

LARGE = 1 << 32
"""Elements of a flat buffer that needs 64-bit offsets, as the compiled code then has them."""

SHARED = 128
"""Elements that share a row coefficient at least, where kernels for that are compiled: rows of most models' matrices
are made up of so many."""

OUTS, INS = 768, 3072
"""A layer whose dimensions are multiples of 16, as those are that the wide loads are for."""


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
        grid: the launch grid, in words and argument names; for the kernels that are exported.
        stages: depth of software pipelining.
    """

    name: str
    kernel: Any
    arguments: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: tuple[str, ...]
    warps: int
    wide_warps: int
    grid: str = ""
    stages: int = 3


def describe(name: str, found: Launch, grid: str = "") -> Variant:
    """A launch as the compiler needs it: types, constants and alignment by the rules of Triton's own launcher."""
    options = dict(found.constants)
    warps, stages = options.pop("num_warps", 0), options.pop("num_stages", 3)
    names = [argument for argument in found.kernel.arg_names if argument not in options]
    values = dict(zip(names, found.arguments, strict=True))
    # A stride of one is compiled in, which is what tells the layouts of a weight apart.
    ones = {n: 1 for n, v in values.items() if n.startswith("stride") and v == 1}
    given = {n: value for n, value in values.items() if n not in ones}
    return Variant(
        name=name.replace(", ", "_").replace(" ", "_"),
        kernel=found.kernel,
        arguments={n: _type(value) for n, value in given.items()},
        constants={**ones, **options, **({"INTERPRETED": False} if "INTERPRETED" in options else {})},
        aligned=tuple(n for n, value in given.items() if _is_aligned(value)),
        warps=warps or max(1, found.threads // 32),
        wide_warps=warps or max(1, found.threads // 64),
        grid=grid,
        stages=stages,
    )


def merge_variants(dtypes: tuple[str, ...] = FLOATS) -> Iterator[Variant]:
    """The merge, for every mix of base, delta and output dtypes, in the configurations that its rule gives them."""
    mixes = product(dtypes, (*dtypes, *QUANTIZED), dtypes)
    for (base, delta, out), (use, config) in product(mixes, launch.MERGE_CONFIGS.items()):
        if not _is_given(use, config, delta):
            continue
        yield _merge(f"merge_{use}_{base}_{delta}_{out}", base, delta, out, config)


def chosen_variants(dtypes: tuple[str, ...] = FLOATS) -> Iterator[Variant]:
    """The merge of chosen tensors (a fused module's switch), without row coefficients."""
    for dtype, delta in product(dtypes, ("", *QUANTIZED)):
        use = launch.MERGE_CONFIGS[{"": "at most 8", "i8": "any"}.get(delta, "small groups")]
        yield _merge(f"merge_chosen_{dtype}_{delta or dtype}", dtype, delta or dtype, dtype, use, places=True)


def row_merge_variants(dtypes: tuple[str, ...] = FLOATS, deltas: Iterable[str] = ()) -> Iterator[Variant]:
    """The merge with row coefficients, base and output of one dtype, in the configurations that its rule gives it.

    Args:
        dtypes: of base and output.
        deltas: dtypes of deltas, besides int8, int4 and the base's own.
    """
    for dtype in dtypes:
        for delta, (use, config) in product(
            dict.fromkeys((dtype, *deltas, *QUANTIZED)), launch.MERGE_CONFIGS.items()
        ):
            if use != "any row" and not _is_given(use, config, delta):
                continue
            if config.one_chunk and config.e_chunk > launch.ROWS_HELD:
                continue
            words, shared = ("any_row", 1) if use == "any row" else (f"rows_{use}", SHARED)
            name = f"merge_{words}_{dtype}_{delta}_{dtype}"
            yield _merge(name, dtype, delta, dtype, config, places=True, shared=shared)


def _is_given(use: str, config: launch.MergeConfig, delta: str) -> bool:
    """Whether the rule gives a configuration to deltas of a kind whose rows have no coefficients, or share them."""
    if use == "any row":
        return False
    if delta not in QUANTIZED:
        return use != "small groups"
    return config is launch.merge_config(1, 1, group=QUANTIZED[delta][1])


def _merge(
    name: str,
    base: str,
    delta: str,
    out: str,
    config: launch.MergeConfig,
    *,
    places: bool = False,
    shared: int = 0,
) -> Variant:
    experts, tiles = 3, LARGE // TILE
    found = merge_launch(
        _empty(base, LARGE), _deltas(delta, experts), _empty("i32", tiles), _empty("fp32", 1, 5, experts),
        _scales(delta, experts), _empty("i32", tiles, 5) if places else None, _empty(out, 1, LARGE), TILE, shared,
        config,
    )  # fmt: skip
    return describe(name, found, "n / BLOCK, 1, 1")


def grad_variants(dtypes: tuple[str, ...] = FLOATS) -> Iterator[Variant]:
    """The gradient's first stage, for every mix of dtypes in the configuration of each, and the second's levels."""
    for grad, delta in product(dtypes, (*dtypes, *QUANTIZED)):
        deltas, (_, group) = _deltas(delta, 3), QUANTIZED.get(delta, (delta, TILE))
        use = launch.grad_use(deltas.element_size())
        _, found = partials_launch(
            _empty(grad, LARGE), deltas, _scales(delta, 3), group, MAX_BLOCK, launch.GRAD_CONFIGS[use]
        )
        yield describe(f"grad_{use}_{grad}_{delta}", found, "ceil(n / BLOCK), 1, 1")
    for name, values, sums in (("piece_sums", "fp32", torch.float64), ("group_sums", "fp64", torch.float32)):
        _, found = sums_launch(_empty(values, 9, 3), _empty("i32", 9), _empty("i32", 6), sums)
        yield describe(name, found, "segments, ceil(experts / EXPERTS), 1")


def layer_variants(dtypes: tuple[str, ...] = FLOATS) -> Iterator[Variant]:
    """A layer's merge for many rows of x, planes in its dtype and in float32, and the sums of pieces for few."""
    for dtype in dtypes:
        for weight, (use, config) in product(dict.fromkeys((dtype, "fp32")), launch.MERGE_CONFIGS.items()):
            if use in ("small groups", "any row"):
                continue  # a layer's planes are floats, and have no coefficients for rows
            base, deltas = _layer(weight, 3, False)
            _, found = layer_merge_launch(base, deltas, _row(5, 3), DTYPES[dtype], config)
            yield describe(f"layer_merge_{use}_{weight}_{dtype}", found)
        pieces, bias = _empty("fp32", 3, 32, OUTS), _empty(dtype, OUTS)
        yield describe(f"add_pieces_{dtype}", add_pieces_launch(pieces, bias, DTYPES[dtype], 32)[1])


def linear_variants(dtypes: tuple[str, ...] = FLOATS) -> Iterator[Variant]:
    """Every configuration of the routed linear, in both weight layouts, E small and large, whole and in pieces.

    Planes in the dtype of x, and, as under autocast, in float32 beneath half inputs.
    """
    for (use, config), dtype, conv1d in product(launch.LINEAR_CONFIGS.items(), dtypes, (False, True)):
        weight = "fp32" if "wide planes" in use else dtype
        if ("float32" in use) != (dtype == "fp32"):
            continue
        for experts in dict.fromkeys((config.e_chunk, config.e_chunk + 1)):
            if "few experts" in use and experts > config.e_chunk:
                continue  # the rule gives no more experts to it
            base, deltas = _layer(weight, experts, conv1d)
            loop = "loop_" if experts > config.e_chunk else ""
            for piece, kind in product((INS, 4 * config.ins), _kinds(dtype)):
                bias = _empty(weight, OUTS) if piece == INS else None
                x, weights = _empty(dtype, 33, INS), _row(experts)
                _, found = linear_launch(x, base, deltas, weights, bias, config, piece, _precision(kind))
                part = "" if piece == INS else "pieces_"
                yield describe(f"linear_{use}_{part}{loop}{_layout(conv1d)}_{kind}", found)


def weights_grad_variants(dtypes: tuple[str, ...] = FLOATS) -> Iterator[Variant]:
    """The routed linear's gradient of the weights, in both weight layouts, with planes as `linear_variants`."""
    for dtype, conv1d in product(dtypes, (False, True)):
        for weight, kind in product(dict.fromkeys((dtype, "fp32")), _kinds(dtype)):
            use = launch.weights_grad_use(DTYPES[dtype].itemsize)
            config = launch.WEIGHTS_GRAD_CONFIGS[use]
            _, deltas = _layer(weight, 3, conv1d)
            grad, x = _empty(dtype, 33, OUTS), _empty(dtype, 33, INS)
            _, found = weights_grad_launch(grad, x, deltas, config, _precision(kind))
            yield describe(f"weights_grad_{use}_{_layout(conv1d)}_{weight}_{kind}", found)


def rows_variants(dtypes: tuple[str, ...] = FLOATS) -> Iterator[Variant]:
    """Every configuration of the kernels with a preference for each row, in both weight layouts, planes as above."""
    for (use, config), dtype, conv1d in product(launch.ROWS_CONFIGS.items(), dtypes, (False, True)):
        weight = "fp32" if "wide planes" in use else dtype
        if (use in ("float32", "tf32")) != (dtype == "fp32"):
            continue
        base, deltas = _layer(weight, 3, conv1d)
        x, grad = _empty(dtype, 5, 7, INS), _empty(dtype, 5, 7, OUTS)
        kind = "tf32" if use == "tf32" else dtype
        name, precision = f"{use}_{_layout(conv1d)}_{kind}", _precision(kind)
        for piece, part in ((INS, ""), (4 * config.ins, "pieces_")):
            bias = None if part else _empty(weight, 5, OUTS)
            _, found = rows_launch(x, base, deltas, _row(5, 3), bias, config, piece, precision)
            yield describe(f"rows_{part}{name}", found)
        _, found = rows_weights_grad_launch(grad, x, deltas, config, precision)
        yield describe(f"rows_weights_grad_{name}", found)


def lowrank_variants(dtypes: tuple[str, ...] = FLOATS, deltas: Iterable[str] = ()) -> Iterator[Variant]:
    """The merge of planes of low rank, by row or not, factors as the base or in float32; alone, or beside dense planes.

    Args:
        dtypes: of base and output.
        deltas: dtypes of dense planes, besides the base's own.
    """
    for dtype, by_row, precision in product(dtypes, (False, True), ("tf32x3", "ieee")):
        for factors, delta in product(dict.fromkeys((dtype, "fp32")), dict.fromkeys(("", dtype, *deltas))):
            base = _empty(dtype, OUTS, INS)
            low_rank = [(0, _empty(factors, OUTS, 16), _empty(factors, 16, INS))]
            beside = [(1, _empty(delta, OUTS, INS))] if delta else []
            matrix = Matrix(base, low_rank, 0, 0, -1, beside)
            weights, out = _empty("fp32", 1, 5, 3), _empty(dtype, 1, LARGE)
            found = lowrank_merge_launch([matrix], Factors([matrix]), weights, out, by_row, precision)
            words = f"lowrank_merge{'_rows' if by_row else ''}{'_beside_dense' if delta else ''}"
            yield describe(f"{words}_{dtype}_{delta or dtype}_{factors}_{precision}", found, "tiles, 1, 1")


def is_launched(variant: Variant, architecture: str) -> bool:
    """Whether a launch rule gives a variant to an architecture.

    ROCm multiplies float32 by matrix instructions as it is: neither TF32 nor three products of it are for its devices.
    """
    precision = variant.constants.get("PRECISION", "ieee")
    if architecture.startswith("gfx"):
        return bool(precision == "ieee")
    return precision != "ieee" or not variant.name.startswith("lowrank")


def _kinds(dtype: str) -> tuple[str, ...]:
    """How x of a dtype is multiplied; float32 exactly, or as TF32."""
    return ("fp32", "tf32") if dtype == "fp32" else (dtype,)


def _precision(kind: str) -> str:
    return "tf32" if kind == "tf32" else "ieee"


def _empty(dtype: str, *shape: int) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=DTYPES[dtype], device="meta")


def _deltas(dtype: str, experts: int) -> Tensor:
    """Flat planes of LARGE elements, of a dtype or a key of `QUANTIZED`."""
    stored, _ = QUANTIZED.get(dtype, (dtype, TILE))
    return _empty(stored, experts, LARGE // 2 if stored == "u8" else LARGE)


def _scales(dtype: str, experts: int) -> Tensor | None:
    """The scales of such planes, for the formats that have some."""
    return _empty("fp32", experts, LARGE // QUANTIZED[dtype][1]) if dtype in QUANTIZED else None


def _row(*shape: int) -> Tensor:
    """Routing weights that begin anywhere, as a row of them does: at no multiple of 16 bytes."""
    return torch.empty(1 + torch.Size(shape).numel(), device="meta")[1:].view(shape)


def _layer(dtype: str, experts: int, conv1d: bool) -> tuple[Tensor, Tensor]:
    """A layer's base [OUTS, INS] and deltas [experts, OUTS, INS], which lie in large flat planes."""
    deltas = _empty(dtype, experts, LARGE)[:, : OUTS * INS]
    if conv1d:
        return _empty(dtype, INS, OUTS).T, deltas.unflatten(1, (INS, OUTS)).mT
    return _empty(dtype, OUTS, INS), deltas.unflatten(1, (OUTS, INS))


def _layout(conv1d: bool) -> str:
    return "conv1d" if conv1d else "linear"


def _type(value: Tensor | int) -> str:
    """The type that Triton compiles an argument for."""
    if isinstance(value, Tensor):
        return f"*{NAMES[value.dtype]}"
    return "i64" if value >= 1 << 31 else "i32"


def _is_aligned(value: Tensor | int) -> bool:
    """Whether Triton may rely on a multiple of 16: bytes of an address, or elements."""
    if isinstance(value, Tensor):
        return int(value.storage_offset()) * value.element_size() % 16 == 0
    return value % 16 == 0
