"""A stack: base and deltas in memory, or mapped from a store."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from paretofuse.engine.dtypes import TO_TORCH
from paretofuse.engine.layout import Layout
from paretofuse.engine.stacking.deltas import base_blocks, delta_blocks, head_blocks, head_infos
from paretofuse.engine.stacking.plan import Plan


@dataclass(frozen=True)
class Stack:
    """Base and deltas in memory (or mapped from a store).

    Attributes:
        layout: the tensor table.
        base: every stored tensor by name.
        deltas: for each expert, its deltas by name; an absent one means that the expert leaves the tensor unchanged.
        heads: for each objective, its own tensors by name.
        release: lets the system drop the pages of base and deltas of the named tensors where they are mapped from
            files, which are read again when touched; does nothing elsewhere.
    """

    layout: Layout
    base: dict[str, Tensor]
    deltas: tuple[dict[str, Tensor], ...]
    heads: dict[str, dict[str, Tensor]]
    release: Callable[[Iterable[str]], None] = field(default=lambda names: None)


def build(plan: Plan, device: torch.device | None) -> Stack:
    """Read everything into memory: on one device, or (None) each tensor where the base's lies, else on the CPU."""

    def place(name: str) -> torch.device:
        return device or plan.base.devices.get(name, torch.device("cpu"))

    base = {
        spec.name: _gather(base_blocks(plan, spec), spec.shape, TO_TORCH[spec.dtype], place(spec.name))
        for spec in plan.layout.tensors
    }
    deltas = []
    for expert in plan.experts.values():
        own: dict[str, Tensor] = {}
        for spec in plan.layout.with_role("routed", "static"):
            blocks = delta_blocks(plan, expert, spec)
            if blocks is not None:
                own[spec.name] = _gather(blocks, spec.shape, TO_TORCH[spec.delta_dtype], place(spec.name))
        deltas.append(own)
    heads = {
        objective: {
            name: _gather(head_blocks(plan, objective, name), info.shape, info.dtype, place(name))
            for name, info in head_infos(plan, objective).items()
        }
        for objective, names in plan.heads.items()
        if names
    }
    return Stack(plan.layout, base, tuple(deltas), heads)


def _gather(
    blocks: Iterator[Tensor], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Blocks into one new tensor."""
    result = torch.empty(shape, dtype=dtype, device=device)
    flat, start = result.view(-1), 0
    for block in blocks:
        flat[start : start + block.numel()].copy_(block)
        start += block.numel()
    return result
