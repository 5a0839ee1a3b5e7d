"""EPO: its constraints, its balance, and preferences of zero."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from paretofuse.engine.solvers import (
    EPO,
)
from paretofuse.engine.solvers.epo import imbalance_of
from paretofuse.engine.solvers.small import shortest_in_hull
from tests.support.problems import (
    random_inputs,
    weights_of,
)


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
