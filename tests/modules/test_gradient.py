"""Gradients of the routing weights by hooks, against autograd through an explicit merge in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import paretofuse as pf
from paretofuse.engine.engine import Engine
from tests.support.models import Net, net_and_experts, perturbed, tiny_gpt2

R = [0.2, 0.3, 0.5]


def truth(
    base: nn.Module,
    experts: dict[str, nn.Module],
    engine: Engine,
    loss: Callable[[Callable[..., Tensor]], Tensor],
) -> Tensor:
    """dLoss/dL [G, E] by plain autograd through base + L * delta, in float64."""
    weights = engine.routers(R).detach().double().requires_grad_()
    rows = {group: i for i, group in enumerate(engine.groups)}
    model = copy.deepcopy(base).double()
    starts = {k: v.double() for k, v in base.state_dict(keep_vars=True).items() if v.is_floating_point()}
    merged = {}
    for name, group in engine.tensor_groups.items():
        start = starts[name].detach()
        parts = [e.state_dict()[name].double() - start for e in experts.values()]
        merged[name] = start + sum(weights[rows[group], i] * d for i, d in enumerate(parts))
    loss(lambda *args: functional_call(model, merged, args, tie_weights=True)).backward()
    assert weights.grad is not None
    return weights.grad


def check(
    engine: Engine, expected: Tensor, loss: Callable[[Callable[..., Tensor]], Tensor], rtol: float = 1e-4
) -> None:
    """Jacobian and router gradients both agree with the expected dLoss/dL."""
    engine.train_at(R)
    jacobian = engine.jacobian([loss(engine.module)])
    assert jacobian.dtype == torch.float64
    scale = expected.abs().max().item()
    torch.testing.assert_close(jacobian[0], expected, rtol=rtol, atol=rtol * scale)
    assert all(p.grad is None for p in engine.module.parameters())
    assert all(p.grad is None for p in engine.routers.parameters())
    engine.train_at(R)
    loss(engine.module).backward()
    ours = [p.grad.clone() for p in engine.routers.parameters()]
    engine.routers.zero_grad()
    engine.routers(R).backward(expected.float())
    for mine, p in zip(ours, engine.routers.parameters(), strict=True):
        torch.testing.assert_close(mine, p.grad, rtol=rtol, atol=rtol * scale)
    assert sum(g.abs().sum() for g in ours) > 0


def random_routers(engine: Engine, seed: int = 0) -> None:
    """Routers away from their start, so that all their gradients matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in engine.routers.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("route", ["module", "tensor"])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_plain_module(seed: int, route: str, backend: str) -> None:
    base, experts = net_and_experts(seed)
    # The running statistics are no parameters: they follow L, but have no gradient.

    # The running statistics are no parameters: they follow L, but have no gradient.
    def groups(name: str) -> str | None:
        return None if "running" in name else name if route == "tensor" else name.split(".")[0]

    engine = pf.stack(base, experts, route=groups, static_weight=0.0, backend=backend)
    random_routers(engine)
    x = torch.randn(7, 8, generator=torch.Generator().manual_seed(seed))
    expected = truth(base, experts, engine, lambda m: m(x.double()).square().mean())
    check(engine, expected, lambda m: m(x).square().mean())


def test_gpt2_in_train_mode_with_tied_weights() -> None:
    base = tiny_gpt2()
    base.config.resid_pdrop = 0.0
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    experts = {name: perturbed(base, i, 0.02) for i, name in enumerate("abc")}
    engine = pf.stack(base, experts)
    random_routers(engine)
    engine.module.train()
    ids = torch.randint(0, 101, (2, 12), generator=torch.Generator().manual_seed(0))

    def loss(model: Callable[..., Tensor]) -> Tensor:
        logits = model(ids).logits
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    check(engine, truth(base, experts, engine, loss), loss, rtol=1e-3)


