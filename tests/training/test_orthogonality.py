"""Trained planes that are turned apart: down the squares of their products, and by `pf.fit` where it is told to."""

from __future__ import annotations

import pytest
import torch

import paretofuse as pf
from paretofuse.engine.planes.trained import TrainedPlanes
from tests.engine.test_planes import two_experts
from tests.training.test_planes import planes_of, small, tasks


def crossed(planes: TrainedPlanes) -> list[torch.Tensor]:
    """A_i A_j^T of the first tensor, [P R, P R], zero where i = j; and all rows of A."""
    rows = torch.cat(list(planes.factors)[1 :: 2 * len(planes.planes[0])]).detach().double()
    products = rows @ rows.T
    size = len(rows) // len(planes.planes)
    for i in range(0, len(rows), size):
        products[i : i + size, i : i + size] = 0
    return [products, rows]


@pytest.mark.parametrize("count", [2, 3])
def test_planes_are_turned_apart_down_the_squares_of_their_products(count: int) -> None:
    engine = two_experts("dense")
    planes = TrainedPlanes(count, engine.layout.with_role("routed"), engine._bound.places, 3, seed=1)
    products, rows = crossed(planes)
    before, norms = products.norm(), rows.norm(dim=1)
    leaf = rows.clone().requires_grad_()
    apart = torch.ones(len(rows), len(rows)) - torch.block_diag(*[torch.ones(3, 3)] * count)
    (apart * (leaf @ leaf.T)).square().sum().div(4).backward()
    planes.turn_apart(0.1)
    assert leaf.grad is not None
    torch.testing.assert_close(
        crossed(planes)[1], rows - 0.1 * leaf.grad / before.clamp(min=1), rtol=1e-5, atol=1e-6
    )
    for _ in range(300):
        planes.turn_apart(0.1)
    products, rows = crossed(planes)
    assert products.norm() < 0.01 * before
    assert (rows.norm(dim=1) > 0.7 * norms).all(), "turned, not taken away"
    assert all(not b.any() for b in list(planes.factors)[::2])


def test_fit_turns_planes_apart_where_it_is_told_to() -> None:
    free, held = small(), small()
    pf.fit(free, tasks(), steps=3, plane_lr=1e-3, progress=False)
    pf.fit(held, tasks(), steps=3, plane_lr=1e-3, plane_orthogonality=1000, progress=False)
    assert crossed(planes_of(held))[0].norm() < 0.5 * crossed(planes_of(free))[0].norm()
    with pytest.raises(
        ValueError, match=r"plane_orthogonality=1001 at plane_lr=0\.001, expected at most 1 / plane_lr"
    ):
        pf.fit(small(), tasks(), plane_lr=1e-3, plane_orthogonality=1001)
    with pytest.raises(ValueError, match="plane_orthogonality=-1, expected a number of at least 0"):
        pf.fit(small(), tasks(), plane_orthogonality=-1)
