"""Solvers, on problems whose fronts are known and on the conditions that define them.

Problems, all to be minimized over x (the place of the routing weights):
    quadratic   |x - c_m|^2; convex; the Pareto set is the hull of the centres
    fonseca     VLMOP2 (Fonseca and Fleming, 1995): concave front, Pareto set x_1 = x_2 = .. in [-1/sqrt n, 1/sqrt n]
    concave     ZDT2's shape without its box: f_2 = g (1 - (f_1 / g)^2), Pareto set g = 1
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import moocore
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

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
    solve_each,
)
from paretofuse.engine.solvers.epo import imbalance_of
from paretofuse.engine.solvers.hypervolume import hypervolume_faces
from paretofuse.engine.solvers.small import maximize_on_simplex, shortest_in_hull

Problem = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
SIZES = [1, 2, 3, 8, 16]


def quadratic(centres: np.ndarray) -> Problem:
    return lambda x: (((x - centres) ** 2).sum(axis=1), 2 * (x - centres))


def fonseca(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    centres = np.stack([np.ones_like(x), -np.ones_like(x)]) / np.sqrt(len(x))
    bell = np.exp(-((x - centres) ** 2).sum(axis=1))
    return 1 - bell, 2 * bell[:, None] * (x - centres)


def concave(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    u = 1 / (1 + np.exp(-x[0]))
    g = 1 + (x[1:] ** 2).sum()
    along = np.append(u * (1 - u), np.zeros(len(x) - 1))
    across = np.append(0.0, 2 * x[1:])
    return np.array([u, g - u**2 / g]), np.stack([along, -2 * u / g * along + (1 + u**2 / g**2) * across])


def descend(
    problem: Problem,
    solver: Solver,
    preference: np.ndarray,
    x: np.ndarray,
    steps: int = 800,
    rate: float = 0.1,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Plain gradient descent along the solver's direction, the rate falling to zero on a cosine."""
    share = torch.tensor(preference)
    for step in range(steps):
        losses, gradients = problem(x)
        direction = solver(torch.tensor(losses), torch.tensor(gradients)[:, None, :], share)[0].numpy()
        x = x - rate * 0.5 * (1 + np.cos(np.pi * step / steps)) * direction
    return (x, *problem(x))