class Twice(nn.Module):
    """A layer used twice, under checkpointing or not."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.reentrant: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            if self.reentrant is None:
                x = torch.tanh(self.layer(x))
            else:
                x = checkpoint(lambda y: torch.tanh(self.layer(y)), x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_parameters_used_twice_and_checkpointing(reentrant: bool | None) -> None:
    torch.manual_seed(0)
    base = Twice()
    experts = {name: perturbed(base, i) for i, name in enumerate("abc")}
    engine = pf.stack(base, experts)
    random_routers(engine)
    x = torch.randn(5, 6)
    expected = truth(base, experts, engine, lambda m: m(x.double()).square().mean())
    engine.module.reentrant = reentrant
    inputs = x.clone().requires_grad_()  # reentrant checkpointing needs an input that requires gradients
    check(engine, expected, lambda m: m(inputs).square().mean())


def test_backward_passes_add_up() -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts)
    random_routers(engine)
    x = torch.randn(6, 8)
    engine.train_at(R)
    engine.module(x).square().mean().backward()
    whole = [p.grad.clone() for p in engine.routers.parameters()]
    engine.routers.zero_grad()
    engine.train_at(R)
    for part in x.chunk(3):
        (engine.module(part).square().mean() / 3).backward()
    for p, expected in zip(engine.routers.parameters(), whole, strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-4, atol=1e-6)


def test_several_losses_of_one_graph() -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts)
    x = torch.randn(6, 8)
    engine.train_at(R)
    out = engine.module(x)
    together = engine.jacobian([out.square().mean(), out.abs().sum()])
    engine.train_at(R)
    apart = [
        engine.jacobian([f(engine.module(x))])[0]
        for f in (lambda y: y.square().mean(), lambda y: y.abs().sum())
    ]
    torch.testing.assert_close(together, torch.stack(apart))


def test_bf16_autocast() -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts)
    x = torch.randn(64, 8)
    # Two preferences inside one autocast region: its weight cache must not serve the first one's.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        engine.train_at([1.0, 0.0, 0.0])
        first = engine.module(x)
        engine.jacobian([first.float().square().mean()])
        engine.train_at(R)
        out = engine.module(x)
        jacobian = engine.jacobian([out.float().square().mean()])[0]
    engine.train_at(R)
    exact = engine.jacobian([engine.module(x).square().mean()])[0]
    assert not torch.equal(first, out)
    assert (jacobian - exact).norm() < 0.05 * exact.norm()


def test_bf16_model() -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts, dtype=torch.bfloat16)
    full = pf.stack(base, experts)
    x = torch.randn(64, 8)
    engine.train_at(R)
    full.train_at(R)
    half = engine.jacobian([engine.module(x.bfloat16()).float().square().mean()])[0]
    exact = full.jacobian([full.module(x).square().mean()])[0]
    assert (half - exact).norm() < 0.1 * exact.norm()


def test_a_switch_between_forward_and_backward_is_an_error() -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts)
    engine.train_at(R)
    loss = engine.module(torch.randn(3, 8)).square().mean()
    engine.switch([1.0, 0.0, 0.0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_switch_after_training_records_no_graph() -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts)
    engine.train_at(R)
    engine.switch(R)
    assert not engine.module(torch.randn(3, 8)).requires_grad
    with pytest.raises(ValueError, match=r"after engine\.train_at"):
        engine.jacobian([engine.module(torch.randn(3, 8)).sum()])


def test_unused_and_unchanged_parameters() -> None:
    base, experts = net_and_experts()
    with torch.no_grad():
        for expert in experts.values():
            expert.get_parameter("second.weight").copy_(base.second.weight)
    engine = pf.stack(base, experts, route="tensor")
    engine.train_at(R)
    row = engine.groups.index("second.weight")
    jacobian = engine.jacobian([engine.module.first(torch.randn(3, 8)).sum()])[0]
    assert torch.equal(jacobian[row], torch.zeros(3, dtype=torch.float64))
    assert jacobian[engine.groups.index("first.weight")].abs().min() > 0
    assert jacobian[engine.groups.index("token")].abs().max() == 0


def test_memory_holds_one_gradient_at_a_time() -> None:
    """Never more than one parameter's gradient is alive when a hook has run."""
    base, experts = net_and_experts()
    engine = pf.stack(base, experts)
    engine.train_at(R)
    alive = []
    for parameter in engine.module.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.grad is not None for p in engine.module.parameters()))
        )
    engine.module(torch.randn(3, 8)).sum().backward()
    assert len(alive) >= 6
    assert max(alive) == 0


