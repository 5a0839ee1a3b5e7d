"""What can be known about the GPU kernels without a GPU: their machine code, and the time its traffic should take.

    python -m benchmarks.gpu.static                     every kernel for every architecture; some minutes when new
    python -m benchmarks.gpu.static --arch sm_90        one architecture
    python -m benchmarks.gpu.static --roofline          only the predicted times

Part one compiles each kernel in each configuration and reads registers, spills, shared memory, occupancy, the width
of its loads and stores and its tensor-core instructions from the binary, into data/gpu_static.csv. It fails when
registers are spilled, or when a streaming kernel reads or writes otherwise than once, in accesses of 128 bits.

Part two is a PREDICTION, not a measurement; no GPU is used. Counted bytes, at an assumed share of the data sheet's
bandwidth, plus an assumed time for each launch, go into data/gpu_roofline.csv, beside the same count for PWEMoE's
eager module.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.harness import record
from paretofuse.kernels.aot import build, variants
from paretofuse.kernels.aot.variants import Variant

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "i8": 1, "u8": 0.5}
MAKERS = (
    variants.merge_variants, variants.chosen_variants, variants.row_merge_variants, variants.grad_variants,
    variants.layer_variants, variants.linear_variants, variants.weights_grad_variants, variants.rows_variants,
    variants.lowrank_variants,
)  # fmt: skip

NVIDIA_LIMITS = {"sm_80": (64, 32, 164 << 10), "sm_90": (64, 32, 228 << 10), "sm_100": (64, 32, 228 << 10)}
"""Of a multiprocessor: warps, blocks, bytes of shared memory."""
NVIDIA_REGISTERS, NVIDIA_RESERVED = 65536, 1 << 10
"""Registers of a multiprocessor; bytes of shared memory that each block takes besides its own."""
IN_FLIGHT = 12 << 10
"""Bytes that a program of the merge asks for at least before it waits. Up to 18 KB, of a base and eight experts in two
bytes, it asks for all; for more, compilers differ."""
AMD_LIMITS = (32, 64 << 10)
"""MI300X: waves and LDS of a compute unit; each of its 4 SIMDs has 512 registers a lane for at most 8 waves."""


@dataclass(frozen=True)
class Finding:
    """What one binary shows.

    Attributes:
        kernel: the variant's name.
        architecture: it was compiled for.
        registers: per thread.
        spills: bytes of stack per thread (NVIDIA), or spilled registers (AMD).
        shared: bytes per program.
        warps: per program.
        occupancy: the share of a multiprocessor's warps that fit at once.
        wide_loads, wide_stores: bytes that one program moves in 128-bit accesses to global memory, each once.
        in_flight: bytes that one program has asked for in such loads when it first waits for one of them; 0 on AMD,
            where the listing does not tell.
        least_loads, least_stores: bytes that it has to move, on streaming kernels; else 0.
        other_accesses: narrower global loads and stores of a streaming kernel (scalars), static count; on NVIDIA the
            accesses of the others are not read.
        narrow_stores: how many of them are stores.
        tensor_core: matrix instructions and how often they stand in the code; on NVIDIA, in the PTX.
    """

    kernel: str
    architecture: str
    registers: int
    spills: int
    shared: int
    warps: int
    occupancy: float
    wide_loads: int
    wide_stores: int
    in_flight: int
    least_loads: int
    least_stores: int
    other_accesses: int
    narrow_stores: int
    tensor_core: str

    @property
    def faults(self) -> list[str]:
        """What the binary should not show."""
        found = [f"{self.spills} spilled"] if self.spills else []
        if self.least_loads and self.wide_loads != self.least_loads:
            found.append(f"loads {self.wide_loads} bytes in 128-bit accesses, expected {self.least_loads}")
        floor = self.wide_loads if self.wide_loads <= 18 << 10 else IN_FLIGHT
        if self.kernel.startswith(("merge_at_most", "layer_merge_at_most")) and 0 < self.in_flight < floor:
            found.append(f"waits with {self.in_flight} bytes asked for, expected at least {floor}")
        # The compiler may write out several turns of the loop over preferences, each with stores of its own.
        if self.least_stores and (
            self.wide_stores < self.least_stores or self.wide_stores % self.least_stores
        ):
            found.append(f"stores {self.wide_stores} bytes in 128-bit accesses, expected {self.least_stores}")
        if self.least_stores and self.narrow_stores:
            found.append(f"{self.narrow_stores} stores of fewer than 128 bits")
        return found


def least_traffic(variant: Variant) -> tuple[int, int]:
    """Bytes that one program of a streaming kernel must load and store with as many experts as it takes at a time.

    Weights, scales and group numbers are scalars and left out, as are the gradient's sums. None of a merge with a
    coefficient for each element: it reads as many of those, and is there for rows of odd lengths.
    """
    size = {name: BYTES[kind[1:]] for name, kind in variant.arguments.items() if kind[1:] in BYTES}
    size["out"] = size.get("out", size.get("mixed", 0))
    c = variant.constants
    if c.get("ROWS") == 2:
        return 0, 0
    if variant.name.startswith(("merge", "layer_merge")):
        loads = c["BLOCK"] * (size["base"] + c["E_CHUNK"] * size["deltas"])
        return int(loads), c["BLOCK"] * size["out"]
    if variant.name.startswith("grad"):
        return int(c["BLOCK"] * (size["grad"] + c["E_CHUNK"] * size["deltas"])), 0
    return 0, 0


def inspect(variant: Variant, architecture: str) -> Finding:
    """Compile one variant and read its binary."""
    compiled = build.compile_variant(variant, architecture)
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    least = least_traffic(variant)
    if architecture.startswith("sm_"):
        # Disassembling takes as long as compiling; only the widths of a streaming kernel need it.
        registers, spills, text = _read_cubin(compiled.asm["cubin"], disassemble=any(least))
        accesses = Counter(re.findall(r"\b(?:LDG|LDGSTS|STG)\.[\w.]+", text))
        loads = sum(n for op, n in accesses.items() if op.startswith("LDG") and ".128" in op)
        stores = sum(n for op, n in accesses.items() if op.startswith("STG") and ".128" in op)
        all_stores = sum(n for op, n in accesses.items() if op.startswith("STG"))
        matrix = Counter(re.findall(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b", compiled.asm["ptx"]))
        lanes, occupancy = 32, _nvidia_occupancy(architecture, registers, warps, shared)
        in_flight = _loads_in_flight(text)
    else:
        text = compiled.asm["amdgcn"]
        facts = {
            key: int(n) for key, n in re.findall(r"\.(\w+_count|private_segment_fixed_size):\s+(\d+)", text)
        }
        registers = facts["vgpr_count"]
        spills = facts["vgpr_spill_count"] + facts["sgpr_spill_count"] + facts["private_segment_fixed_size"]
        accesses = Counter(re.findall(r"\b(?:global|buffer)_(?:load|store)_\w+", text))
        loads = sum(n for op, n in accesses.items() if op.endswith("load_dwordx4"))
        stores = sum(n for op, n in accesses.items() if op.endswith("store_dwordx4"))
        all_stores = sum(n for op, n in accesses.items() if "_store_" in op)
        matrix = Counter(re.findall(r"\bv_mfma_\w+", text))
        lanes, occupancy, in_flight = 64, _amd_occupancy(registers, warps, shared), 0
    threads = warps * lanes
    return Finding(
        variant.name, architecture, registers, spills, shared, warps, occupancy,
        loads * threads * 16, stores * threads * 16, in_flight * threads * 16, *least,
        accesses.total() - loads - stores, all_stores - stores,
        " ".join(f"{op}:{n}" for op, n in sorted(matrix.items())),
    )  # fmt: skip


def _read_cubin(cubin: bytes, disassemble: bool) -> tuple[int, int, str]:
    """Registers per thread, bytes of stack per thread, and the listing if asked, by the tools in Triton's wheel."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output([knobs.nvidia.cuobjdump.path, "-res-usage", file.name])
        text = _output([knobs.nvidia.nvdisasm.path, "-c", file.name]) if disassemble else ""
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0]
    return int(registers), int(stack), text


