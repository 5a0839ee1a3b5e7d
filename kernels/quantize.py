"""Deltas in one byte: int8 or float8 e4m3, with one float32 scale for each tile of each expert's plane."""

from __future__ import annotations

import torch
from torch import Tensor

from paretofuse.kernels import checks

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The largest value of each dtype, which the largest delta of a tile is mapped to."""


def quantize_tiles(deltas: Tensor, dtype: torch.dtype, *, tile: int = 1024) -> tuple[Tensor, Tensor]:
    """Round deltas to one byte each: delta is about quantized * scale of its tile.

    An int8 delta is off by at most half a scale, 1/254 of its tile's largest delta; a float8 delta by at most 1/16
    of itself, or 2^-10 scales if that is more.

    Args:
        deltas: [E, N] float32, bfloat16 or float16, finite; N a multiple of `tile`.
        dtype: torch.int8 or torch.float8_e4m3fn.
        tile: elements per tile, a power of two from 16 on.

    Returns:
        (quantized [E, N] of `dtype`, scales [E, N / tile] float32); a tile of zeros has scale 0.

    Raises:
        TypeError, ValueError: a dtype or shape does not fit.
    """
    checks.check_tile(tile)
    if dtype not in LARGEST:
        raise TypeError(f"dtype: got {dtype}, expected torch.int8 or torch.float8_e4m3fn")
    if deltas.ndim != 2 or deltas.shape[1] % tile:
        raise ValueError(
            f"deltas: got shape {tuple(deltas.shape)}, expected [E, N], N a multiple of tile = {tile}"
        )
    checks.check_tensor("deltas", deltas, checks.FLOATS, tuple(deltas.shape), deltas.device)
    tiles = deltas.detach().float().unflatten(1, (-1, tile))  # [E, T, tile]
    scales = tiles.abs().amax(2) / LARGEST[dtype]  # [E, T]
    units = tiles / scales.where(scales > 0, 1.0)[:, :, None]
    if dtype == torch.int8:
        units = units.round()
    return units.flatten(1).clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype), scales
