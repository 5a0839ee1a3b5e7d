"""Stores to merge on a device, and what its results must be: the CPU's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import paretofuse as pf
from tests.support.models import net_and_experts


def net_store(path: Path, count: int = 3, **options: Any) -> Path:
    base, experts = net_and_experts(count=count)
    pf.stack(base, experts, **options).save(path)
    return path


def equal(got: np.ndarray, truth: np.ndarray) -> bool:
    """Bit for bit, but for the sign of a zero: the CPU skips weights of zero, the kernel multiplies by them."""
    if got.dtype == np.uint16:
        got, truth = (np.where(a & 0x7FFF == 0, 0, a) for a in (got, truth))
    return got.shape == truth.shape and bool(np.array_equal(got, truth))


def assert_cpu_results(device: dict[str, Any], host: dict[str, Any]) -> None:
    assert device.keys() == host.keys()
    assert [name for name in host if not equal(device[name], host[name])] == []


STORES: dict[str, Callable[[Path], Path]] = {
    "float32": lambda path: net_store(path),
    "bfloat16": lambda path: net_store(path, dtype=torch.bfloat16),
    "float16, a group for each tensor": lambda path: net_store(path, dtype=torch.float16, route="tensor"),
    "bfloat16 deltas": lambda path: net_store(path, delta_dtype=torch.bfloat16),
    "one expert": lambda path: net_store(path, count=1),
    "eight experts": lambda path: net_store(path, count=8, route="tensor"),
    "experts of one objective and of none": lambda path: net_store(
        path, count=4, objectives={"x": ["a", "c"], "y": ["b"]}
    ),
    "static tensors": lambda path: net_store(path, route=lambda n: "one" if "first" in n else None),
}
