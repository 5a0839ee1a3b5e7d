"""What holds for every solver, on problems whose fronts are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from paretofuse.engine.solvers import (
    COSMOS,
    EPO,
    MGDA,
    SOLVERS,
    HypervolumeMaximization,
    LinearScalarization,
    SmoothTchebycheff,
    Solver,
    Tchebycheff,
    TorchJD,
    WeightedSolver,
    get_solver,
)
from paretofuse.engine.solvers.small import shortest_in_hull
from tests.support.problems import (
    SIZES,
    Problem,
    concave,
    descend,
    fonseca,
    quadratic,
    random_inputs,
    weights_of,
)

WEIGHTED = [
    LinearScalarization(), EPO(), Tchebycheff(), SmoothTchebycheff(), MGDA(), MGDA("gradient"), MGDA("loss"), COSMOS(),
    COSMOS(align="preference"),
]  # fmt: skip


@pytest.mark.parametrize("solver", [*WEIGHTED, HypervolumeMaximization()], ids=repr)
@pytest.mark.parametrize("count", SIZES)
def test_permuting_objectives_does_not_change_the_direction(solver: Solver, count: int) -> None:
    losses, jacobian, preference = random_inputs(count, seed=count)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    direction = solver(losses, jacobian, preference)
    assert direction.shape == jacobian.shape[1:]
    torch.testing.assert_close(solver(losses[order], jacobian[order], preference[order]), direction)


@pytest.mark.parametrize("solver", [*WEIGHTED, HypervolumeMaximization()], ids=repr)
@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("gradient_scale", [0.0, 1e-12, 1e6])
@pytest.mark.parametrize("loss_scale", [0.0, 1e-9, 1e6])
def test_scales_zero_gradients_and_zero_losses_stay_finite(
    solver: Solver, count: int, gradient_scale: float, loss_scale: float
) -> None:
    losses, jacobian, preference = random_inputs(count, seed=7)
    direction = solver(losses * loss_scale, jacobian * gradient_scale, preference)
    assert torch.isfinite(direction).all()
    if gradient_scale == 0:
        assert (direction == 0).all()


@pytest.mark.parametrize("solver", WEIGHTED[:7], ids=repr)
@pytest.mark.parametrize("count", SIZES)
def test_weights_are_not_negative_and_one_hot_preferences_work(solver: WeightedSolver, count: int) -> None:
    for seed in range(5):
        losses, jacobian, preference = random_inputs(count, seed)
        assert (weights_of(solver, losses, jacobian, preference) >= 0).all()
        corner = torch.eye(count, dtype=torch.float64)[seed % count]
        alpha = weights_of(solver, losses, jacobian, corner)
        if not isinstance(solver, MGDA):  # MGDA does not hear the preference
            np.testing.assert_allclose(alpha, corner)


@pytest.mark.parametrize("solver", [*WEIGHTED, HypervolumeMaximization()], ids=repr)
def test_one_objective_is_plain_descent(solver: Solver) -> None:
    losses, jacobian, preference = random_inputs(1, seed=3)
    if solver == MGDA("gradient"):
        expected = jacobian[0] / jacobian.norm()
    elif solver == MGDA("loss"):
        expected = jacobian[0] / losses[0]
    else:
        expected = jacobian[0]
    torch.testing.assert_close(solver(losses, jacobian, preference), expected)


@pytest.mark.parametrize("solver", [EPO(), MGDA(), Tchebycheff(), SmoothTchebycheff()], ids=repr)
def test_equal_objectives_are_as_one(solver: WeightedSolver) -> None:
    losses, jacobian, _ = random_inputs(3, seed=11)
    same = torch.full((3,), 1 / 3, dtype=torch.float64)
    direction = solver(losses[[0, 0, 0]], jacobian[[0, 0, 0]], same)
    cosine = torch.nn.functional.cosine_similarity(direction.flatten(), jacobian[0].flatten(), dim=0)
    assert cosine == pytest.approx(1)


def test_dtype_and_shape_follow_the_jacobian() -> None:
    losses, jacobian, preference = random_inputs(2, seed=0)
    for dtype in (torch.float32, torch.bfloat16):
        for solver in (EPO(), HypervolumeMaximization(), TorchJD(lambda matrix: matrix.mean(dim=0))):
            direction = solver(losses.float(), jacobian.to(dtype).requires_grad_(), preference)
            assert direction.dtype == dtype
            assert not direction.requires_grad


@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "torchjd"])
@pytest.mark.parametrize("count", [2, 3, 8, 16])
def test_every_solver_reaches_the_front_of_convex_quadratics(name: str, count: int) -> None:
    rng = np.random.default_rng(count)
    centres = rng.normal(size=(count, count))
    # A point of the Pareto set, and the preference whose ray meets it; not every ray meets a front.
    target = rng.dirichlet(np.full(count, 5.0)) @ centres
    preference = 1 / ((target - centres) ** 2).sum(axis=1)
    preference /= preference.sum()
    options = {"hypervolume": {"strength": 0.0}, "stch": {"smoothing": 0.01}, "epo": {"tolerance": 1e-7}}.get(
        name
    )
    start = target + rng.normal(size=count) * 2
    rate = min(0.15 * count, 0.4) if name == "tchebycheff" else 0.15
    x, losses, gradients = descend(
        quadratic(centres), get_solver(name, options), preference, start, 1500, rate
    )
    # On the front the hull of the gradients holds 0; at the start it lies several units away.
    beta = shortest_in_hull(gradients @ gradients.T)
    assert np.linalg.norm(beta @ gradients) < 0.05
    if name == "ls":
        np.testing.assert_allclose(x, preference @ centres, atol=1e-6)
    if name in ("epo", "tchebycheff", "stch"):
        assert (preference * losses).max() / (preference * losses).min() < (1.2 if name == "stch" else 1.05)
    if name == "epo":
        np.testing.assert_allclose(x, target, atol=0.05)


FRONTS = [(fonseca, np.array([0.9, -0.3]), 0.2), (concave, np.array([0.3, 0.8, -0.6]), 0.2)]


@pytest.mark.parametrize("name", ["epo", "tchebycheff"])
@pytest.mark.parametrize(("problem", "start", "rate"), FRONTS, ids=["fonseca", "concave"])
@pytest.mark.parametrize("first", [0.15, 0.35, 0.5, 0.7])
def test_the_ray_is_met_also_where_the_front_is_concave(
    name: str, problem: Problem, start: np.ndarray, rate: float, first: float
) -> None:
    preference = np.array([first, 1 - first])
    x, losses, _ = descend(problem, get_solver(name), preference, start, steps=1500, rate=rate)
    terms = preference * losses
    assert terms.max() / terms.min() < 1.03
    if problem is fonseca:
        assert abs(x[0] - x[1]) < 0.02
        assert abs(x).max() <= 1 / np.sqrt(2) + 0.02
    else:
        assert losses[1] == pytest.approx(1 - losses[0] ** 2, abs=0.01)


@pytest.mark.parametrize(("problem", "start", "rate"), FRONTS, ids=["fonseca", "concave"])
def test_linear_scalarization_cannot_stay_on_a_concave_front(
    problem: Problem, start: np.ndarray, rate: float
) -> None:
    _, losses, _ = descend(problem, LinearScalarization(), np.array([0.5, 0.5]), start, steps=3000, rate=1.0)
    assert losses.min() < 0.05 < 0.9 < losses.max()


@pytest.mark.parametrize("name", ["stch", "cosmos"])
def test_smooth_solvers_stay_inside_a_concave_front(name: str) -> None:
    options = {"smoothing": 0.02} if name == "stch" else {"strength": 5.0}
    x, losses, _ = descend(
        fonseca, get_solver(name, options), np.array([0.5, 0.5]), np.array([0.9, -0.3]), steps=1500, rate=0.3
    )
    assert abs(x[0] - x[1]) < 0.02
    assert losses.min() > 0.4
