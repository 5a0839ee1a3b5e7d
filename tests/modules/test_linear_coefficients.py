"""Coefficients of rows and columns through every kind of module, against a merge and plain autograd in float64:

W[i, k] = W0[i, k] + sum_j (L[g, j] + sum_m r_m (S[m, j, i] + T[m, j, k])) D_j[i, k]        T of matrices alone
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import paretofuse as pf
from paretofuse.engine.engine import Engine
from tests.support.models import net_and_experts, perturbed, same, tiny_gpt2

R = [0.2, 0.3, 0.5]
Call = Callable[..., Tensor]
FAMILY = pytest.mark.parametrize("family", ["rows", "rows+columns"])


def learned(engine: Engine, seed: int = 0) -> Engine:
    """All routers away from their start, coefficients of rows and columns too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in engine.routers.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return engine


def true_coefficients(engine: Engine, r: list[float]) -> list[Tensor]:
    """L(r) [G, E], S [M, E, R] and, where columns have some, T [M, E, C], in float64, leaves."""
    groups = len(engine.groups)
    own = [linear.weight for linear in engine.routers.linear]
    assert own
    return [t.detach().double().requires_grad_() for t in (engine.routers(r)[:groups], *own)]


def true_weights(
    engine: Engine,
    base: nn.Module,
    experts: dict[str, nn.Module],
    r: list[float],
    L: Tensor,
    S: Tensor,
    T: Tensor | None = None,
) -> dict[str, Tensor]:
    """Every routed tensor by the formula, row by row and column by column, in float64."""
    start, merged, row, column = base.state_dict(), {}, 0, 0
    groups = {group: i for i, group in enumerate(engine.groups)}
    for spec in engine.layout.with_role("routed"):
        first = start[spec.name].double()
        flat = first.reshape(spec.shape[0] if len(spec.shape) > 1 else 1, -1)
        total = flat
        for e, expert in enumerate(experts.values()):
            delta = (expert.state_dict()[spec.name].double() - first).reshape(flat.shape)
            own = sum(share * S[m, e, row : row + len(flat)] for m, share in enumerate(r))
            weight = (L[groups[str(spec.group)], e] + own).unsqueeze(1)
            if T is not None and len(spec.shape) == 2:
                weight = weight + sum(
                    share * T[m, e, column : column + flat.shape[1]] for m, share in enumerate(r)
                )
            total = total + weight * delta
        merged[spec.name] = total.reshape(spec.shape)
        row += len(flat)
        column += flat.shape[1] if len(spec.shape) == 2 else 0
    return merged


def gradients(
    engine: Engine, base: nn.Module, experts: dict[str, nn.Module], loss: Callable[[Call], Tensor]
) -> list[Tensor]:
    """dLoss/dL, dLoss/dS and, where columns have coefficients, dLoss/dT in float64."""
    leaves = true_coefficients(engine, R)
    model = copy.deepcopy(base).double()
    weights = true_weights(engine, base, experts, R, *leaves)
    loss(lambda *args: functional_call(model, weights, args, tie_weights=True)).backward()
    assert all(leaf.grad is not None for leaf in leaves)
    return [leaf.grad for leaf in leaves]


def check_training(
    engine: Engine,
    base: nn.Module,
    experts: dict[str, nn.Module],
    loss: Callable[[Call], Tensor],
    exact_loss: Callable[[Call], Tensor],
    *,
    materialize: bool,
    rtol: float = 1e-4,
) -> None:
    """The Jacobian and the gradients of S and T agree with float64; the other routers' follow from dL."""
    exact_l, *exact = gradients(engine, base, experts, exact_loss)
    groups = len(engine.groups)
    weights = engine.train_at(R, materialize=materialize)
    module = engine.module if materialize else engine.fused_module
    jacobian = engine.jacobian([loss(module)])
    assert jacobian.shape == (1, *weights.shape)
    torch.testing.assert_close(
        jacobian[0, :groups], exact_l, rtol=rtol, atol=rtol * exact_l.abs().max().item()
    )
    # dS[m, e, i] = r_m dS(r)[i, e], and so for T
    own = torch.einsum("m,ie->mei", torch.tensor(R, dtype=torch.float64), jacobian[0, groups:])
    parts = own.split([e.shape[2] for e in exact], 2)
    engine.train_at(R, materialize=materialize)
    loss(module).backward()
    for part, linear, true in zip(parts, engine.routers.linear, exact, strict=True):
        found = linear.weight.grad
        assert found is not None
        for ours in (part, found.double()):
            torch.testing.assert_close(ours, true, rtol=rtol, atol=rtol * true.abs().max().item())
    ours = [p.grad.clone() for p in engine.routers.parameters()]
    engine.routers.zero_grad()
    engine.routers(R)[:groups].backward(exact_l.float())
    for mine, parameter in list(zip(ours, engine.routers.parameters(), strict=True))[:4]:
        scale = rtol * exact_l.abs().max().item()
        torch.testing.assert_close(mine, parameter.grad, rtol=rtol, atol=scale)


