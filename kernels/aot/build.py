"""Kernels compiled ahead of time, for GPUs that need not be present.

`python -m paretofuse.kernels.aot --arch sm_90 -o DIR` writes the merge and gradient kernels as binaries with a JSON
manifest, for a program that loads them with the CUDA or HIP driver. The same Triton writes the same bytes each time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from paretofuse.kernels.aot.variants import (
    FLOATS,
    NAMES,
    Variant,
    grad_variants,
    is_launched,
    lowrank_variants,
    merge_variants,
    row_merge_variants,
)
from paretofuse.kernels.dtypes import float_dtype
from paretofuse.kernels.triton_or_none import interpreted, triton

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
"""A100, H100 and H200, B200, MI300X: every kernel's code for these is read by the static proof."""

OTHERS = ("sm_86", "sm_89", "sm_103", "sm_120")
"""What else can be written: A10 and RTX 30, L4 and RTX 40, B300, RTX 50."""

MISSING = (
    "compiling kernels needs Triton 3.4 or newer, which is not installed; install it (pip install triton)"
)


def compile_variant(variant: Variant, architecture: str) -> Any:
    """Compile for one of `ARCHITECTURES` or `OTHERS`; needs no GPU.

    Returns:
        Triton's CompiledKernel: `.asm` holds each stage, the binary as "cubin" or "hsaco".

    Raises:
        ImportError: Triton is not installed.
        RuntimeError: the kernel's module was imported under TRITON_INTERPRET=1.
        ValueError: an unknown architecture.
    """
    if triton is None or not hasattr(triton, "knobs"):
        raise ImportError(MISSING)
    if interpreted(variant.kernel):
        raise RuntimeError(
            "got kernels defined under TRITON_INTERPRET=1, expected compiled ones; unset it and restart"
        )
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if architecture not in ARCHITECTURES + OTHERS:
        known = ", ".join(ARCHITECTURES + OTHERS)
        raise ValueError(f"architecture: got {architecture!r}, expected one of {known}")
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


def describe(variant: Variant, architecture: str, compiled: Any, binary: bytes) -> dict[str, Any]:
    """A variant's entry in the manifest: all that a driver needs to launch it."""
    pointers = [{"name": name, "type": "*i8"} for name in ("global_scratch", "profile_scratch")]
    threads_per_warp = compiled.metadata.target.warp_size
    return {
        "name": variant.name,
        "file": f"{variant.name}.{_suffix(architecture)}",
        "sha256": hashlib.sha256(binary).hexdigest(),
        "symbol": compiled.metadata.name,
        "arguments": [{"name": n, "type": t} for n, t in variant.arguments.items()] + pointers,
        "null_arguments": [p["name"] for p in pointers],
        "multiples_of_16": list(variant.aligned),
        "constants": dict(variant.constants),
        "grid": variant.grid,
        "warps": compiled.metadata.num_warps,
        "threads": compiled.metadata.num_warps * threads_per_warp,
        "shared_bytes": compiled.metadata.shared,
    }


def variants(architecture: str, dtypes: Iterable[str], deltas: Iterable[str] = ()) -> list[Variant]:
    """What `export` writes for an architecture, dtypes of base and output, and further dtypes of deltas."""
    chosen = {}
    for dtype in dtypes:
        mixed = [v for d in deltas for v in merge_variants((dtype, d)) if v.arguments["deltas"] == f"*{d}"]
        found = (
            *merge_variants((dtype,)),
            *(v for v in mixed if v.arguments["base"] == v.arguments["out"] == f"*{dtype}"),
            *row_merge_variants((dtype,), deltas),
            *(v for v in lowrank_variants((dtype,), deltas) if _is_for_libraries(v, architecture)),
            *grad_variants((dtype,)),
        )
        chosen.update({variant.name: variant for variant in found})
    return list(chosen.values())


def _is_for_libraries(variant: Variant, architecture: str) -> bool:
    """Whether libparetofuse launches a merge of low rank: its factors are float32, whatever the base is."""
    return is_launched(variant, architecture) and variant.arguments["factors"] == "*fp32"


def export(
    architecture: str, directory: Path, dtypes: Iterable[str] = FLOATS, deltas: Iterable[str] = ()
) -> Path:
    """Write the merge and gradient kernels for one architecture, with `manifest.json`.

    Base, output and gradient share one dtype of `dtypes`; deltas have it too, or int8 or int4, or one of `deltas`.

    Args:
        architecture: one of `ARCHITECTURES` or `OTHERS`.
        directory: made if missing; files of the same names are replaced.
        dtypes: "fp32", "bf16", "fp16".
        deltas: dtypes of deltas, besides, for merges of stores made with `delta_dtype`.

    Returns:
        The manifest's path.

    Raises:
        ImportError, RuntimeError, ValueError: as `compile_variant`.
    """
    if triton is None or not hasattr(triton, "knobs"):
        raise ImportError(MISSING)
    directory.mkdir(parents=True, exist_ok=True)
    entries = []
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = True  # line tables hold this checkout's path
        for variant in variants(architecture, dtypes, deltas):
            compiled = compile_variant(variant, architecture)
            binary: bytes = compiled.asm[_suffix(architecture)]
            entry = describe(variant, architecture, compiled, binary)
            (directory / entry["file"]).write_bytes(binary)
            entries.append(entry)
    manifest = {"format": 4, "architecture": architecture, "triton": triton.__version__, "kernels": entries}
    path = directory / "manifest.json"
    path.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return path


def _suffix(architecture: str) -> str:
    """Triton's name for an architecture's binaries."""
    return "cubin" if architecture.startswith("sm_") else "hsaco"


def float_name(text: str) -> str:
    """Triton's name of a dtype that can be merged, by any usual name of it."""
    dtype = float_dtype(text)
    if dtype is None:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected float32, bfloat16 or float16")
    return NAMES[dtype]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m paretofuse.kernels.aot", description=__doc__)
    parser.add_argument(
        "--arch", required=True, choices=ARCHITECTURES + OTHERS, help="the GPU's architecture"
    )
    parser.add_argument(
        "--dtype", action="append", type=float_name, help="only this dtype, such as bf16; may be repeated"
    )
    parser.add_argument(
        "--delta-dtype",
        action="append",
        default=[],
        type=float_name,
        help="of deltas, besides; may be repeated",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="where to write")
    options = parser.parse_args(arguments)
    try:
        path = export(options.arch, options.output, options.dtype or FLOATS, options.delta_dtype)
    except (ImportError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(path)
    return 0