def test_frozen_static_parameters_have_no_gradient() -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts, route=lambda name: "g" if name.startswith("first") else None)
    engine.train_at(R)
    required = {name for name, p in engine.module.named_parameters() if p.requires_grad}
    assert required == {"first.weight", "first.bias"}
    assert isinstance(engine.module, Net)


class FailingError(Exception):
    """Stands for anything that ends a backward pass in its middle."""


class Fail(torch.autograd.Function):
    """Passes its input on, and fails in the backward pass."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:  # type: ignore[override]
        raise FailingError


class HalfWay(nn.Module):
    """Two layers, between which the backward pass may fail once the second has its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.fails = nn.Linear(3, 4), nn.Linear(4, 2), False

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.second(Fail.apply(hidden) if self.fails else hidden)


@pytest.mark.parametrize("materialize", [True, False])
@pytest.mark.parametrize("reentrant", [None, True])
def test_a_failed_backward_leaves_the_next_ones_gradients_as_they_are(
    materialize: bool, reentrant: bool | None
) -> None:
    """The router step of a failed pass never came, and then no pass of the same merge had one any more."""
    torch.manual_seed(0)
    base = HalfWay()
    engine = pf.stack(base, {name: perturbed(base, i) for i, name in enumerate("abc")})
    x = torch.randn(5, 3).requires_grad_()
    module = engine.module if materialize else engine.fused_module

    def gradients(*failing: bool) -> list[Tensor]:
        engine.routers.zero_grad()
        engine.train_at(R, materialize=materialize)
        for fails in failing:
            module.fails = fails
            output = module(x) if reentrant is None else checkpoint(module, x, use_reentrant=reentrant)
            if fails:
                with pytest.raises(FailingError):
                    output.square().sum().backward()
            else:
                output.square().sum().backward()
        return [p.grad.clone() for p in engine.routers.parameters() if p.grad is not None]

    expected = gradients(False)
    assert sum(g.abs().sum() for g in expected) > 0
    for failing in ((True, False), (True, True, False), (False, True)):
        found = gradients(*failing)
        assert len(found) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    engine.train_at(R, materialize=materialize)
    module.fails = True
    with pytest.raises(FailingError):
        engine.jacobian([module(x).square().sum()])
    module.fails = False
    jacobian = engine.jacobian([module(x).square().sum()])
    engine.train_at(R, materialize=materialize)
    assert torch.equal(engine.jacobian([module(x).square().sum()]), jacobian)


def test_a_loss_of_no_routed_weight_has_no_jacobian() -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts)
    engine.train_at(R)
    used = sum(p.square().sum() for p in engine.module.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="loss 1 depends on no routed weight"):
        engine.jacobian([used, torch.ones((), requires_grad=True) * 2])


def test_losses_that_are_no_scalars_of_the_live_module_are_named() -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts)
    engine.train_at(R)
    out = engine.module(torch.randn(6, 8))
    for wrong, words in (
        (out, r"loss 1 has shape \[6, 8\] and requires_grad=True"),
        (out.detach().sum(), r"loss 1 has shape \[\] and requires_grad=False"),
    ):
        with pytest.raises(ValueError, match=words):
            engine.jacobian([out.sum(), wrong])
    with pytest.raises(TypeError, match="loss 1 is a float, expected a scalar tensor"):
        engine.jacobian([out.sum(), 1.0])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="no losses"):
        engine.jacobian([])
