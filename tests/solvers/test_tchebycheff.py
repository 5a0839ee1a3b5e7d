"""Tchebycheff and its smooth form: the worst, ties, the formula's gradient, ideal points."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from paretofuse.engine.solvers import (
    SmoothTchebycheff,
    Tchebycheff,
    get_solver,
)
from tests.support.problems import (
    SIZES,
    random_inputs,
    scalarized_gradient,
    weights_of,
)


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


@pytest.mark.parametrize("count", SIZES)
def test_smooth_tchebycheff_is_the_gradient_of_its_formula(count: int) -> None:
    losses, jacobian, r = random_inputs(count, seed=4)
    mu, ideal = 0.07, [0.05] * count
    alpha = weights_of(SmoothTchebycheff(mu, ideal), losses, jacobian, r)
    truth = scalarized_gradient(lambda l: mu * torch.logsumexp(r * (l - 0.05) / mu, dim=0), losses)  # noqa: E741
    np.testing.assert_allclose(alpha, truth, atol=1e-12)


@pytest.mark.parametrize("name", ["tchebycheff", "stch"])
def test_ideal_points_of_the_wrong_length(name: str) -> None:
    with pytest.raises(ValueError, match="got ideal="):
        get_solver(name, {"ideal": [0.0]})(*random_inputs(2, seed=0))
