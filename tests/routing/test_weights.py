"""Routing weights as they are given, and what multiplies the planes of a tensor."""

from __future__ import annotations

import pytest
import torch

from paretofuse.engine.routing import weights as weights_module
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


class Elsewhere:
    """A device that is told to be another one: what matters is what is computed where, and how it is sent."""

    type = "cuda"


def test_weights_are_computed_on_the_host_and_sent_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Routers on a GPU are copied once, and again after they changed; the GPU is sent finished weights alone."""
    routers = Routers(["g", "h"], ["a", "b"])
    made, sent = [], []

    class OnGpu(torch.Tensor):
        """A parameter that says it is on a GPU."""

        @property
        def device(self):  # type: ignore[no-untyped-def]
            return Elsewhere()

    def send(routing: torch.Tensor, device: object) -> torch.Tensor:
        sent.append((routing.device.type, device.type))
        return routing

    init = Routers.__init__
    monkeypatch.setattr(weights_module, "sent", send)
    monkeypatch.setattr(Routers, "__init__", lambda self, *a, **k: (made.append(1), init(self, *a, **k))[1])
    with torch.no_grad():
        routers.output.bias.normal_()
    truth = routers([0.25, 0.75]).detach()
    routers.output.bias = torch.nn.Parameter(routers.output.bias.detach().as_subclass(OnGpu))
    for _ in range(3):
        assert torch.equal(routing_of(routers, [0.25, 0.75], None)[0], truth)
    assert len(made) == 1
    with torch.no_grad():
        routers.output.bias.add_(1.0)
    torch.testing.assert_close(routing_of(routers, [0.25, 0.75], None)[0], truth + 1)
    assert len(made) == 2
    assert sent == [("cpu", "cuda")] * 4