def random_inputs(count: int, seed: int, groups: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    jacobian = rng.normal(size=(count, groups, count + 1))
    return (
        torch.tensor(rng.uniform(0.1, 2, count)),
        torch.tensor(jacobian),
        torch.tensor(rng.dirichlet(np.ones(count))),
    )


def weights_of(solver: WeightedSolver, losses: Tensor, jacobian: Tensor, preference: Tensor) -> np.ndarray:
    rows = jacobian.flatten(1).numpy()
    return solver.weights(losses.numpy(), rows @ rows.T, preference.numpy())


WEIGHTED = [
    LinearScalarization(), EPO(), Tchebycheff(), SmoothTchebycheff(), MGDA(), MGDA("gradient"), MGDA("loss"), COSMOS(),
    COSMOS(align="preference"),
]  # fmt: skip


# What holds for every solver --------------------------------------------------------------------------------------


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


# EPO --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 8, 16])
@pytest.mark.parametrize("seed", range(6))
def test_epo_meets_its_constraints_and_balances(count: int, seed: int) -> None:
    losses, jacobian, preference = random_inputs(count, seed, groups=1 + seed)
    rows = jacobian.flatten(1).numpy()
    gram = rows @ rows.T
    terms = preference.numpy() * losses.numpy()
    imbalance, anchor = imbalance_of(terms, preference.numpy())
    beta = weights_of(EPO(), losses, jacobian, preference)
    change, pull = gram @ beta, gram @ anchor
    assert imbalance > 1e-4
    assert beta.sum() == pytest.approx(1)
    size = gram.diagonal().max()
    assert change[terms.argmax()] >= -1e-8 * size  # the worst objective never ascends
    controlled = pull <= 0 if (pull > 0).any() else np.ones(count, dtype=bool)
    assert (change[controlled] >= np.minimum(pull, 0)[controlled] - 1e-8 * size).all()
    assert (
        beta @ pull >= shortest_in_hull(gram) @ pull - 1e-8 * size
    )  # at least as balancing as plain descent


@pytest.mark.parametrize("count", [2, 3, 8])
def test_epo_on_the_ray_descends_every_loss(count: int) -> None:
    _, jacobian, preference = random_inputs(count, seed=2)
    losses = 1 / preference
    rows = jacobian.flatten(1).numpy()
    change = rows @ rows.T @ weights_of(EPO(), losses, jacobian, preference)
    assert (change >= -1e-9 * abs(change).max()).all()
    assert change.max() > 0


def test_epo_zero_preferences_are_left_out() -> None:
    losses, jacobian, _ = random_inputs(4, seed=5)
    preference = torch.tensor([0.6, 0.0, 0.4, 0.0], dtype=torch.float64)
    alpha = weights_of(EPO(), losses, jacobian, preference)
    kept = [0, 2]
    np.testing.assert_allclose(alpha[kept], weights_of(EPO(), losses[kept], jacobian[kept], preference[kept]))
    assert alpha[[1, 3]].tolist() == [0, 0]


@pytest.mark.parametrize("tiny", [1e-3, 1e-6, 1e-12])
def test_epo_is_continuous_at_one_hot_preferences(tiny: float) -> None:
    losses, jacobian, _ = random_inputs(2, seed=8)
    alpha = weights_of(EPO(), losses, jacobian, torch.tensor([1 - tiny, tiny], dtype=torch.float64))
    rows = jacobian.flatten(1).numpy()
    assert (rows @ rows.T @ alpha)[0] >= 0
    assert np.isfinite(alpha).all()


def test_epo_refuses_negative_losses() -> None:
    losses, jacobian, preference = random_inputs(2, seed=0)
    with pytest.raises(ValueError, match="of objective 1, expected losses >= 0"):
        EPO()(losses * torch.tensor([1.0, -1.0]), jacobian, preference)


def test_imbalance_has_the_gradient_that_the_anchor_claims() -> None:
    rng = np.random.default_rng(0)
    preference, losses = rng.dirichlet(np.ones(5)), rng.uniform(0.5, 2, 5)
    _, anchor = imbalance_of(preference * losses, preference)
    for m in range(5):
        step = np.zeros(5)
        step[m] = 1e-6
        up, down = (imbalance_of(preference * (losses + sign * step), preference)[0] for sign in (1, -1))
        assert (up - down) / 2e-6 == pytest.approx(anchor[m] / (preference @ losses), abs=1e-8)


# The two small programs -------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 16), size=st.integers(1, 20), seed=st.integers(0, 10**6), twins=st.booleans())
def test_shortest_vector_meets_its_kkt_conditions(count: int, size: int, seed: int, twins: bool) -> None:
    vectors = np.random.default_rng(seed).normal(size=(count, size)) + 0.3
    if twins:
        vectors[-1], vectors[count // 2] = vectors[0], -vectors[0]
    gram = vectors @ vectors.T
    beta = shortest_in_hull(gram)
    product, length = gram @ beta, beta @ gram @ beta
    assert beta.sum() == pytest.approx(1)
    assert (beta >= 0).all()
    tolerance = 1e-8 * max(1.0, gram.max())
    assert (product >= length - tolerance).all()  # no vector lies nearer to 0 along the solution
    assert abs(beta * (product - length)).max() <= tolerance  # only the nearest take part


def test_shortest_vector_of_unequal_lengths() -> None:
    beta = shortest_in_hull(np.diag([1.0, 1e8]))
    assert beta[0] / beta[1] == pytest.approx(1e8)
    beta = shortest_in_hull(np.diag([1.0, 1e6, 1e6]))
    np.testing.assert_allclose(beta, np.array([1, 1e-6, 1e-6]) / (1 + 2e-6), rtol=1e-6)
    np.testing.assert_allclose(shortest_in_hull(np.zeros((3, 3))), 1 / 3)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 16])
