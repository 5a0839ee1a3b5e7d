"""COSMOS: the gradient of its formula, and its limit at a corner."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from paretofuse.engine.solvers import (
    COSMOS,
)
from tests.support.problems import (
    SIZES,
    random_inputs,
    scalarized_gradient,
    weights_of,
)


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
