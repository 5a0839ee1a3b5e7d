"""Fused training on the Triton backend, in Triton's interpreter; `test_in_interpreter.py` runs it."""

from __future__ import annotations

import os

import pytest
import torch

import paretofuse as pf
from paretofuse.engine.modules import gradient
from tests.support.models import net_and_experts

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in a child process of test_in_interpreter.py", allow_module_level=True)

R = [0.2, 0.3, 0.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_training_equals_training_through_merged_weights(dtype: torch.dtype) -> None:
    base, experts = net_and_experts()
    with torch.no_grad():
        experts["a"].second.weight.copy_(base.second.weight)  # a delta of zeros
    engine = pf.stack(base, experts, backend="triton", dtype=dtype, route="tensor")
    native = pf.stack(base, experts, backend="native", dtype=dtype, route="tensor")
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    truth = native.train_at(R)
    native.module(x).float().square().mean().backward()
    weights = engine.train_at(R, materialize=False)
    out = engine.fused_module(x)
    out.float().square().mean().backward()
    rounding = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(weights, truth)
    torch.testing.assert_close(out, native.module(x), rtol=rounding, atol=rounding)
    for ours, theirs in zip(engine.routers.parameters(), native.routers.parameters(), strict=True):
        scale = theirs.grad.abs().max().item()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=rounding, atol=rounding * scale)
    stored = dict(engine.fused_module.named_parameters())
    assert set(stored) == {"token", "first.bias", "second.bias", "norm.weight", "norm.bias"}
    merged = engine.merge(R).state_dict()
    for name, parameter in stored.items():
        assert torch.equal(parameter, merged[name]), name


def test_the_kernels_reduce_the_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient, "inner_products", None)  # calling it would fail
    base, experts = net_and_experts()
    engine = pf.stack(base, experts, backend="triton")
    x = torch.randn(6, 8)
    engine.train_at(R)
    first, second = (engine.jacobian([engine.module(x).square().mean()]) for _ in range(2))
    assert torch.equal(first, second), "the same bits every time"
    native = pf.stack(base, experts, backend="reference")
    monkeypatch.undo()
    native.train_at(R)
    expected = native.jacobian([native.module(x).square().mean()])
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-6)
    for part in x.chunk(2):  # passes add up
        engine.module(part).square().mean().backward()
        native.module(part).square().mean().backward()
    for ours, theirs in zip(engine.routers.parameters(), native.routers.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_of_preferences_equal_merged_models(dtype: torch.dtype) -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts, backend="triton", dtype=dtype, route="tensor")
    native = pf.stack(base, experts, backend="native", dtype=dtype, route="tensor")
    rows = torch.tensor([R, [1.0, 0.0, 0.0], [0.0, 0.6, 0.4]])
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = engine.batched(rows)(x)
    rounding = 1e-5 if dtype == torch.float32 else 4e-2
    for i, r in enumerate(rows):
        torch.testing.assert_close(found[i], native.merge(r)(x[i : i + 1])[0], rtol=rounding, atol=rounding)
        native.train_at(r)
        (native.module(x[i : i + 1]).float().square().mean() / 3).backward()
    found.float().square().mean().backward()
    for ours, theirs in zip(engine.routers.parameters(), native.routers.parameters(), strict=True):
        scale = theirs.grad.abs().max().item()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=10 * rounding, atol=3 * rounding * scale)