@FAMILY
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("planes", ["dense", "bf16"])
def test_merges_are_the_formula(backend: str, planes: str, family: str) -> None:
    base, experts = net_and_experts()
    engine = learned(pf.stack(base, experts, route="tensor", family=family, backend=backend, planes=planes))
    exact = true_weights(engine, base, experts, R, *true_coefficients(engine, R))
    slack = 1e-6 if planes == "dense" else 4e-3
    engine.switch(R)
    for state in (engine.merge(R).state_dict(), engine.merge_state_dict(R), engine.module.state_dict()):
        for name, tensor in exact.items():
            assert (state[name].double() - tensor).abs().max() <= slack * tensor.abs().max(), name
    several = engine.merge(torch.tensor([R, [1.0, 0.0, 0.0]], dtype=torch.float64))
    assert same(several[0], engine.module)
    weights = engine.routers(R)
    assert same(engine.merge(weights=weights), engine.module)
    with engine.replica(R) as replica:
        assert same(replica, engine.module)
    for width in engine.routers.widths[:-1]:
        coarser = engine.merge(weights=weights[:width])
        assert not same(coarser, engine.module), "weights without coefficients of rows or columns have none"
    exact = true_weights(engine, base, experts, R, *true_coefficients(engine, R)[:2])
    coarser = engine.merge_state_dict(weights=weights[: engine.routers.widths[1]])
    for name, tensor in exact.items():
        assert (coarser[name].double() - tensor).abs().max() <= slack * tensor.abs().max(), name


@FAMILY
@pytest.mark.parametrize("materialize", [True, False])
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("route", ["module", "tensor"])
def test_gradients_of_a_plain_module(backend: str, route: str, materialize: bool, family: str) -> None:
    base, experts = net_and_experts()

    def groups(name: str) -> str | None:
        return None if "running" in name else name if route == "tensor" else name.split(".")[0]

    engine = pf.stack(base, experts, route=groups, static_weight=0.0, backend=backend, family=family)
    learned(engine)
    x = torch.randn(7, 8, generator=torch.Generator().manual_seed(1))
    check_training(
        engine, base, experts, lambda m: m(x).square().mean(), lambda m: m(x.double()).square().mean(),
        materialize=materialize,
    )  # fmt: skip


@FAMILY
@pytest.mark.filterwarnings("ignore::FutureWarning")  # an old name, known to every transformers 5
@pytest.mark.parametrize("materialize", [True, False])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_gradients_of_gpt2_whose_conv1d_rows_are_inputs(backend: str, materialize: bool, family: str) -> None:
    base = tiny_gpt2()
    experts = {name: perturbed(base, i, 0.02) for i, name in enumerate("abc")}
    engine = learned(pf.stack(base, experts, family=family, backend=backend))
    ids = torch.randint(0, 101, (2, 12), generator=torch.Generator().manual_seed(0))

    def loss(model: Call) -> Tensor:
        logits = model(ids).logits
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    check_training(engine, base, experts, loss, loss, materialize=materialize, rtol=1e-3)


