"""Routing weights as they are given, and what multiplies the planes of a tensor."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from paretofuse.engine.layout import Member
from paretofuse.engine.routing import weights as weights_module
from paretofuse.engine.routing.host import HostRouters
from paretofuse.engine.routing.routers import INITS, Routers
from paretofuse.engine.routing.weights import check_one, coefficients, part_of_span, routing_at, routing_of


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


class Elsewhere:
    """A device that is told to be another one: what matters is what is computed where, and how it is sent."""

    type = "cuda"


@pytest.fixture
def asked_to_pin(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], str]]:
    """Shape and device of what a GPU is asked to fetch."""
    found: list[tuple[list[int], str]] = []

    def pin(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        found.append((list(tensor.shape), device.type))
        return tensor

    monkeypatch.setattr(weights_module, "pinned", pin)
    return found


class OnGpu(torch.Tensor):
    """A parameter that says it is on a GPU."""

    @property
    def device(self):  # type: ignore[no-untyped-def]
        return Elsewhere()


def test_a_gpu_is_given_finished_weights(
    asked_to_pin: list[tuple[list[int], str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The routers are read once, and again after they changed; weights are computed on the host."""
    routers = Routers(["g", "h"], ["a", "b"])
    made = []
    init = HostRouters.__init__
    monkeypatch.setattr(HostRouters, "__init__", lambda self, *a: (made.append(1), init(self, *a))[1])
    with torch.no_grad():
        routers.output.weight.normal_()
        routers.output.bias.normal_()
    truth = routers([0.25, 0.75]).detach()
    routers.output.bias = torch.nn.Parameter(routers.output.bias.detach().as_subclass(OnGpu))
    for _ in range(3):
        torch.testing.assert_close(routing_at(routers, np.array([0.25, 0.75])), truth, rtol=2e-7, atol=1e-9)
    assert len(made) == 1
    with torch.no_grad():
        routers.output.bias.add_(1.0)
    torch.testing.assert_close(routing_at(routers, np.array([0.25, 0.75])), truth + 1)
    assert len(made) == 2
    assert asked_to_pin == [([2, 2], "cuda")] * 4


@pytest.mark.parametrize("init", INITS)
def test_routers_on_the_host_are_the_routers(init: str) -> None:
    members = (Member("p", "b", 0.5), Member("q", None, 0.0), Member("s", "b", 0.5), Member("t", "a", 1.0))
    routers = Routers(["g", "h", "i"], ["a", "b", "c"], init, members=members)
    with torch.no_grad():
        for parameter in routers.parameters():
            parameter.normal_()
    preference = torch.rand(3, dtype=torch.float64).softmax(0)
    found = torch.from_numpy(routers.on_host()(preference.numpy()))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, routers(preference).detach(), rtol=2e-7, atol=1e-7)


def test_row_coefficients_are_computed_where_the_routers_are() -> None:
    routers = Routers(["g"], ["a", "b"], rows=5, family="rows")
    with torch.no_grad():
        for parameter in routers.parameters():
            parameter.normal_()
    found = routing_at(routers, np.array([0.25, 0.75]))
    assert torch.equal(found, routers([0.25, 0.75]))
    assert found.shape == (6, 2)
    assert not found.requires_grad
