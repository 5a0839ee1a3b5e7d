"""Merging planes of low rank by the Triton kernel: one launch for each device and dtype, and no plane made dense.

Bases, dense planes and outputs lie where they are; the factors of a tensor's planes are copied side by side once, those
of trained planes anew for each merge. A tensor that has quantized planes besides is PyTorch's (`reference_merger`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from paretofuse.engine.dtypes import TO_TORCH
from paretofuse.engine.layout import TensorSpec, columns_of, place, rows_of
from paretofuse.engine.merging.backends import Merger, by_shape
from paretofuse.engine.merging.flat import FlatOutputs
from paretofuse.engine.planes.dense import Dense
from paretofuse.engine.planes.lowrank import LowRank
from paretofuse.engine.planes.plane import Plane
from paretofuse.engine.stacking.stack import Stack
from paretofuse.kernels.lowrank_merge import Factors, Matrix, bind_lowrank_merge

Part = tuple[Sequence[Matrix], Factors, Tensor]
"""Matrices with their factors, and the buffer [K, N] that they are merged into."""


def all_low_rank(planes: Sequence[Plane | None]) -> bool:
    """Whether each of a tensor's planes is of low rank, or absent."""
    return all(plane is None or isinstance(plane, LowRank) for plane in planes)


def is_merged_here(planes: Sequence[Plane | None]) -> bool:
    """Whether the kernel can merge a tensor: each of its planes is of low rank, dense, or absent."""
    return all(plane is None or isinstance(plane, LowRank | Dense) for plane in planes)


def low_rank_merger(
    specs: Sequence[TensorSpec],
    rows: Mapping[str, int],
    stack: Stack,
    out: FlatOutputs,
    held: dict[tuple[str, ...], Factors],
) -> Merger:
    """Bind a merge of tensors whose planes are `is_merged_here`.

    Args:
        specs: the tensors, of one device.
        rows: as `reference_merger`'s.
        stack: base and planes.
        out: outputs of these tensors, among others.
        held: by the names of tensors their factors side by side, which all merges of a stack share; added to.
    """
    groups, names = len(set(rows.values())), {spec.name for spec in specs}
    parts: list[Part] = []
    for wanted, buffer in out.buffers.items():
        offsets, _ = place([spec.numel for spec in wanted])
        matrices = [
            _matrix(spec, offset, rows[spec.name], stack)
            for spec, offset in zip(wanted, offsets, strict=True)
            if spec.name in names
        ]
        if matrices:  # bases that share a buffer share a dtype
            key = tuple(spec.name for spec in wanted if spec.name in names)
            if key not in held:
                held[key] = Factors(matrices)
            parts.append((matrices, held[key], buffer))
    return by_shape(lambda shape: _bind(parts, shape, shape[1] > groups))


def _bind(parts: Sequence[Part], shape: torch.Size, by_row: bool) -> Merger:
    """A merge that reads weights of one shape where they are copied to; nothing is waited for."""
    if not parts:
        return lambda weights: None
    whole = torch.empty(shape, dtype=torch.float32, device=parts[0][2].device)
    launches = [
        bind_lowrank_merge(matrices, factors, whole, buffer, by_row=by_row)
        for matrices, factors, buffer in parts
    ]

    def merge(weights: Tensor) -> None:
        whole.copy_(weights, non_blocking=True)
        for launch in launches:
            launch()

    return merge


def _matrix(spec: TensorSpec, offset: int, group: int, stack: Stack) -> Matrix:
    """A tensor as the kernel takes it: [rows, columns]."""
    planes = [(j, own.get(spec.name)) for j, own in enumerate(stack.planes)]
    factors = [(j, plane.b, plane.a) for j, plane in planes if isinstance(plane, LowRank)]
    spans = stack.layout.spans.get(spec.name)
    shape, dtype = (rows_of(spec.shape), columns_of(spec.shape)), TO_TORCH[spec.delta_dtype]
    dense = [(j, p.values.to(dtype).contiguous().view(shape)) for j, p in planes if isinstance(p, Dense)]
    base = stack.base[spec.name].contiguous().view(shape)
    return Matrix(
        base, factors, offset, group, -1 if spans is None or spans.rows is None else spans.rows.start, dense
    )