def test_linear_program_against_highs(count: int) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(count)
    infeasible = 0
    for trial in range(40):
        vectors = rng.normal(size=(count, rng.integers(1, 20)))
        if trial % 3 == 0 and count > 1:
            vectors[1] = -vectors[0]  # degenerate: descent of one is ascent of the other
        gram = vectors @ vectors.T
        gain = gram @ rng.normal(size=count)
        bound = np.where(gain > 0, -np.inf, gain) + (0.5 * gram.max() if trial % 5 == 4 else 0.0)
        bound[rng.integers(count)] = 0.0
        kept = np.isfinite(bound)
        truth = optimize.linprog(
            -gain, A_ub=-gram[kept], b_ub=-bound[kept], A_eq=np.ones((1, count)), b_eq=[1], method="highs"
        )
        beta = maximize_on_simplex(gain, gram, bound)
        if beta is None:
            infeasible += 1
            assert truth.status == 2
            continue
        assert truth.status == 0
        assert beta.sum() == pytest.approx(1)
        assert (beta >= 0).all()
        scale = gram.max()
        assert (gram[kept] @ beta >= bound[kept] - 1e-7 * scale).all()
        assert gain @ beta == pytest.approx(-truth.fun, abs=1e-7 * max(scale, abs(gain).max()))
    assert infeasible < 20


# Tchebycheff, COSMOS, MGDA ----------------------------------------------------------------------------------------


def test_tchebycheff_follows_the_worst_and_shares_ties() -> None:
    solver = Tchebycheff(ideal=[0.5, 0.0, 0.0])
    gram, preference = np.eye(3), np.array([0.5, 0.25, 0.25])
    assert solver.weights(np.array([1.5, 1.0, 1.0]), gram, preference).tolist() == [0.5, 0, 0]
    assert solver.weights(np.array([1.0, 1.0, 1.0]), gram, preference).tolist() == pytest.approx(
        [1 / 6, 1 / 12, 1 / 12]
    )
    zero = solver.weights(np.array([0.1, 5.0, 9.0]), gram, np.array([1.0, 0.0, 0.0]))
    assert zero.tolist() == [
        1,
        0,
        0,
    ]  # objectives of preference 0 never lead, even with all others below ideal


def scalarized_gradient(value: Callable[[Tensor], Tensor], losses: Tensor) -> np.ndarray:
    point = losses.clone().requires_grad_()
    value(point).backward()
    assert point.grad is not None
    return point.grad.numpy()


@pytest.mark.parametrize("count", SIZES)
def test_smooth_tchebycheff_is_the_gradient_of_its_formula(count: int) -> None:
    losses, jacobian, r = random_inputs(count, seed=4)
    mu, ideal = 0.07, [0.05] * count
    alpha = weights_of(SmoothTchebycheff(mu, ideal), losses, jacobian, r)
    truth = scalarized_gradient(lambda l: mu * torch.logsumexp(r * (l - 0.05) / mu, dim=0), losses)  # noqa: E741
    np.testing.assert_allclose(alpha, truth, atol=1e-12)


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("align", ["inverse", "preference"])
def test_cosmos_is_the_gradient_of_its_formula(count: int, align: str) -> None:
    losses, jacobian, r = random_inputs(count, seed=9)
    ray = r if align == "preference" else 1 / r
    truth = scalarized_gradient(
        lambda l: r @ l - 0.7 * torch.nn.functional.cosine_similarity(ray, l, dim=0),  # noqa: E741
        losses,
    )
    np.testing.assert_allclose(weights_of(COSMOS(0.7, align), losses, jacobian, r), truth, atol=1e-12)  # type: ignore[arg-type]


def test_cosmos_at_a_corner_is_the_limit() -> None:
    losses, jacobian, _ = random_inputs(2, seed=1)
    corner, near = (torch.tensor([1 - t, t], dtype=torch.float64) for t in (0.0, 1e-9))
    np.testing.assert_allclose(
        weights_of(COSMOS(), losses, jacobian, corner),
        weights_of(COSMOS(), losses, jacobian, near),
        atol=1e-6,
    )


