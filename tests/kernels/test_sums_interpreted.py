"""Gradients of whole models by the kernels, in Triton's interpreter; `test_in_interpreter.py` runs it."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import paretofuse as pf
from paretofuse.engine.engine import Engine
from paretofuse.engine.merging import flat
from paretofuse.engine.modules import kernel_sums
from tests.support.models import perturbed

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in a child process of test_in_interpreter.py", allow_module_level=True)

R = [0.2, 0.3, 0.5]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of more than a tile are large, so that small models have both kinds."""
    monkeypatch.setattr(flat, "SMALL", 1024)


class Calls:
    """The launches of stage one: the elements of each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        true = kernel_sums.grad_partials

        def counted(grad: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            self.sizes.append(grad.numel())
            return true(grad, *args, **kwargs)

        monkeypatch.setattr(kernel_sums, "grad_partials", counted)


class Mixed(nn.Module):
    """Large and small tensors by turns, of which one half may be left out; the middle may run twice, checkpointed."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(40, 30)
        self.norm = nn.LayerNorm(30)
        self.middle = nn.Sequential(nn.Linear(30, 20), nn.GELU(), nn.Linear(20, 30))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.last = nn.Linear(30, 40)
        self.reentrant = reentrant
        self.whole = True

    def forward(self, x: Tensor) -> Tensor:
        """[B, 40] -> [B, 40] or [B, 30]."""
        x = self.norm(self.first(x))
        for _ in range(2):
            if self.reentrant is None:
                x = self.middle(x) * self.scale
            else:
                x = checkpoint(lambda y: self.middle(y) * self.scale, x, use_reentrant=self.reentrant)
        found: Tensor = self.last(x) if self.whole else x
        return found


def engines(
    planes: str = "dense", unchanged: str = "", reentrant: bool | None = None
) -> tuple[Engine, Engine]:
    """The same stack on the Triton backend and on the native one; the second expert leaves the first layer as it is."""
    torch.manual_seed(0)
    base = Mixed(reentrant)
    experts = {name: perturbed(base, seed) for seed, name in enumerate("abc")}
    experts["b"].get_submodule("first").load_state_dict(base.first.state_dict())
    if unchanged:
        experts[unchanged].load_state_dict(base.state_dict())
    triton, native = (
        pf.stack(base, experts, backend=b, planes=planes, route="tensor") for b in ("triton", "native")
    )
    return triton, native


def gradients(engine: Engine, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """By the Jacobian of two losses, and by an ordinary backward pass into the routers."""
    engine.train_at(R)
    y = engine.module(x)
    rows = engine.jacobian([y.square().mean(), y.abs().mean()])
    engine.routers.zero_grad()
    engine.train_at(R)
    engine.module(x).square().mean().backward()
    return rows, [p.grad.clone() for p in engine.routers.parameters() if p.grad is not None]


def compare(ours: Engine, truth: Engine) -> None:
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(3))
    found, expected = gradients(ours, x), gradients(truth, x)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-6)
    for mine, true in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("planes", "unchanged"), [("int8", "c"), ("int4", "")])
def test_they_equal_the_native_ones(planes: str, unchanged: str) -> None:
    compare(*engines(planes, unchanged))


def test_passes_inside_of_passes() -> None:
    compare(*engines(reentrant=True))


def test_what_no_gradient_reached_counts_as_zero() -> None:
    """And nothing is left over from the pass before, which reached all."""
    ours, truth = engines()
    compare(ours, truth)
    for engine in (ours, truth):
        engine.module.whole = False  # type: ignore[assignment]
    compare(ours, truth)


def test_small_tensors_take_one_launch_together(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = engines()
    calls = Calls(monkeypatch)
    ours.train_at(R)
    ours.module(torch.randn(5, 40)).square().mean().backward()
    # The two large weights as they come, from the last to the first; then nine small tensors, a tile each.
    assert calls.sizes == [1200, 1200, 9 * 1024]
    sums = next(iter(ours._in_place.live().collector._kernels.values()))
    assert not sums._held


def test_no_more_than_a_bound_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those behind it take a launch each, to the same bits."""
    x, calls, found = torch.randn(5, 40), Calls(monkeypatch), list[Tensor]()
    for bound in (kernel_sums.HELD, 3 * 1024):
        monkeypatch.setattr(kernel_sums, "HELD", bound)
        ours, _ = engines()
        ours.train_at(R)
        found.append(ours.jacobian([ours.module(x).square().mean()]))
    assert sorted(calls.sizes[:3]) == [1200, 1200, 9 * 1024]
    assert sorted(calls.sizes[3:]) == [20, 30, 30, 40, 600, 600, 1200, 1200, 3 * 1024]
    assert torch.equal(*found)