class Attention(nn.Module):
    """Self-attention, whose input projection is split into parts, a convolution and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mix = nn.Conv1d(8, 6, 3, padding=1)
        self.out = nn.Linear(6, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        query = x.flip(1)
        x = x + self.attend(query, x, x, need_weights=False)[0]
        return self.out(torch.tanh(self.mix(x.mT)).mT)


@FAMILY
@pytest.mark.parametrize("materialize", [True, False])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_gradients_of_attention_convolution_and_embedding(
    backend: str, materialize: bool, family: str
) -> None:
    torch.manual_seed(0)
    base = Attention()
    experts = {name: perturbed(base, i) for i, name in enumerate("abc")}
    engine = learned(pf.stack(base, experts, family=family, backend=backend))
    ids = torch.randint(0, 11, (3, 5))

    def loss(model: Call) -> Tensor:
        return model(ids).square().mean()

    check_training(engine, base, experts, loss, loss, materialize=materialize)


@FAMILY
@pytest.mark.parametrize("planes", ["int8", "int4", "lowrank:2", "auto"])
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("materialize", [True, False])
def test_planes_of_every_format(planes: str, backend: str, materialize: bool, family: str) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 32))
    experts = {name: perturbed(base, i) for i, name in enumerate("abc")}
    engine = learned(pf.stack(base, experts, family=family, planes=planes, backend=backend))
    x = torch.randn(5, 64)
    # The experts that these planes stand for.
    held = {name: copy.deepcopy(base) for name in experts}
    with torch.no_grad():
        for own, expert in zip(engine._stack.planes, held.values(), strict=True):
            for name, tensor in expert.state_dict().items():
                tensor.copy_(tensor.double() + own[name].decode().double())
    exact = true_weights(engine, base, held, R, *true_coefficients(engine, R))
    merged = engine.merge_state_dict(R)
    for name, tensor in exact.items():
        assert (merged[name].double() - tensor).abs().max() <= 1e-5 * tensor.abs().max()
    check_training(
        engine, base, held, lambda m: m(x).square().mean(), lambda m: m(x.double()).square().mean(),
        materialize=materialize, rtol=1e-3,
    )  # fmt: skip


def preferences(count: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).dirichlet(np.ones(3), count))


def models() -> list[tuple[str, Callable[[], nn.Module], Tensor, dict[str, Any]]]:
    return [
        ("net", lambda: net_and_experts()[0], torch.randn(4, 1, 8), {"isolate": True}),
        ("attention", Attention, torch.randint(0, 11, (4, 5)), {}),
        ("isolated attention", Attention, torch.randint(0, 11, (4, 5)), {"isolate": True}),
        ("gpt2", tiny_gpt2, torch.randint(0, 101, (4, 7)), {}),
    ]


@FAMILY
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:There is a performance drop")
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("planes", ["dense", "lowrank:3"])
@pytest.mark.parametrize(("name", "make", "x", "options"), models(), ids=[m[0] for m in models()])
def test_each_row_of_a_batch_is_its_own_model(
    name: str,
    make: Callable[[], nn.Module],
    x: Tensor,
    options: dict[str, Any],
    backend: str,
    planes: str,
    family: str,
) -> None:
    torch.manual_seed(0)
    base = make().eval()
    experts = {key: perturbed(base, i, 0.05) for i, key in enumerate("abc")}
    engine = learned(pf.stack(base, experts, family=family, backend=backend, planes=planes))
    rays = preferences(len(x))
    module = engine.batched(rays, **options).eval()

    def output(model: nn.Module, inputs: Tensor) -> Tensor:
        if name == "net":
            return model(inputs.squeeze(1))
        result = model(inputs, use_cache=False) if name == "gpt2" else model(inputs)
        return getattr(result, "logits", result)

    batch = output(module, x)
    batch.square().mean().backward()
    got = [linear.weight.grad for linear in engine.routers.linear]
    expected = [torch.zeros_like(linear.weight) for linear in engine.routers.linear]
    for row, ray in enumerate(rays):
        merged = engine.merge(ray).eval()
        alone = output(merged, x[row : row + 1])
        torch.testing.assert_close(batch[row : row + 1], alone, rtol=1e-4, atol=1e-5)
        engine.routers.zero_grad()
        engine.train_at(ray)
        (output(engine.module.eval(), x[row : row + 1]).square().mean() / len(x)).backward()
        for total, linear in zip(expected, engine.routers.linear, strict=True):
            assert linear.weight.grad is not None
            total += linear.weight.grad
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())
    one = engine.batched(rays[:1]).eval() if not options else None
    if one is not None:
        torch.testing.assert_close(output(one, x[:1]), batch[:1], rtol=1e-4, atol=1e-5)


@FAMILY
def test_zero_row_coefficients_change_no_bit(family: str) -> None:
    base, experts = net_and_experts()
    scalar, rows = pf.stack(base, experts), pf.stack(base, experts, family=family)
    assert same(scalar.merge(R), rows.merge(R))
    x = torch.randn(5, 8)
    scalar.train_at(R)
    rows.train_at(R)
    pairs = zip(
        scalar.jacobian([scalar.module(x).square().mean()])[0],
        rows.jacobian([rows.module(x).square().mean()])[0],
        strict=False,
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=1e-9)


def test_the_family_of_an_engine_can_be_changed_at_any_time() -> None:
    base, experts = net_and_experts()
    engine = learned(pf.stack(base, experts, route="tensor"))
    assert "family='scalar'" in repr(engine)
    module, fused = engine.module, engine.fused_module
    before = engine.merge(R)
    engine.set_family("rows")
    assert "family='rows'" in repr(engine)
    assert same(engine.merge(R), before), "they are zero at the start"
    engine.set_family("rows")
    learned(engine, 1)
    engine.switch(R)
    assert engine.module is module
    assert same(module, engine.merge(R))
    assert engine.fused_module is not fused
    exact = true_weights(engine, base, experts, R, *true_coefficients(engine, R))
    for name, tensor in exact.items():
        assert (module.state_dict()[name].double() - tensor).abs().max() <= 1e-6 * tensor.abs().max()
    before = engine.merge(R)
    engine.set_family("rows+columns")
    assert "family='rows+columns'" in repr(engine)
    assert same(engine.merge(R), before), "they are zero at the start"
    learned(engine, 2)
    engine.switch(R)
    exact = true_weights(engine, base, experts, R, *true_coefficients(engine, R))
    for name, tensor in exact.items():
        assert (module.state_dict()[name].double() - tensor).abs().max() <= 1e-6 * tensor.abs().max()
    for family, part in (("scalar", "row"), ("rows", "column")):
        with pytest.raises(ValueError, match=f"whose {part} coefficients are trained and would be lost"):
            engine.set_family(family)
    with torch.no_grad():
        engine.routers.columns.weight.zero_()
    engine.set_family("rows")
    assert engine.routers.columns is None
    with torch.no_grad():
        engine.routers.rows.weight.zero_()
    engine.set_family("scalar")
    assert engine.routers(R).shape == (len(engine.groups), 3)
    with pytest.raises(ValueError, match=r"expected one of scalar, rows, rows\+columns"):
        engine.set_family("columns")
    with pytest.raises(ValueError, match=r"expected one of scalar, rows, rows\+columns"):
        pf.stack(base, experts, family="columns")


@FAMILY
def test_replicas_follow_row_coefficients_in_many_threads(family: str) -> None:
    base, experts = net_and_experts()
    engine = learned(pf.stack(base, experts, family=family))
    rays = preferences(6)
    expected = [engine.merge(ray) for ray in rays]
    wrong: list[int] = []

    def work(number: int) -> None:
        for turn in range(6):
            k = (number + turn) % 6
            with engine.replica(rays[k]) as module:
                if not same(module, expected[k]):
                    wrong.append(k)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    with torch.no_grad():
        assert engine.routers.rows is not None
        engine.routers.rows.weight.add_(0.1)
    with engine.replica(rays[0]) as module:
        assert same(module, engine.merge(rays[0])), "trained on, the replica is merged anew"


def test_weights_of_another_size_are_refused() -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts, family="rows+columns")
    groups, with_rows, width = engine.routers.widths
    for count in (groups - 1, groups + 1, with_rows + 1, width + 1):
        with pytest.raises(ValueError, match=rf"{with_rows}, 3\] or \[G \+ R \+ C, P\] = \[{width}, 3\]"):
            engine.merge(weights=torch.ones(count, 3))
    scalar = pf.stack(base, experts)
    with pytest.raises(ValueError, match=rf"expected \[G, P\] = \[{groups}, 3\]"):
        scalar.merge(weights=torch.ones(width, 3))
