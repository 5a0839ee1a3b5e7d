"""What mixed layers and merges of low-rank planes cost, by counting. PREDICTED, not measured: no GPU is used.

    python -m benchmarks.gpu.layers        writes data/gpu_layers.csv

For an H100 with bfloat16 tensors: launches, programs, and bytes by the launch rules themselves, of both ways to do a
layer at every size, with the one that `routed_linear` takes marked; and of GPT-2's linear layers with eight LoRAs, by
the kernel and by PyTorch, whose operators are counted. Times are assumed rates over counted bytes and operations.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch

from benchmarks.gpu.static import BANDWIDTH, LAUNCH_SECONDS, SHARE_OF_BANDWIDTH, Traffic, show, write
from benchmarks.harness import record
from paretofuse.engine.planes.lowrank import LowRank
from paretofuse.engine.planes.plane import merged_tensor
from paretofuse.kernels.launch import FUSED_ROWS, linear_config, piece_of
from paretofuse.kernels.lowrank_merge import BLOCK_I, BLOCK_O

LAYERS = ((768, 3072), (3072, 768), (4096, 4096))
"""(outputs, inputs): GPT-2's and ViT-B/32's MLPs, and an attention projection of Llama 3 8B."""
ROWS = (1, 16, 32, 33, 512, 4096)
EXPERTS, ITEM = 8, 2

MEMORY = SHARE_OF_BANDWIDTH * BANDWIDTH["H100 SXM"]
L2 = 5.5e12
"""Assumed: bytes a second from the L2 cache."""
MATRIX, TF32X3, PLAIN = 600e12, 80e12, 30e12
"""Assumed: operations a second of matrix instructions in bfloat16, of products as exact as float32 by three of TF32,
and of the others, in which weights are mixed."""

MATRICES = 12 * ((768, 2304), (768, 768), (768, 3072), (3072, 768))
"""GPT-2's linear layers, as transformers keeps them."""
RANK = 16


def costs(outs: int, ins: int, rows: int, fused: bool) -> dict[str, float]:
    """One layer, mixed on the way into the product or merged first."""
    weight = outs * ins * ITEM
    moved = rows * (outs + ins) * ITEM
    product, mixing = 2 * rows * outs * ins, 2 * EXPERTS * outs * ins
    if not fused:
        memory, again = (EXPERTS + 2) * weight + moved, weight
        seconds = max((EXPERTS + 2) * weight / MEMORY, mixing / PLAIN)
        seconds += max(weight / L2 + moved / MEMORY, product / MATRIX)
        return {
            "launches": 2, "programs": 0, "memory_bytes": memory, "l2_bytes": again,
            "predicted_us": 1e6 * (seconds + 2 * LAUNCH_SECONDS),
        }  # fmt: skip
    config = linear_config(EXPERTS, ITEM, ITEM)
    row_tiles, out_tiles = -(-rows // config.rows), -(-outs // config.outs)
    pieces = -(-ins // piece_of(row_tiles * out_tiles, ins, config.ins))
    launches = 1 if pieces == 1 else 2
    memory = (EXPERTS + 1) * weight + moved
    again = (row_tiles - 1) * (EXPERTS + 1) * weight
    if pieces > 1:
        again += 2 * 4 * pieces * rows * outs  # float32 sums, written and read
    seconds = max(memory / MEMORY + again / L2, row_tiles * mixing / PLAIN, product / MATRIX)
    return {
        "launches": launches, "programs": row_tiles * out_tiles * pieces, "memory_bytes": memory, "l2_bytes": again,
        "predicted_us": 1e6 * (seconds + launches * LAUNCH_SECONDS),
    }  # fmt: skip


def layers() -> Iterator[dict[str, object]]:
    """Both ways for every layer and number of rows."""
    for outs, ins in LAYERS:
        for rows in ROWS:
            for fused in (True, False):
                found = costs(outs, ins, rows, fused)
                yield {
                    "label": "predicted", "device": "H100 SXM",
                    "case": f"{ins} to {outs}, {rows} rows, E = {EXPERTS}",
                    "way": "mixed on the way" if fused else "merged first",
                    "taken": "yes" if fused == (rows <= FUSED_ROWS) else "no",
                    **_rounded(found),
                }  # fmt: skip


def low_rank() -> Iterator[dict[str, object]]:
    """Merging GPT-2's linear layers with eight LoRAs: in one launch, or by PyTorch, tensor by tensor."""
    total = EXPERTS * RANK
    numbers = sum(outs * ins for outs, ins in MATRICES)
    memory = sum(2 * ITEM * outs * ins + (outs + ins) * total * ITEM for outs, ins in MATRICES)
    # A slice of A comes again for each further tile of outputs, one of B for each of inputs.
    again = sum(
        ((-(-outs // BLOCK_O) - 1) * ins + (-(-ins // BLOCK_I) - 1) * outs) * total * ITEM
        for outs, ins in MATRICES
    )
    programs = sum(-(-outs // BLOCK_O) * -(-ins // BLOCK_I) for outs, ins in MATRICES)
    seconds = max(memory / MEMORY, again / L2, 2 * numbers * total / TF32X3) + LAUNCH_SECONDS
    case = f"GPT-2's {len(MATRICES)} matrices, {EXPERTS} planes of rank {RANK}"
    about: dict[str, object] = {"label": "predicted", "device": "H100 SXM", "case": case}
    ours = {"launches": 1, "programs": programs, "memory_bytes": memory, "l2_bytes": again}
    yield {
        **about,
        "way": "lowrank_merge",
        "taken": "yes",
        **_rounded({**ours, "predicted_us": 1e6 * seconds}),
    }
    traffic = by_pytorch()
    seconds = traffic.bytes / MEMORY + traffic.launches * LAUNCH_SECONDS
    theirs = {"launches": traffic.launches, "programs": 0, "memory_bytes": traffic.bytes, "l2_bytes": 0}
    yield {**about, "way": "PyTorch", "taken": "no", **_rounded({**theirs, "predicted_us": 1e6 * seconds})}


def by_pytorch() -> Traffic:
    """The same merge by PyTorch, operators counted on tensors without memory; the copy into place is left out."""
    with torch.device("meta"):
        layers = [
            (torch.empty(outs, ins).bfloat16(), torch.empty(outs, RANK).bfloat16(), torch.empty(RANK, ins).bfloat16())
            for outs, ins in MATRICES
        ]  # fmt: skip
        weights = torch.empty(EXPERTS)
        with Traffic() as traffic:
            for base, b, a in layers:
                planes = [LowRank(b, a, tuple(base.shape))] * EXPERTS
                merged_tensor(base, planes, weights, torch.bfloat16)
    return traffic


def _rounded(found: dict[str, float]) -> dict[str, float]:
    return {n: round(number, 1) if n == "predicted_us" else int(number) for n, number in found.items()}


def main() -> int:
    """Write the table and print it."""
    rows = [*layers(), *low_rank()]
    columns = list(rows[0])
    show(columns, (tuple(row.values()) for row in rows))
    write(record.DATA / "gpu_layers.csv", columns, (tuple(row.values()) for row in rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
