"""What public functions of this package check once, at the edge."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""What models, deltas and results may be stored in, in any mix."""

QUANTIZED = (torch.int8, torch.float8_e4m3fn)
"""What deltas may be stored in besides, with one float32 scale for each tile of each plane."""


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
    deltas: Tensor, scales: Tensor | None, shape: tuple[int, int], tiles: int, device: torch.device
) -> None:
    """Raise TypeError or ValueError unless flat deltas, and their scales where they need some, fit together.

    Args:
        deltas: shall be [E, N] of a float dtype without scales, or of a quantized one with them.
        scales: shall be [E, T] float32, or None.
        shape: (E, N).
        tiles: T.
        device: of both.
    """
    check_experts("deltas", shape[0])
    if scales is None and deltas.dtype in QUANTIZED:
        raise ValueError(
            f"scales: got None with deltas of {deltas.dtype}, expected [E, T] float32; pass their scales"
        )
    check_tensor("deltas", deltas, FLOATS if scales is None else QUANTIZED, shape, device)
    check_rows("deltas", deltas)
    check_frozen("deltas", deltas)
    if scales is not None:
        check_tensor("scales", scales, (torch.float32,), (shape[0], tiles), device)
        check_contiguous("scales", scales)
        check_frozen("scales", scales)


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