def _loads_in_flight(text: str) -> int:
    """How many 128-bit loads stand in the code before the first instruction that reads what one of them loads."""
    waiting: list[int] = []  # first register of each load's four
    for line in text.splitlines():
        code = re.sub(r"/\*.*?\*/", "", line).strip()
        registers = [int(number) for number in re.findall(r"\bR(\d+)\b", code)]
        load = re.match(r"(?:@!?U?P\d+ )?LDG\.\S*128\S* ", code)
        read = registers[1:] if load or not re.match(r"(?:@!?U?P\d+ )?ST", code) else registers
        if any(first <= register < first + 4 for first in waiting for register in read):
            return len(waiting)
        if load:
            waiting.append(registers[0])
    return len(waiting)


def _output(command: Sequence[str]) -> str:
    """What a command prints, on either stream."""
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
    ).stdout


def _nvidia_occupancy(architecture: str, registers: int, warps: int, shared: int) -> float:
    """Warps that fit on a multiprocessor over those it has room for; registers come in 256 for a warp."""
    most, blocks, memory = NVIDIA_LIMITS[architecture]
    by_registers = NVIDIA_REGISTERS // (-(-registers * 32 // 256) * 256) // warps
    by_memory = memory // (shared + NVIDIA_RESERVED)
    return min(blocks, most // warps, by_registers, by_memory) * warps / most


def _amd_occupancy(registers: int, warps: int, shared: int) -> float:
    """Waves that fit on a compute unit of MI300X over those it has room for; registers come in eights."""
    most, memory = AMD_LIMITS
    by_registers = 4 * min(8, 512 // (-(-registers // 8) * 8)) // warps
    by_memory = memory // shared if shared else most
    return min(most // warps, by_registers, by_memory) * warps / most


def findings(architectures: Iterable[str], dtypes: Iterable[str]) -> Iterator[Finding]:
    """Every kernel and configuration; tensors of one dtype, deltas also of one byte."""
    for architecture in architectures:
        seen = set()
        for dtype in dtypes:
            for variant in (v for make in MAKERS for v in make((dtype,))):
                if variant.name not in seen and variants.is_launched(variant, architecture):
                    seen.add(variant.name)
                    yield inspect(variant, architecture)


# ---- The roofline: predicted times ----

BANDWIDTH = {"A100 80GB": 2.039e12, "H100 SXM": 3.35e12, "H200 SXM": 4.8e12, "MI300X": 5.3e12}
"""Bytes per second, from the makers' data sheets."""
FLOPS = {"A100 80GB": 19.5e12, "H100 SXM": 67e12, "H200 SXM": 67e12, "MI300X": 163.4e12}
"""Float32 operations per second without tensor cores, from the makers' data sheets."""
MEMORY = {"A100 80GB": 80e9, "H100 SXM": 80e9, "H200 SXM": 141e9, "MI300X": 192e9}
SHARE_OF_BANDWIDTH = 0.9
"""Assumed: what a streaming kernel with wide accesses reaches."""
LAUNCH_SECONDS = 5e-6
"""Assumed: what each launch costs when they are issued one after the other from Python."""
DELTA_BYTES = {"bf16": 2.0, "int8": 1 + 4 / 1024, "int4": 0.5 + 4 / 32}


class Traffic(TorchDispatchMode):
    """Counts launches, and the bytes that they must read and write, of eager code, in place or not; views are free.

    Each operator is taken to read its inputs and write its outputs once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run and count one operator."""
        result = func(*args, **(kwargs or {}))
        aliases = [output.alias_info for output in func._schema.returns]
        if not any(alias is not None and not alias.is_write for alias in aliases):
            self.launches += 1
            tensors = [
                t for t in (*args, *torch.utils._pytree.tree_leaves(result)) if isinstance(t, torch.Tensor)
            ]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return result


def meta_models() -> dict[str, torch.nn.Module]:
    """The models, in bfloat16 without memory."""
    from transformers import (
        CLIPVisionConfig,
        CLIPVisionModel,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
    )

    large = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
    )
    with torch.device("meta"):
        models = {
            "CLIP ViT-B/32": CLIPVisionModel(CLIPVisionConfig()),
            "CLIP ViT-L/14": CLIPVisionModel(large),
            "GPT-2": GPT2LMHeadModel(GPT2Config()),
            "7B (Llama-2)": LlamaForCausalLM(LlamaConfig()),
            "8B (Llama-3)": LlamaForCausalLM(
                LlamaConfig(vocab_size=128256, intermediate_size=14336, num_key_value_heads=8)
            ),
        }
    return {name: model.bfloat16() for name, model in models.items()}


def pwemoe_traffic(model: torch.nn.Module, experts: int) -> Traffic | None:
    """One merge by PWEMoE's own module around the whole model, its router in bfloat16 too, so that no product widens.

    None where fusion-bench cannot be had.
    """
    from benchmarks.models.clip import pwemoe_class

    try:
        module = pwemoe_class()(model, [model] * experts, router_hidden_layers=2)
    except record.MissingContender as error:
        print(f"PWEMoE is left out: {error}", file=sys.stderr)
        return None
    module = module.to("meta", torch.bfloat16)
    module.preference_vector = torch.full((experts,), 1 / experts, device="meta", dtype=torch.bfloat16)
    with torch.no_grad(), Traffic() as traffic:
        module._merge_state_dict()
    return traffic


def roofline() -> Iterator[dict[str, object]]:
    """Predicted times of one merge: base and output in bfloat16, one launch for the model."""
    for name, model in meta_models().items():
        n = sum(p.numel() for p in model.parameters())
        for experts in (2, 4, 8):
            theirs = pwemoe_traffic(model, experts)
            for delta, size in DELTA_BYTES.items():
                moved = n * (4 + experts * size)  # base and output 2 bytes each; held in memory as well
                for device, bandwidth in BANDWIDTH.items():
                    memory = moved / (SHARE_OF_BANDWIDTH * bandwidth)
                    compute = 2 * experts * n / FLOPS[device]
                    row: dict[str, object] = {
                        "label": "predicted", "device": device, "model": name, "parameters": n, "experts": experts,
                        "delta": delta, "bytes": round(moved), "flops": 2 * experts * n, "launches": 1,
                        "predicted_ms": round(1e3 * (max(memory, compute) + LAUNCH_SECONDS), 4),
                        "fits": "yes" if moved < MEMORY[device] else "no",
                    }  # fmt: skip
                    if theirs is not None:
                        seconds = (
                            theirs.bytes / (SHARE_OF_BANDWIDTH * bandwidth) + theirs.launches * LAUNCH_SECONDS
                        )
                        row |= {
                            "pwemoe_bytes": theirs.bytes, "pwemoe_launches": theirs.launches,
                            "pwemoe_predicted_ms": round(1e3 * seconds, 4),
                        }  # fmt: skip
                    yield row


def write(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV file anew."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
    print(f"wrote {path.name}")


def show(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table."""
    text = [[str(cell) for cell in row] for row in (columns, *rows)]
    widths = [max(map(len, column)) for column in zip(*text, strict=True)]
    for row in text:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.static",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--arch", action="append", choices=build.ARCHITECTURES, help="only this one; may be repeated"
    )
    parser.add_argument(
        "--dtype", action="append", type=build.float_name, help="only this one; may be repeated"
    )
    parser.add_argument("--roofline", action="store_true", help="only the predicted times")
    parser.add_argument("--out", type=Path, default=record.DATA, help="folder of the CSV files")
    options = parser.parse_args(arguments)
    failed = False
    if not options.roofline:
        found = []
        for finding in findings(options.arch or build.ARCHITECTURES, options.dtype or ("fp32", "bf16")):
            found.append(finding)
            for fault in finding.faults:
                failed = True
                print(f"{finding.kernel} on {finding.architecture}: {fault}", file=sys.stderr)
        columns = [field.name for field in fields(Finding)]
        show(columns, map(astuple, found))
        write(options.out / "gpu_static.csv", columns, map(astuple, found))
    if not (options.arch or options.dtype):
        rows = list(roofline())
        columns = list(rows[0])
        print(
            f"\nPREDICTED at {SHARE_OF_BANDWIDTH:.0%} of bandwidth and {LAUNCH_SECONDS * 1e6:.0f} us a launch:"
        )
        show(columns, (tuple(row.values()) for row in rows))
        write(options.out / "gpu_roofline.csv", columns, (tuple(row.values()) for row in rows))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
