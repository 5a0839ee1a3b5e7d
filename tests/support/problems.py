"""Multi-objective problems whose fronts are known, and what the solvers' tests share.

All are to be minimized over x (the place of the routing weights):
    quadratic   |x - c_m|^2; convex; the Pareto set is the hull of the centres
    fonseca     VLMOP2 (Fonseca and Fleming, 1995): concave front, Pareto set x_1 = x_2 = .. in [-1/sqrt n, 1/sqrt n]
    concave     ZDT2's shape without its box: f_2 = g (1 - (f_1 / g)^2), Pareto set g = 1
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from paretofuse.engine.solvers import (
    Solver,
    WeightedSolver,
)

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


def scalarized_gradient(value: Callable[[Tensor], Tensor], losses: Tensor) -> np.ndarray:
    point = losses.clone().requires_grad_()
    value(point).backward()
    assert point.grad is not None
    return point.grad.numpy()
