"""Groups of neighbouring elements that share one scale: what int8 and int4 planes have in common.

    value[i] = quantized[i] * scale[i // group]        scale = largest magnitude in the group / limit

Groups follow the tensor's memory, row after row; the last one may be shorter. A group is a power of two from 32 on and
divides the tile of 1024, so that a tile has whole groups.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from paretofuse.engine.layout import TILE

SMALLEST = 32
"""Elements that the kernels take at a time: a step never crosses from one scale to the next."""


def check_group(group: int) -> None:
    """Raise ValueError unless a group is a power of two from 32 to 1024."""
    if group < SMALLEST or group > TILE or group & (group - 1):
        raise ValueError(f"got groups of {group} elements, expected a power of two from {SMALLEST} to {TILE}")


def quantize(delta: Tensor, group: int, limit: int) -> tuple[Tensor, Tensor]:
    """Round to whole numbers of scales, to nearest even.

    Args:
        delta: float32, any shape.
        group: elements of a group.
        limit: the largest quantized magnitude.

    Returns:
        quantized float32 [numel], whole numbers from -limit to limit; scales float32 [ceil(numel / group)], 0 for a
        group of zeros.
    """
    check_group(group)
    flat = delta.reshape(-1)
    groups = F.pad(flat, (0, -flat.numel() % group)).view(-1, group)  # [groups, group]
    scales = groups.abs().amax(1) / limit  # [groups]
    units = groups / scales.where(scales > 0, 1.0).unsqueeze(1)
    return units.round().clamp_(-limit, limit).view(-1)[: flat.numel()], scales


def scaled(quantized: Tensor, scales: Tensor, group: int) -> Tensor:
    """Float32 [numel] of quantized numbers [numel] and their scales."""
    count = quantized.numel()
    groups = F.pad(quantized.float(), (0, -count % group)).view(-1, group)
    return (groups * scales.unsqueeze(1)).view(-1)[:count]
