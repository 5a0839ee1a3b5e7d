"""Triton where it is installed; where it is not, kernels can still be defined and fail only when launched.

Kernels take `jit` and `tl` from here, so that importing a kernel's module never needs Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["interpreted", "jit", "require", "tl", "triton"]

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None
    tl = None


class _Absent:
    """Stands for a kernel where Triton is missing."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getitem__(self, grid: object) -> Any:
        raise ImportError(
            f"the kernel {self.name} needs Triton, which is not installed; "
            "install it (pip install triton) or choose another backend"
        )


def jit(function: Callable[..., Any], *, any_value: tuple[str, ...] = ()) -> Any:
    """`triton.jit`, or a stand-in that raises ImportError when it is launched.

    any_value: integer arguments for which one binary serves all values; Triton compiles others anew for 1 and for
    multiples of 16.
    """
    if triton is None:
        return _Absent(function.__name__)
    return triton.jit(function, do_not_specialize=list(any_value))


def interpreted(kernel: Any) -> bool:
    """Whether `kernel` runs in Triton's interpreter, on the CPU.

    Triton decides so by TRITON_INTERPRET=1 when the kernel's module is imported; later is too late.
    """
    return triton is not None and not isinstance(kernel, triton.JITFunction)


def require(kernel: Any, device_type: str, instead: str) -> None:
    """Raise when `kernel` cannot be launched on this device type.

    Raises:
        ImportError: Triton is not installed.
        ValueError: the tensors are on a device that Triton cannot use.
    """
    if triton is None:
        raise ImportError(
            f"got no Triton; Triton is not installed; install it (pip install triton) or use {instead}"
        )
    if device_type != "cuda" and not interpreted(kernel):
        raise ValueError(
            f"got tensors on {device_type!r}, expected 'cuda' (NVIDIA or ROCm); move them there, "
            f"use {instead}, or set TRITON_INTERPRET=1 before the first import for Triton's interpreter"
        )
