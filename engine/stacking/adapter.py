"""A preference as a LoRA adapter in PEFT's format: the low-rank planes side by side, or cut to a rank by SVD.

    sum_j c_j B_j A_j = [c_1 B_1, ..., c_P B_P] [A_1; ...; A_P]        exact, the rank is the sum of the ranks

The file format is PEFT's adapter_config.json and adapter_model.safetensors (Hu et al., LoRA, arXiv 2106.09685).
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from paretofuse.engine.dtypes import TO_NAME
from paretofuse.engine.errors import some
from paretofuse.engine.layout import columns_of, rows_of
from paretofuse.engine.planes.lowrank import LowRank, by_side
from paretofuse.engine.planes.plane import Plane
from paretofuse.engine.routing.weights import coefficients
from paretofuse.engine.stacking.sources import Blueprint
from paretofuse.engine.stacking.stack import Stack
from paretofuse.engine.stacking.threads import one_thread
from paretofuse.engine.store.safetensors_file import SafetensorsWriter
from paretofuse.kernels.reference import spread

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_TRANSPOSED = ("Conv1D", "Embedding")
"""Modules whose weight is [I, O], so that PEFT's B A is its transpose."""


@torch.no_grad()
def write_adapter(
    path: str | os.PathLike[str],
    stack: Stack,
    routing: Tensor,
    blueprint: Blueprint,
    rank: int | None,
) -> float:
    """Write the update that a merge would make as an adapter.

    Args:
        path: the directory; replaced where it holds an adapter, and only then.
        stack: its planes.
        routing: the routing weights [G, P], [G + R, P] or [G + R + C, P].
        blueprint: the model's structure, which tells how modules hold their weights, and its name.
        rank: cut every module's factors to this rank; None keeps their sum.

    Returns:
        The relative error of the update, ||written - exact|| / ||exact|| over all tensors: 0 where nothing was cut.

    Raises:
        ValueError: a rank below 1, a tensor's update that is no product of two factors that a module's LoRA can hold,
            or `path` holds something else.
    """
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"got rank={rank!r}, expected a whole number of at least 1, or None for all of them")
    _check_place(Path(path))
    modules = dict(blueprint.make().named_modules())
    config = json.loads(blueprint.files.get("config.json", b"{}"))
    base_name = str(config.get("_name_or_path") or "")
    layout = stack.layout
    weights = {name: coefficients(routing, spans) for name, spans in layout.spans.items()}
    for spec in layout.with_role("static"):
        weights[spec.name] = routing.new_tensor(layout.static_weights)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    refused: list[str] = []
    wrong = size = 0.0
    for name, row in weights.items():
        planes = [own.get(name) for own in stack.planes]
        if not any(planes):
            continue
        with one_thread() if rank is None else nullcontext():  # else an SVD is computed
            factors = None if rank is None and not _all_low_rank(planes) else _factors(planes, row, rank)
        module, _, attribute = name.rpartition(".")
        kind = type(modules.get(module)).__name__
        if factors is None or attribute != "weight" or kind not in ("Linear", *_TRANSPOSED):
            refused.append(name)
            continue
        b, a, lost, whole = factors
        wrong, size = wrong + lost, size + whole
        if not a.numel():
            continue
        found[module] = (a.T, b.T) if kind in _TRANSPOSED else (b, a)
    if refused:
        raise ValueError(
            f"got experts that change {some(refused)}, which no LoRA holds exactly; "
            + ("pass rank= to cut dense updates of matrices by SVD, or " if rank is None else "")
            + "stack LoRA experts of linear and embedding layers (planes='auto'), or merge a whole model"
        )
    if not found:
        raise ValueError(
            "got a preference at which nothing differs from the base, expected an update to write"
        )
    _write(Path(path), found, modules, base_name)
    return float((wrong / size) ** 0.5) if size else 0.0


