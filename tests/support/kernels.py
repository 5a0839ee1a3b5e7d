"""Triton, where a test needs it; and the routed gradient of a whole flat model, as the engine's collector makes it."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from paretofuse.kernels.routed_grad import grad_partials, group_sums, plan_groups


def needs_triton() -> ModuleType:
    """Triton; skips the test, or the module that asks, where it is missing or too old."""
    return pytest.importorskip("triton", minversion="3.4", reason="Triton 3.4 or newer is not installed")  # type: ignore[no-any-return]


def routed_grad(
    grad: Tensor,
    deltas: Tensor,
    tile_group: Tensor,
    groups: int,
    *,
    scales: Tensor | None = None,
    tile: int = 1024,
) -> Tensor:
    """Both stages on grad [N] and deltas [E, N]: float32 [G, E]."""
    plan = plan_groups(tile_group, groups, tile)
    partials = grad_partials(grad, deltas, scales=scales, tile=tile)
    missing = len(plan.order) - len(partials)  # the last tile's blocks that begin behind the gradient's end
    return group_sums(torch.nn.functional.pad(partials, (0, 0, 0, missing)), plan)
