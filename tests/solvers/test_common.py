"""What solvers share: inputs that are checked, several preferences at once, solvers of users."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from paretofuse.engine.solvers import (
    WeightedSolver,
    get_solver,
    solve_each,
)
from tests.support.problems import (
    random_inputs,
)


@pytest.mark.parametrize("name", ["ls", "epo", "hypervolume"])
def test_solve_each_serves_both_kinds(name: str) -> None:
    losses, jacobian, preference = random_inputs(3, seed=1)
    stacked = [torch.stack([part, part]) for part in (losses, jacobian, preference)]
    solver = get_solver(name)
    directions = solve_each(solver, *stacked)
    assert directions.shape == (2, *jacobian.shape[1:])
    torch.testing.assert_close(directions[1], solver(losses, jacobian, preference))


@pytest.mark.parametrize("name", ["ls", "epo", "hypervolume"])
def test_inputs_are_checked(name: str) -> None:
    solver = get_solver(name)
    losses, jacobian, preference = random_inputs(2, seed=0)
    nan = torch.tensor([1.0, float("nan")], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"expected \[M\], \[M, G, P\] and \[M\]"):
        solver(losses[:1], jacobian, preference)
    with pytest.raises(ValueError, match=r"expected \[M\], \[M, G, P\] and \[M\]"):
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