@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize("normalize", ["none", "gradient", "loss"])
def test_mgda_descends_every_loss(count: int, normalize: str) -> None:
    losses, jacobian, preference = random_inputs(count, seed=6, groups=4)
    direction = MGDA(normalize)(losses, jacobian, preference)  # type: ignore[arg-type]
    change = torch.einsum("mge,ge->m", jacobian, direction)
    assert (change >= -1e-9).all()


# Hypervolume ------------------------------------------------------------------------------------------------------


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
    grid = np.linspace(0, 1, 400)
    whole = 1.1**2 - np.trapezoid(1 - grid**2, grid)
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


@pytest.mark.parametrize("name", ["ls", "epo", "hypervolume"])
def test_solve_each_serves_both_kinds(name: str) -> None:
    losses, jacobian, preference = random_inputs(3, seed=1)
    stacked = [torch.stack([part, part]) for part in (losses, jacobian, preference)]
    solver = get_solver(name)
    directions = solve_each(solver, *stacked)
    assert directions.shape == (2, *jacobian.shape[1:])
    torch.testing.assert_close(directions[1], solver(losses, jacobian, preference))


# torchjd ----------------------------------------------------------------------------------------------------------


def test_torchjd_aggregators_by_name_and_by_object() -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    losses, jacobian, preference = random_inputs(3, seed=2)
    mean = TorchJD("Mean", preference="ignore")(losses, jacobian, preference)
    torch.testing.assert_close(mean, jacobian.mean(dim=0))
    scaled = TorchJD(aggregation.Sum())(losses, jacobian, preference)
    torch.testing.assert_close(scaled, LinearScalarization()(losses, jacobian, preference))
    vector = TorchJD("ConFIG", preference="vector")(losses, jacobian, preference)
    truth = aggregation.ConFIG(pref_vector=preference)(jacobian.flatten(1)).reshape(vector.shape)
    torch.testing.assert_close(vector, truth)
    factory = TorchJD(lambda r: aggregation.ConFIG(pref_vector=r), preference="vector")
    torch.testing.assert_close(factory(losses, jacobian, preference), truth)
    with pytest.raises(ValueError, match="expected one of torchjd's"):
        TorchJD("Meaan")
    with pytest.raises(ValueError, match="which needs arguments"):
        TorchJD("CAGrad")


@pytest.mark.parametrize(
    "name", ["AlignedMTL", "ConFIG", "GradDrop", "GradVac", "IMTLG", "MGDA", "PCGrad", "Random"]
)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_torchjd_aggregators_run(name: str, count: int) -> None:
    pytest.importorskip("torchjd.aggregation")
    losses, jacobian, preference = random_inputs(count, seed=4)
    direction = get_solver("torchjd", {"aggregator": name})(losses, jacobian, preference)
    assert direction.shape == jacobian.shape[1:]
    assert torch.isfinite(direction).all()


def test_torchjd_projections_descend_every_loss() -> None:
    pytest.importorskip("torchjd.aggregation")
    pytest.importorskip("quadprog")
    losses, jacobian, preference = random_inputs(4, seed=4)
    for solver in (TorchJD("UPGrad"), TorchJD("UPGrad", preference="vector"), TorchJD("DualProj")):
        change = torch.einsum("mge,ge->m", jacobian, solver(losses, jacobian, preference))
        assert (change >= -0.01 * change.max()).all()  # their projections are regularized


def test_torchjd_mgda_agrees_with_ours() -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    losses, jacobian, preference = random_inputs(2, seed=3)
    theirs = TorchJD(aggregation.MGDA(epsilon=1e-9, max_iters=2000), preference="ignore")
    torch.testing.assert_close(
        theirs(losses, jacobian, preference), MGDA()(losses, jacobian, preference), atol=1e-3, rtol=1e-3
    )


def test_torchjd_missing_or_misused_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    losses, jacobian, preference = random_inputs(2, seed=3)
    with pytest.raises(ValueError, match=r"expected a vector \[9\]"):
        TorchJD(lambda matrix: matrix)(losses, jacobian, preference)
    with pytest.raises(TypeError, match="expected a class name"):
        TorchJD(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got preference='both'"):
        TorchJD("Mean", preference="both")  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "torchjd.aggregation", None)
    with pytest.raises(ImportError, match=r"paretofuse\[torchjd\]"):
        TorchJD("Mean")


