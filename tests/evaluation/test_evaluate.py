"""`pf.evaluate`: means over batches, in eval mode, without gradients, the mode restored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paretofuse as pf
from tests.training.test_fit import Noisy, loss


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(n, 6, generator=generator), torch.randn(n, 1, generator=generator)) for n in (8, 8, 3)
    ]


def test_means_of_numbers_and_of_sums_with_counts() -> None:
    module, data = Noisy().eval(), batches()

    def summed(net: nn.Module, batch: Any) -> tuple[Tensor, int]:
        x, y = batch
        return (net(x) - y).square().sum(), len(x)

    found = pf.evaluate(module, {"mean": (data, loss), "exact": (data, summed)})
    each = [loss(module, batch).item() for batch in data]
    whole = loss(module, tuple(torch.cat(parts) for parts in zip(*data, strict=True))).item()
    assert found["mean"] == pytest.approx(sum(each) / 3)
    assert found["exact"] == pytest.approx(whole)
    assert found["exact"] != pytest.approx(found["mean"], rel=1e-4)
    assert pf.evaluate(module, [pf.Objective("mean", data, loss)]) == {"mean": found["mean"]}


def test_modes_and_gradients() -> None:
    module = Noisy().train()
    module.net[1].eval()
    modes = [part.training for part in module.modules()]
    seen = []

    def metric(net: nn.Module, batch: Any) -> Tensor:
        value = loss(net, batch)
        seen.append((net.training, value.requires_grad))
        return value

    first = pf.evaluate(module, {"a": (batches(), metric)})
    assert first == pf.evaluate(module, {"a": (batches(), metric)})  # no dropout
    assert seen == [(False, False)] * 6
    assert [part.training for part in module.modules()] == modes
    with pytest.raises(RuntimeError, match="broken"):
        pf.evaluate(module, {"a": (batches(), fail)})
    assert [part.training for part in module.modules()] == modes


def fail(net: nn.Module, batch: Any) -> float:
    raise RuntimeError("broken")


def test_wrong_input() -> None:
    with pytest.raises(ValueError, match="got 0 examples of 'a'"):
        pf.evaluate(Noisy(), {"a": ([], loss)})
    for wrong in ("text", torch.ones(2), (1, 2, 3), None):
        with pytest.raises(TypeError, match=r"expected one number or \(sum, count\)"):
            pf.evaluate(Noisy(), {"a": ([0], lambda net, batch, result=wrong: result)})
