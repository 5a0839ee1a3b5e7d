"""Routing weights as they are given, and what multiplies the planes of a tensor."""

from __future__ import annotations

import pytest
import torch

from paretofuse.engine.routing.routers import Routers
from paretofuse.engine.routing.weights import check_one, coefficients, part_of_span, routing_of


def test_one_set_of_weights_or_several() -> None:
    routers = Routers(("g", "h"), ("a", "b", "c"))
    one, several = torch.rand(2, 3), torch.rand(4, 2, 3)
    assert torch.equal(routing_of(routers, None, one), one[None])
    assert torch.equal(routing_of(routers, None, several), several)
    for wrong in (torch.rand(3, 3), torch.rand(2, 2), torch.rand(3), torch.rand(1, 4, 2, 3)):
        with pytest.raises(ValueError, match=r"got weights of shape .*expected \[G, P\] = \[2, 3\]"):
            routing_of(routers, None, wrong)
    check_one(one[None])
    with pytest.raises(ValueError, match="got 4 preferences, expected one"):
        check_one(several)


def test_row_coefficients_are_added_to_the_groups_weight() -> None:
    weights = torch.rand(5, 2 + 7, 3)  # [K, G + R, P]
    span = slice(4, 8)
    found = coefficients(weights, 1, span)
    assert found.shape == (5, 3, 4)
    for row in range(4):
        assert torch.equal(found[..., row], weights[:, 1] + weights[:, 4 + row])
    assert torch.equal(coefficients(weights, 1, None), weights[:, 1])
    assert torch.equal(coefficients(weights[:, :2], 1, span), weights[:, 1])  # given without row coefficients
    assert part_of_span(span, 1, 3) == slice(5, 7)
    assert part_of_span(None, 1, 3) is None