def _write(
    path: Path, found: Mapping[str, tuple[Tensor, Tensor]], modules: Mapping[str, nn.Module], base_name: str
) -> None:
    """Write both files beside their place first, so that a failed write leaves nothing and loses nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.parent / f".{path.name}.{secrets.token_hex(6)}.partial"
    new.mkdir()
    try:
        (new / CONFIG).write_text(json.dumps(_config(found, modules, base_name), indent=2) + "\n")
        with SafetensorsWriter(new / WEIGHTS, metadata={"format": "pt"}) as writer:
            for module, (b, a) in found.items():
                embedding = type(modules[module]).__name__ == "Embedding"
                for letter, factor in (("A", a), ("B", b)):
                    end = f"lora_embedding_{letter}" if embedding else f"lora_{letter}.weight"
                    data = factor.contiguous().cpu()
                    chunks = [data.view(torch.uint8).numpy()]
                    writer.add(f"{_PREFIX}{module}.{end}", TO_NAME[data.dtype], tuple(data.shape), chunks)
        path.mkdir(exist_ok=True)
        for name in (WEIGHTS, CONFIG):
            os.replace(new / name, path / name)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _all_low_rank(planes: Sequence[Plane | None]) -> bool:
    return all(plane is None or isinstance(plane, LowRank) for plane in planes)


def _factors(
    planes: Sequence[Plane | None], weights: Tensor, rank: int | None
) -> tuple[Tensor, Tensor, float, float] | None:
    """B and A of the weighted sum, and the squares of what a cut loses and of the whole; None for vectors.

    Weights are [P], [P, rows] or [P, rows + columns]; those of columns take the plane's factors a second time.
    """
    pairs = zip(weights.cpu(), planes, strict=True)
    active = [(w, p) for w, p in pairs if p is not None and bool(w.any())]
    shape = next(plane.shape for plane in planes if plane is not None)
    if len(shape) != 2:
        return None
    left, right = [torch.zeros(rows_of(shape), 0)], [torch.zeros(0, columns_of(shape))]
    for weight, plane in active:
        if isinstance(plane, LowRank):
            by_row, by_column = by_side(weight, rows_of(shape))
            b, a = plane.b.float().cpu(), plane.a.float().cpu()
            left.append(by_row * b)
            right.append(a)
            if by_column is not None and bool(by_column.any()):
                left.append(b)
                right.append(a * by_column)
    b, a = torch.cat(left, 1), torch.cat(right)
    dense = [(w, p) for w, p in active if not isinstance(p, LowRank)]
    if rank is None or (not dense and b.shape[1] <= rank):
        return b, a, 0.0, 1.0 if b.numel() else 0.0
    if dense:
        whole = b @ a
        for weight, plane in dense:
            whole += spread(weight, shape) * plane.decode().cpu()
        u, sizes, v = torch.linalg.svd(whole, full_matrices=False)
    else:  # of the small matrix between two orthogonal ones
        of_b, of_a = torch.linalg.qr(b), torch.linalg.qr(a.T)
        u, sizes, v = torch.linalg.svd(of_b.R @ of_a.R.T)
        u, v = of_b.Q @ u, v @ of_a.Q.T
    root = sizes[:rank].sqrt()
    squares = sizes.double().square()
    return u[:, :rank] * root, root[:, None] * v[:rank], float(squares[rank:].sum()), float(squares.sum())


def _config(
    found: Mapping[str, tuple[Tensor, Tensor]], modules: Mapping[str, nn.Module], base_name: str
) -> dict[str, object]:
    """adapter_config.json: every module by its full name, alpha equal to its rank, so that B A counts as it is."""
    ranks = {module: a.shape[0] for module, (_, a) in found.items()}
    usual = max(ranks.values())
    own = {module: rank for module, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": own,
        "alpha_pattern": own,
        "target_modules": list(ranks),
        "fan_in_fan_out": any(type(modules[module]).__name__ == "Conv1D" for module in ranks),
        "bias": "none",
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }


def _check_place(path: Path) -> None:
    """ValueError where something stands that is no adapter."""
    if not os.path.lexists(path):
        return
    others = [] if not path.is_dir() else [p.name for p in path.iterdir() if p.name not in (CONFIG, WEIGHTS)]
    if not path.is_dir() or others:
        held = f"holds {some(sorted(others))}" if others else "is a file"
        raise ValueError(
            f"got {path}, which {held}, expected an adapter's directory or a new one; choose another"
        )
