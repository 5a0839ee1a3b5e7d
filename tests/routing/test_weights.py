"""Routing weights as they are given, and what multiplies the planes of a tensor."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import paretofuse as pf
from paretofuse.engine.extension import _C
from paretofuse.engine.layout import Layout, Member, Spans, TensorSpec
from paretofuse.engine.routing import routers as routers_module
from paretofuse.engine.routing import weights as weights_module
from paretofuse.engine.routing.families import FAMILIES
from paretofuse.engine.routing.routers import INITS, Routers
from paretofuse.engine.routing.weights import (
    check_one,
    coefficients,
    is_several,
    routing_at,
    routing_of,
    rows_of,
)
from tests.support.models import net_and_experts


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


def test_coefficients_of_rows_have_the_groups_weight_in_them_and_those_of_columns_follow() -> None:
    weights = torch.rand(5, 2 + 7 + 6, 3)  # [K, G + R + C, P]
    spans = Spans(1, slice(4, 8), slice(10, 13))
    found = coefficients(weights, spans)
    assert found.shape == (5, 3, 4 + 3)
    for row in range(4):
        assert torch.equal(found[..., row], weights[:, 1] + weights[:, 4 + row])
    for column in range(3):
        assert torch.equal(found[..., 4 + column], weights[:, 10 + column])
    rows = found[..., :4]
    assert torch.equal(coefficients(weights, Spans(1, slice(4, 8))), rows)  # a vector's
    assert torch.equal(coefficients(weights[:, :9], spans), rows)  # given without those of columns
    assert torch.equal(coefficients(weights[:, :2], spans), weights[:, 1])  # and without those of rows
    assert torch.equal(coefficients(weights, Spans(1)), weights[:, 1])
    assert spans.part(1, 3) == Spans(1, slice(5, 7), slice(10, 13))
    assert Spans(1).part(1, 3) == Spans(1)


def test_a_layouts_spans_are_rows_of_all_tensors_and_then_columns_of_all_matrices() -> None:
    shapes = {"a": (3, 4), "b": (3,), "c": (2, 3, 3), "d": (1, 5), "e": (0, 2)}
    specs = [TensorSpec(name, shape, "F32", "routed", name, "F32") for name, shape in shapes.items()]
    specs.insert(2, TensorSpec("fixed", (2, 2), "F32", "static", None, "F32"))
    layout = Layout(("x", "y"), tuple(specs), 0.5)
    assert layout.spans == {
        "a": Spans(0, slice(5, 8), slice(12, 16)),
        "b": Spans(1, slice(8, 9)),
        "c": Spans(2, slice(9, 11)),
        "d": Spans(3, slice(11, 12), slice(16, 21)),
        "e": Spans(4, slice(12, 12), slice(21, 23)),
    }
    assert (layout.row_count, layout.column_count) == (7, 11)


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
    counted = SimpleNamespace(Routers=lambda *given: (made.append(1), _C.Routers(*given))[1])
    monkeypatch.setattr(routers_module, "_C", counted)
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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("init", INITS)
def test_routers_on_the_host_are_the_routers(init: str, family: str) -> None:
    """One preference and several give the same bits, which are the routers' own up to the order of a sum."""
    members = (Member("p", "b", 0.5), Member("q", None, 0.0), Member("s", "b", 0.5), Member("t", "a", 1.0))
    routers = Routers(
        ["g", "h", "i"], ["a", "b", "c"], init, members=members, rows=63, columns=17, family=family
    )
    with torch.no_grad():
        for parameter in routers.parameters():
            parameter.normal_()
    preferences = torch.rand(17, 3, dtype=torch.float64).softmax(-1)
    found = routing_at(routers, preferences.numpy())
    assert found.dtype == torch.float32
    assert not found.requires_grad
    torch.testing.assert_close(found, routers(preferences).detach(), rtol=2e-7, atol=1e-7)
    for preference, row in zip(preferences, found, strict=True):
        assert torch.equal(routing_at(routers, preference.numpy()), row)


