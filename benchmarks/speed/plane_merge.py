"""What do planes of fewer bytes gain? A merge of CLIP ViT-B/32's size, 8 experts, bfloat16 base and output.

Planes of each format (dense bfloat16, int8 with groups of 1024 and of 32, int4, LoRA of rank 2 and 16 an expert) go
through the C++ core side by side with the best of plain PyTorch on dense bfloat16 planes, `torch.addmv`, and a copy.
"LoRA switch" times factors in float32 against `torch.addmm` over the same products. The last case asks what
coefficients of rows and of columns cost a merge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness.record import Options, Row, check, interleave, milliseconds, paired_ratio
from paretofuse.engine.dtypes import TO_NAME
from paretofuse.engine.merging import native
from paretofuse.engine.planes.dense import Dense
from paretofuse.engine.planes.int4 import Int4
from paretofuse.engine.planes.int8 import Int8
from paretofuse.engine.planes.lowrank import LowRank
from paretofuse.engine.planes.plane import Plane, memories, nbytes
from paretofuse.kernels.reference import spread

EXPERTS = 8
ROWS, COLUMNS = 3072, 768
TARGETS = {"int8, groups of 1024": ">= 1.5", "int4": ">= 1.6"}


def run(options: Options) -> list[Row]:
    """Measure both cases."""
    torch.set_num_threads(options.threads)
    return [*_formats(options), *_switch(options), *_families(options)]


def _formats(options: Options) -> list[Row]:
    layers = 1 if options.quick else 36  # 85 million elements
    base = [_random((ROWS, COLUMNS), 1000 + i, 0.02).bfloat16() for i in range(layers)]
    makers: dict[str, Callable[[Tensor], Plane]] = {
        "bf16": lambda delta: Dense.encode(delta, torch.bfloat16),
        "int8, groups of 1024": lambda delta: Int8.encode(delta, 1024),
        "int8, groups of 32": lambda delta: Int8.encode(delta, 32),
        "int4": lambda delta: Int4.encode(delta, 32),
    }
    planes: dict[str, list[list[Plane]]] = {name: [] for name in (*makers, "LoRA, rank 2", "LoRA, rank 16")}
    for i in range(layers):
        deltas = [_random((ROWS, COLUMNS), i * EXPERTS + e, 0.002) for e in range(EXPERTS)]
        for name, make in makers.items():
            planes[name].append([make(delta) for delta in deltas])
        for rank in (2, 16):
            planes[f"LoRA, rank {rank}"].append(
                [_lora(rank, i * EXPERTS + e, torch.bfloat16) for e in range(EXPERTS)]
            )
    weights = np.random.default_rng(0).dirichlet(np.ones(EXPERTS)).astype(np.float32)
    out = [torch.empty_like(tensor) for tensor in base]
    contenders: dict[str, Callable[[], object]] = {
        name: _merge(base, own, weights, out, options.threads) for name, own in planes.items()
    }
    stacked = [torch.stack([p.decode().bfloat16().flatten() for p in own]) for own in planes["bf16"]]
    row = torch.from_numpy(weights).bfloat16()

    def plain() -> None:
        for tensor, delta, target in zip(base, stacked, out, strict=True):
            torch.addmv(tensor.flatten(), delta.T, row, out=target.view(-1))

    contenders["plain PyTorch, addmv"] = plain
    for name, call in contenders.items():
        own = planes.get(name, planes["bf16"])
        _check(base, own, weights, out, call, name, 2.0 if name in planes else 16.0)
    source = torch.ones((1 << 24) if options.quick else (1 << 29), dtype=torch.uint8)
    target = torch.empty_like(source)
    contenders["copy"] = lambda: native.copy(
        target.data_ptr(), source.data_ptr(), source.numel(), threads=options.threads
    )
    seconds = interleave(contenders, options.repeat(9))
    rows = []
    for name, values in seconds.items():
        moved = 2 * source.numel() if name == "copy" else 4 * sum(t.numel() for t in base)
        moved += sum(nbytes(p) for own in planes.get(name, planes["bf16"]) for p in own) * (name != "copy")
        share = paired_ratio([moved / s for s in values], [2 * source.numel() / s for s in seconds["copy"]])
        rows.append(
            Row(
                case="merge, 85 M elements, 8 experts, bfloat16",
                contender=name,
                quantity="time",
                unit="ms",
                values=milliseconds(values),
                gb_per_s=moved / sorted(values)[len(values) // 2] / 1e9,
                bandwidth_share=share,
                comparison="" if name in ("bf16", "copy") else "bf16 / this",
                ratio=None if name in ("bf16", "copy") else paired_ratio(seconds["bf16"], values),
                target=TARGETS.get(name, ""),
            )
        )
    best = seconds["plain PyTorch, addmv"]
    rows.append(
        Row(
            case="merge, 85 M elements, 8 experts, bfloat16: against plain PyTorch",
            contender="int8, groups of 1024",
            quantity="time",
            unit="ms",
            values=milliseconds(seconds["int8, groups of 1024"]),
            comparison="addmv / this",
            ratio=paired_ratio(best, seconds["int8, groups of 1024"]),
            target=">= 3.5",
        )
    )
    return rows


def _switch(options: Options) -> list[Row]:
    layers = 1 if options.quick else 36
    base = [_random((ROWS, COLUMNS), 2000 + i, 0.02) for i in range(layers)]
    planes: list[list[Plane]] = [
        [_lora(16, i * EXPERTS + e, torch.float32) for e in range(EXPERTS)] for i in range(layers)
    ]
    weights = np.random.default_rng(1).dirichlet(np.ones(EXPERTS)).astype(np.float32)
    out = [torch.empty_like(tensor) for tensor in base]
    ours = _merge(base, planes, weights, out, options.threads)
    factors = [
        (
            torch.cat([float(w) * p.tensors()[".lora_B"] for w, p in zip(weights, own, strict=True)], 1),
            torch.cat([p.tensors()[".lora_A"] for p in own], 0),
        )
        for own in planes
    ]

    def plain() -> None:
        for tensor, (b, a), target in zip(base, factors, out, strict=True):
            torch.addmm(tensor, b, a, out=target)

    for name, call in {"ours": ours, "addmm": plain}.items():
        _check(base, planes, weights, out, call, name, 64.0)  # float32 sums of 128 products
    seconds = interleave({"ours": ours, "torch.addmm": plain}, options.repeat(9))
    return [
        Row(
            case="LoRA switch, 85 M elements, 8 experts of rank 16, float32",
            contender=name,
            quantity="time",
            unit="ms",
            values=milliseconds(values),
            comparison="ours / addmm" if name == "ours" else "",
            ratio=paired_ratio(values, seconds["torch.addmm"]) if name == "ours" else None,
            target="<= 1.2" if name == "ours" else "",
        )
        for name, values in seconds.items()
    ]


def _families(options: Options) -> list[Row]:
    """Routers of each family: a coefficient for all of a matrix, for each row, and for each column besides."""
    layers = 1 if options.quick else 36
    base = [_random((ROWS, COLUMNS), 3000 + i, 0.02).bfloat16() for i in range(layers)]
    deltas = [
        [_random((ROWS, COLUMNS), i * EXPERTS + e, 0.002) for e in range(EXPERTS)] for i in range(layers)
    ]
    formats: dict[str, list[list[Plane]]] = {
        "bf16": [[Dense.encode(delta, torch.bfloat16) for delta in own] for own in deltas],
        "int8, groups of 1024": [[Int8.encode(delta, 1024) for delta in own] for own in deltas],
        "LoRA, rank 16": [
            [_lora(16, i * EXPERTS + e, torch.bfloat16) for e in range(EXPERTS)] for i in range(layers)
        ],
    }
    whole = torch.from_numpy(np.random.default_rng(2).dirichlet(np.ones(EXPERTS)).astype(np.float32))
    rows = whole.unsqueeze(1) + _random((EXPERTS, ROWS), 4, 0.1)
    families = {
        "scalar": whole,
        "rows": rows,
        "rows+columns": torch.cat([rows, _random((EXPERTS, COLUMNS), 5, 0.1)], 1),
    }
    out = [torch.empty_like(tensor) for tensor in base]
    found = []
    for form, planes in formats.items():
        contenders: dict[str, Callable[[], object]] = {
            family: _merge(base, planes, weights.numpy(), out, options.threads)
            for family, weights in families.items()
        }
        for family, call in contenders.items():
            _check(base, planes, families[family].numpy(), out, call, f"{form}, {family}", 2.0)
        seconds = interleave(contenders, options.repeat(9))
        for family, values in seconds.items():
            plain = family == "scalar"
            found.append(
                Row(
                    case=f"families, 85 M elements, 8 experts, bfloat16: {form}",
                    contender=family,
                    quantity="time",
                    unit="ms",
                    values=milliseconds(values),
                    comparison="" if plain else "this / scalar",
                    ratio=None if plain else paired_ratio(values, seconds["scalar"]),
                )
            )
    return found


def _random(shape: tuple[int, ...], seed: int, size: float) -> Tensor:
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _lora(rank: int, seed: int, dtype: torch.dtype) -> LowRank:
    b, a = _random((ROWS, rank), seed, 0.02), _random((rank, COLUMNS), seed + 1, 0.02)
    return LowRank(b.to(dtype), a.to(dtype), (ROWS, COLUMNS))


def _merge(
    base: Sequence[Tensor],
    planes: Sequence[Sequence[Plane]],
    weights: np.ndarray,
    out: Sequence[Tensor],
    threads: int,
) -> Callable[[], object]:
    """The core's merge of all layers, bound once, at weights [E], [E, rows] or [E, rows + columns]."""
    plan = native.MergePlan(
        base=[tensor.data_ptr() for tensor in base],
        planes=[memories(own) for own in planes],
        lengths=[tensor.numel() for tensor in base],
        rows=[0] * len(base),
        columns=[COLUMNS] * len(base),
        base_dtypes=[TO_NAME[tensor.dtype] for tensor in base],
        out_dtypes=[TO_NAME[tensor.dtype] for tensor in out],
        plane_count=EXPERTS,
        row_count=1,
    )
    table = np.array([[tensor.data_ptr() for tensor in out]], np.uint64)
    if weights.ndim == 1:
        return lambda: plan.run(weights.reshape(1, 1, -1), table, threads=threads)
    none = np.zeros((1, 1, EXPERTS), np.float32)
    own = [np.ascontiguousarray(side) for side in np.split(weights, [ROWS], 1)]  # held by what is returned
    return lambda: plan.run(
        none,
        table,
        row_weights=[[own[0].ctypes.data] * len(base)],
        column_weights=[[own[1].ctypes.data] * len(base)] if own[1].size else None,
        threads=threads,
    )


def _check(
    base: Sequence[Tensor],
    planes: Sequence[Sequence[Plane]],
    weights: np.ndarray,
    out: Sequence[Tensor],
    call: Callable[[], object],
    name: str,
    slack: float,
) -> None:
    """What a contender wrote, over NaN, against float64 on decoded planes, in units of the output's rounding."""
    for tensor in out:
        tensor.fill_(float("nan"))
    call()
    step = torch.finfo(out[0].dtype).eps
    for tensor, own, found in list(zip(base, planes, out, strict=True))[:2]:
        truth = tensor.double()
        for weight, plane in zip(torch.from_numpy(weights).double(), own, strict=True):
            truth = truth + spread(weight, tensor.shape) * plane.decode().double()
        error = ((found.double() - truth).abs() / (truth.abs() + 1e-3)).max()
        check(bool(error <= slack * step), f"{name} is off by {float(error):.3g} of the value")
