"""What public functions of this package check once, at the edge."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""What models, deltas and results may be stored in, in any mix."""

QUANTIZED = (torch.int8, torch.uint8)
"""What deltas may be stored in besides, with a float32 scale for each group: int8, or int4 two to a byte."""


def bits(deltas: Tensor) -> int:
    """Of an element of deltas."""
    return 4 if deltas.dtype == torch.uint8 else 8 * deltas.element_size()


def check_tensor(
    name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...], device: torch.device
) -> None:
    """Raise TypeError or ValueError unless a tensor has one of the dtypes, the shape and the device."""
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(d) for d in dtypes)
        raise TypeError(f"{name}: got {tensor.dtype}, expected {allowed}; convert it with .to(...)")
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name}: got shape {tuple(tensor.shape)}, expected {shape}; check the layout and the tile"
        )
    if tensor.device != device:
        raise ValueError(
            f"{name}: got device {tensor.device}, expected {device}; move all inputs to one device"
        )


def check_rows(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless the last dimension is contiguous."""
    # A dimension of one element, or none at all (a scalar), has no stride to speak of.
    if tensor.numel() and tensor.ndim and tensor.shape[-1] != 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{name}: got strides {tensor.stride()}, expected contiguous rows; call .contiguous()"
        )


def check_contiguous(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless a tensor is contiguous."""
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: got strides {tensor.stride()}, expected contiguous; call .contiguous()")


def check_deltas(
    deltas: Tensor, scales: Tensor | None, shape: tuple[int, int], tile: int, device: torch.device
) -> None:
    """Raise TypeError or ValueError unless flat deltas, and their scales where they need some, fit together.

    Args:
        deltas: shall be [E, N] of a float dtype without scales, or of int8, or [E, ceil(N / 2)] uint8, with them.
        scales: shall be [E, ceil(N / group)] float32, or None; the group a power of two from 16 to the tile.
        shape: (E, N).
        tile: elements of a tile.
        device: of both.
    """
    experts, n = shape
    check_experts("deltas", experts)
    if scales is None and deltas.dtype in QUANTIZED:
        raise ValueError(
            f"scales: got None with deltas of {deltas.dtype}, expected [E, N / group] float32; pass their scales"
        )
    stored = (experts, -(-n // 2)) if deltas.dtype == torch.uint8 else shape
    check_tensor("deltas", deltas, FLOATS if scales is None else QUANTIZED, stored, device)
    check_rows("deltas", deltas)
    check_frozen("deltas", deltas)
    if scales is not None:
        count = scales.shape[-1] if scales.ndim else 0
        group = group_of(n, count, tile)
        check_tensor("scales", scales, (torch.float32,), (experts, -(-n // group)), device)
        check_rows("scales", scales)
        check_frozen("scales", scales)


def group_of(n: int, scales: int, tile: int) -> int:
    """Elements that share a scale, where n elements have so many: a power of two from 16 to the tile.

    Raises:
        ValueError: no such group makes as many.
    """
    if not n:
        return tile
    group = tile
    while group > 16 and -(-n // group) < scales:
        group //= 2
    if -(-n // group) != scales:
        raise ValueError(
            f"scales: got {scales} for {n} elements, expected one for each group of a power of two from 16 to the tile "
            f"of {tile}"
        )
    return group


def check_frozen(name: str, tensor: Tensor) -> None:
    """Raise ValueError when a gradient is wanted that no kernel computes."""
    if torch.is_grad_enabled() and tensor.requires_grad:
        raise ValueError(f"{name}: got requires_grad=True, expected a frozen tensor; call .detach()")


def check_tile(tile: int) -> None:
    """Raise ValueError unless a tile size can be launched."""
    if tile < 16 or tile & (tile - 1):
        raise ValueError(
            f"tile: got {tile}, expected a power of two from 16 on; lay the buffers out with such a tile"
        )


def check_experts(name: str, experts: int) -> None:
    """Raise ValueError where there is no expert."""
    if experts < 1:
        raise ValueError(f"{name}: got no experts, expected at least one")