def test_a_copy_of_routers_has_its_own_on_the_host() -> None:
    routers = Routers(["g"], ["a", "b"])
    before = routing_of(routers, [0.25, 0.75], None)
    copied = copy.deepcopy(routers)
    with torch.no_grad():
        routers.output.bias.fill_(1.0)
    assert torch.equal(routing_of(copied, [0.25, 0.75], None), before)
    assert torch.equal(routing_of(routers, [0.25, 0.75], None), before + 1)


def test_the_core_refuses_arrays_that_are_no_routers() -> None:
    arrays = {
        name: parameter.detach().numpy() for name, parameter in Routers(["g"], ["a", "b"]).named_parameters()
    }
    members = [(0, 1.0), (1, 1.0)]
    for wrong in (
        {},
        arrays | {"hidden.weight": arrays["hidden.bias"]},
        arrays | {"output.bias": arrays["hidden.bias"]},
    ):
        with pytest.raises(ValueError, match="the router parameters lack"):
            _C.Routers("identity", members, wrong)
    with pytest.raises(ValueError, match="expected preferences"):
        _C.Routers("identity", members, arrays).weights(np.zeros((2, 3)))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["hidden.weight", "output.bias", "rows.weight"])
def test_routers_that_diverged_are_neither_merged_nor_stored(
    tmp_path: Path, name: str, number: float
) -> None:
    base, experts = net_and_experts(count=2)
    engine = pf.stack(base, experts, family="rows")
    engine.save(tmp_path / "s")
    sound = (tmp_path / "s" / "manifest.json").read_bytes()
    with torch.no_grad():
        engine.routers.get_parameter(name).view(-1)[-1] = number
    message = f"the router parameter '{name}' holds NaN or infinity"
    if name != "rows.weight":
        with pytest.raises(ValueError, match=message):
            engine.switch([0.5, 0.5])
    with pytest.raises(ValueError, match=message):
        engine.save(tmp_path / "s")
    assert (tmp_path / "s" / "manifest.json").read_bytes() == sound


def test_row_coefficients_are_computed_where_the_routers_are() -> None:
    routers = Routers(["g"], ["a", "b"], rows=5, family="rows")
    with torch.no_grad():
        for parameter in routers.parameters():
            parameter.normal_()
    found = routing_at(routers, np.array([0.25, 0.75]))
    assert torch.equal(found, routers([0.25, 0.75]))
    assert found.shape == (6, 2)
    assert not found.requires_grad


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(2, 3, dtype=torch.complex64), torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 3, device="meta"),
        torch.zeros(2, 3).to_sparse(), np.zeros((2, 3), dtype=complex), [[True, False, True]] * 2,
    ],
)  # fmt: skip
def test_weights_that_are_no_real_numbers(wrong: object) -> None:
    routers = Routers(("g", "h"), ("a", "b", "c"))
    with pytest.raises(TypeError, match=r"got weights that are .*, expected a dense tensor of real numbers"):
        routing_of(routers, None, wrong)
    with pytest.raises(TypeError, match="expected a dense tensor of real numbers"):
        rows_of(routers, None, wrong)  # type: ignore[arg-type]


def test_rows_take_weights_in_lists() -> None:
    routers = Routers(("g", "h"), ("a", "b", "c"))
    assert torch.equal(rows_of(routers, None, [[[0.0] * 3] * 2] * 4), torch.zeros(4, 2, 3))  # type: ignore[arg-type]


def test_a_list_of_preferences_is_several() -> None:
    routers = Routers(("g", "h"), ("a", "b"))
    grid = np.array([[0.25, 0.75], [1.0, 0.0]])
    truth = routing_of(routers, grid, None)
    several: list[object] = [
        grid.tolist(), [tuple(row) for row in grid.tolist()], [{"a": 0.25, "b": 0.75}, {"a": 1.0}],
        list(grid), list(torch.from_numpy(grid)),
    ]  # fmt: skip
    for preferences in several:
        assert torch.equal(routing_of(routers, preferences, None), truth)  # type: ignore[arg-type]
        assert is_several(preferences, None)  # type: ignore[arg-type]
    for one in ([0.25, 0.75], [torch.tensor(0.25), torch.tensor(0.75)], np.array([0.25, 0.75])):
        assert not is_several(one, None)