# Names, options, and what does not fit ----------------------------------------------------------------------------


def test_names_and_options() -> None:
    assert get_solver("epo", {"tolerance": 1e-2}) == EPO(1e-2)
    assert get_solver("ls") == LinearScalarization()
    own = LinearScalarization()
    assert get_solver(own) is own
    with pytest.raises(ValueError, match="got method 'eppo', expected one of"):
        get_solver("eppo")
    with pytest.raises(ValueError, match=r"unknown options \['tol'\].*\['tolerance'\]"):
        get_solver("epo", {"tol": 1})
    with pytest.raises(ValueError, match=r"no \['aggregator'\]"):
        get_solver("torchjd")
    with pytest.raises(ValueError, match="beside a solver"):
        get_solver(own, {"tolerance": 1})
    with pytest.raises(TypeError, match="got method of type int"):
        get_solver(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("epo", {"tolerance": -1}),
        ("stch", {"smoothing": 0}),
        ("mgda", {"normalize": "l2"}),
        ("cosmos", {"strength": float("nan")}),
        ("cosmos", {"align": "ray"}),
        ("hypervolume", {"strength": -1}),
    ],
)
def test_bad_option_values(name: str, options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"got {next(iter(options))}="):
        get_solver(name, options)


@pytest.mark.parametrize("name", ["tchebycheff", "stch"])
def test_ideal_points_of_the_wrong_length(name: str) -> None:
    with pytest.raises(ValueError, match="got ideal="):
        get_solver(name, {"ideal": [0.0]})(*random_inputs(2, seed=0))


def test_reference_of_the_wrong_length() -> None:
    with pytest.raises(ValueError, match="got reference="):
        HypervolumeMaximization(reference=[1.0])(*random_inputs(2, seed=0))


@pytest.mark.parametrize("name", ["ls", "epo", "hypervolume"])
def test_inputs_are_checked(name: str) -> None:
    solver = get_solver(name)
    losses, jacobian, preference = random_inputs(2, seed=0)
    nan = torch.tensor([1.0, float("nan")], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"expected \[M\], \[M, G, E\] and \[M\]"):
        solver(losses[:1], jacobian, preference)
    with pytest.raises(ValueError, match=r"expected \[M\], \[M, G, E\] and \[M\]"):
        solver(losses, jacobian[:, 0], preference)
    with pytest.raises(ValueError, match="got a loss of objective 1 that is not finite"):
        solver(losses * nan, jacobian, preference)
    with pytest.raises(ValueError, match="got a gradient of objective 1 that is not finite"):
        solver(losses, jacobian * nan[:, None, None], preference)
    for bad in ([0.0, 0.0], [1.5, -0.5], [float("nan"), 1.0]):
        with pytest.raises(ValueError, match="got preference"):
            solver(losses, jacobian, torch.tensor(bad, dtype=torch.float64))


def test_a_user_can_write_a_solver() -> None:
    class Worst(WeightedSolver):
        def weights(self, losses: np.ndarray, gram: np.ndarray, preference: np.ndarray) -> np.ndarray:
            return (losses == losses.max()).astype(np.float64)

    losses, jacobian, preference = random_inputs(3, seed=0)
    solver = get_solver(Worst())
    torch.testing.assert_close(solver(losses, jacobian, preference), jacobian[int(losses.argmax())])


def test_the_guide_names_every_solver_and_its_example_runs() -> None:
    text = (Path(__file__).parents[2] / "docs" / "solvers.md").read_text(encoding="utf-8")
    headings = [line[3:].split(":")[0] for line in text.splitlines() if line.startswith("## ")]
    assert sorted(headings) == sorted([*SOLVERS, "Your own"])
    example = text.split("```python\n")[1].split("```")[0]
    exec(compile(example, "docs/solvers.md", "exec"), {"__name__": "guide"})
