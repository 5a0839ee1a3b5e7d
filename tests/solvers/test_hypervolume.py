"""Hypervolume maximization: faces, fronts of dominated points, a concave front that is covered."""

from __future__ import annotations

import moocore
import numpy as np
import pytest
import torch

from paretofuse.engine.solvers import (
    HypervolumeMaximization,
    solve_each,
)
from paretofuse.engine.solvers.hypervolume import hypervolume_faces
from tests.support.problems import (
    concave,
    random_inputs,
)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_hypervolume_faces_are_its_derivatives(count: int) -> None:
    rng = np.random.default_rng(count)
    losses = rng.dirichlet(np.ones(count), 6) ** 0.5 if count > 1 else rng.uniform(0, 1, (1, 1))
    reference = np.full(count, 1.5)
    keep = moocore.is_nondominated(losses)
    losses = losses[keep]
    faces = hypervolume_faces(losses, reference)
    for k, m in np.ndindex(*losses.shape):
        moved = [losses.copy(), losses.copy()]
        moved[0][k, m] -= 1e-6
        moved[1][k, m] += 1e-6
        low, high = (moocore.hypervolume(points, ref=reference) for points in moved)
        assert faces[k, m] == pytest.approx((low - high) / 2e-6, abs=1e-7)


def test_dominated_points_have_the_faces_of_their_own_front_and_twins_share() -> None:
    front = np.array([[0.1, 0.6], [0.5, 0.2]])
    worse = front + 0.2
    reference = np.array([1.0, 1.0])
    faces = hypervolume_faces(np.vstack([front, worse, front[:1], [[2.0, 0.0]]]), reference)
    np.testing.assert_allclose(faces[:2], hypervolume_faces(front, reference))
    np.testing.assert_allclose(faces[2:4], hypervolume_faces(worse, reference))
    np.testing.assert_allclose(faces[4], faces[0])
    assert faces[5].tolist() == [0, 0]


def test_points_beyond_the_reference_follow_their_preference() -> None:
    solver = HypervolumeMaximization(reference=[1.0, 1.0], strength=0.0)
    losses, preferences = np.array([[2.0, 3.0], [0.5, 0.5]]), np.array([[0.3, 0.7], [0.5, 0.5]])
    np.testing.assert_allclose(solver.weights(losses, preferences), [[0.3, 0.7], [0.5, 0.5]])


def test_hypervolume_of_a_concave_front_is_covered() -> None:
    solver = HypervolumeMaximization(reference=[1.1, 1.1], strength=0.0)
    rng = np.random.default_rng(0)
    x = np.column_stack([np.linspace(-0.4, 0.4, 5), rng.normal(0, 0.5, (5, 2))])
    preferences = torch.full((5, 2), 0.5, dtype=torch.float64)
    for step in range(1200):
        pairs = [concave(row) for row in x]
        losses = torch.tensor(np.stack([losses for losses, _ in pairs]))
        jacobians = torch.tensor(np.stack([gradients for _, gradients in pairs]))[:, :, None, :]
        rate = 0.5 * 0.5 * (1 + np.cos(np.pi * step / 1200))
        x = x - rate * solve_each(solver, losses, jacobians, preferences)[:, 0].numpy()
    reached = moocore.hypervolume(np.stack([concave(row)[0] for row in x]), ref=[1.1, 1.1])
    # The best 5 points of f2 = 1 - f1^2, found by brute force over a grid.
    grid = torch.linspace(0, 1, 400, dtype=torch.float64)
    whole = 1.1**2 - float(torch.trapezoid(1 - grid**2, grid))
    assert 0.9 * best_of_five() < reached < whole


def best_of_five() -> float:
    """Hypervolume of the best 5 points on f2 = 1 - f1^2 against (1.1, 1.1), by dynamic programming over a grid."""
    f1 = np.linspace(0, 1, 241)
    f2 = 1 - f1**2
    right = np.append(f1, 1.1)
    value = np.zeros(242)  # value[j]: best from points chosen left of right[j], area up to right[j]
    for _ in range(5):
        gain = value[:-1, None] + np.where(
            right[None] > f1[:, None], (right[None] - f1[:, None]) * (1.1 - f2[:, None]), -9
        )
        value = np.maximum(gain.max(axis=0), 0)
    return float(value[-1])


def test_reference_of_the_wrong_length() -> None:
    with pytest.raises(ValueError, match="got reference="):
        HypervolumeMaximization(reference=[1.0])(*random_inputs(2, seed=0))
