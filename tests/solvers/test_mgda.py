"""MGDA: every loss descends, however gradients are scaled."""

from __future__ import annotations

import pytest
import torch

from paretofuse.engine.solvers import (
    MGDA,
)
from tests.support.problems import (
    random_inputs,
)


@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize("normalize", ["none", "gradient", "loss"])
def test_mgda_descends_every_loss(count: int, normalize: str) -> None:
    losses, jacobian, preference = random_inputs(count, seed=6, groups=4)
    direction = MGDA(normalize)(losses, jacobian, preference)  # type: ignore[arg-type]
    change = torch.einsum("mge,ge->m", jacobian, direction)
    assert (change >= -1e-9).all()
