"""The live module: what happens when its tensors are moved or replaced, and in inference mode."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import paretofuse as pf
from paretofuse.engine.modules import bindings
from tests.support.models import Net, net_and_experts, same

R = [0.2, 0.3, 0.5]
BACKENDS = ["native", "reference"]


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def load_assigned(net: Net) -> None:
    net.load_state_dict({name: t.clone() for name, t in net.state_dict().items()}, assign=True)


def new_data(net: Net) -> None:
    net.second.weight.data = net.second.weight.data.clone()


def transposed_data(net: Net) -> None:
    net.tied.weight.data = net.tied.weight.data.t()


def set_storage(net: Net) -> None:
    with torch.no_grad():
        net.first.weight.set_(torch.zeros(16, 8))


def grow(net: Net) -> None:
    with torch.no_grad():
        net.first.weight.resize_(20, 8)


def untie(net: Net) -> None:
    net.head.weight = nn.Parameter(net.head.weight.detach().clone())


def swap(net: Net) -> None:
    torch.utils.swap_tensors(net.token, nn.Parameter(torch.zeros(1, 8)))


MOVES: dict[str, Callable[[Net], object]] = {
    "half": lambda net: net.half(),
    "double": lambda net: net.double(),
    "to a dtype": lambda net: net.to(torch.bfloat16),
    "to a device": lambda net: net.to("meta"),
    "a layer alone": lambda net: net.second.half(),
    "to_empty": lambda net: net.to_empty(device="cpu"),
    "share_memory": lambda net: net.share_memory(),
    "load_state_dict": load_assigned,
    "data": new_data,
    "data as another view": transposed_data,
    "set_": set_storage,
    "resize_": grow,
    "swap_tensors": swap,
    "deleted": lambda net: delattr(net.first, "bias"),
    "set to None": lambda net: setattr(net.first, "bias", None),
    "another parameter": lambda net: setattr(net.first, "weight", nn.Parameter(torch.zeros(16, 8))),
    "another buffer": lambda net: setattr(net.norm, "running_mean", torch.zeros(16)),
    "another layer": lambda net: setattr(net, "first", nn.Linear(8, 16)),
    "untied": untie,
    "parametrize": lambda net: parametrize.register_parametrization(net.first, "weight", Double()),
    "prune": lambda net: prune.random_unstructured(net.first, "weight", amount=0.5),
    "weight_norm": lambda net: nn.utils.parametrizations.weight_norm(net.first),
}


@pytest.fixture(params=["by C++", "by Python"])
def told(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who compares where tensors lie: torch's older versions do not tell C++."""
    if request.param == "by Python":
        monkeypatch.setattr(bindings, "_places", lambda tensors: None)
    return str(request.param)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES.keys())
def test_what_moves_the_live_module_is_refused(
    move: Callable[[Net], object], backend: str, told: str
) -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts, backend=backend)
    live = engine.module
    assert isinstance(live, Net)
    move(live)
    before = {name: t.clone() for name, t in live.state_dict().items()}
    for use in (engine.switch, engine.train_at, engine.switch):  # each time, not only at first
        with pytest.raises(ValueError, match=r"live module whose tensor '[a-z._]+' .*engine\.merge.*unload"):
            use(R)
    if move is not MOVES["to a device"]:
        after = live.state_dict()  # nothing was written; what has grown has reached memory that may hold NaN
        assert all(torch.equal(before[n].nan_to_num(), after[n].nan_to_num()) for n in before)
    dense = engine.unload(R)
    engine.switch(R)  # the next one is made anew
    assert same(engine.module, dense)


def test_where_torch_tells_it_cpp_compares_and_python_asks_no_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip("this torch has no exchange functions of DLPack")
    base, experts = net_and_experts()
    engine = pf.stack(base, experts)
    engine.switch(R)
    monkeypatch.setattr(bindings, "_memory", lambda tensors: pytest.fail("Python asked every tensor"))
    engine.switch(R)


def test_tensors_of_which_torch_cannot_tell_are_left_to_python() -> None:
    module = nn.Linear(3, 2, device="meta")
    bound = bindings.Bindings(module, dict(module.named_parameters()))
    bound.check()
    module.to(torch.bfloat16)
    with pytest.raises(ValueError, match="has other memory, another dtype"):
        bound.check()


def test_a_live_module_that_nobody_holds_is_freed() -> None:
    """Hooks, collector and what watches the tensors hold each other; Python's collector must see through all."""
    base, experts = net_and_experts()
    engine = pf.stack(base, experts)
    pf.add_planes(engine, rank=1)
    x = torch.randn(4, 8)
    for materialize in (True, False):
        engine.train_at(R, materialize=materialize)
        module = engine.module if materialize else engine.fused_module
        module(x).sum().backward()
        gone = weakref.ref(module)
        del module
        engine.unload(R)
        gc.collect()
        assert gone() is None


def test_a_backward_pass_through_a_module_that_was_let_go_of_is_refused() -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts)
    engine.train_at(R)
    loss = engine.module(torch.randn(4, 8)).sum()
    engine.unload(R)
    gc.collect()
    with pytest.raises(ValueError, match=r"a module that the engine has let go of .*after engine\.train_at"):
        loss.backward()


def test_tables_are_checked() -> None:
    with pytest.raises(TypeError, match=r"expected tables \(dict, entries\)"):
        bindings._C.tables_hold([("no dict", ())])  # type: ignore[list-item]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["half", "load_state_dict", "data", "another parameter", "untied"])
def test_what_moves_it_between_forward_and_backward_is_refused(name: str, backend: str) -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts, backend=backend)
    live = engine.module
    assert isinstance(live, Net)
    x = torch.randn(4, 8)
    engine.train_at(R)
    loss = live(x).square().mean()
    MOVES[name](live)
    with pytest.raises(ValueError, match="live module whose tensor"):
        engine.jacobian([loss])
    with pytest.raises(ValueError, match="live module whose tensor"):
        loss.backward()
    assert all(p.grad is None for p in engine.routers.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_moves_the_fused_module_is_refused(backend: str) -> None:
    base, experts = net_and_experts()
    moves: list[Callable[[nn.Module], object]] = [
        lambda net: net.half(),
        lambda net: setattr(net, "tied", nn.Linear(8, 8, bias=False)),
    ]
    for move in moves:
        engine = pf.stack(base, experts, backend=backend)
        move(engine.fused_module)
        with pytest.raises(ValueError, match="live module whose tensor"):
            engine.train_at(R, materialize=False)
        engine.switch(R)  # the live module is another


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_leaves_its_memory_alone_is_followed(backend: str) -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts, backend=backend)
    net = engine.module
    assert isinstance(net, Net)
    net.float().to("cpu").train().requires_grad_(True)
    copy.deepcopy(net).half()
    net.load_state_dict(base.state_dict())
    net.first.register_forward_hook(lambda *_: None)
    net.extra = nn.Linear(2, 2)
    first = net.first
    net.first = nn.Sequential(first)  # type: ignore[assignment]  # as adapters wrap a layer
    with torch.no_grad():
        net.token.zero_()
    engine.switch(R)
    merged = engine.merge(R)
    assert torch.equal(first.weight, merged.first.weight)
    assert torch.equal(net.token, merged.token)
    net.first = nn.Linear(8, 16)  # the wrapper goes, and what it held
    with pytest.raises(ValueError, match=r"'first\.weight' belongs to a layer that was taken out"):
        engine.switch(R)


def test_a_head_of_the_users_own_is_left_alone() -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts, heads=["second"])
    own = nn.Linear(16, 8)
    net = engine.module
    assert isinstance(net, Net)
    net.second = own
    engine.switch(R)
    assert net.second is own
    assert torch.equal(net.first.weight, engine.merge(R).first.weight)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_first_use_in_inference_mode_spoils_nothing(backend: str) -> None:
    base, experts = net_and_experts()
    route = lambda name: None if name.startswith("norm") else name  # noqa: E731
    engine = pf.stack(base, experts, route=route, backend=backend, replicas=1)
    x = torch.randn(4, 8)
    with torch.inference_mode():
        engine.switch(R)
        engine.module(x)
        with engine.replica(R) as module:
            module(x)
        engine.batched([R] * 4)(x)
        merged = engine.merge(R)
        _ = engine.fused_module
    truth = pf.stack(base, experts, route=route, backend=backend)
    for materialize in (True, False):
        for one in (engine, truth):
            one.routers.zero_grad()
            one.train_at(R, materialize=materialize)
            (one.module if materialize else one.fused_module)(x).square().mean().backward()
        for ours, theirs in zip(engine.routers.parameters(), truth.routers.parameters(), strict=True):
            assert ours.grad is not None
            assert torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type]
    with engine.replica([1.0, 0.0, 0.0]) as module:
        assert same(module, truth.merge([1.0, 0.0, 0.0]))
    merged(x).sum().backward()  # an ordinary model, to be trained further
    engine.batched([R] * 4)(x).sum().backward()


def test_training_in_inference_mode_says_so() -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts)
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        engine.train_at(R)


def test_a_double_default_dtype_changes_nothing() -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts, route=lambda name: None if name.startswith("norm") else name)
    truth = engine.merge(R)
    x = torch.randn(4, 8)
    expected = truth(x)
    torch.set_default_dtype(torch.float64)
    try:
        engine.switch(R)
        assert same(engine.module, truth)
        torch.testing.assert_close(engine.batched([R] * 4)(x), expected)
        engine.train_at(R, materialize=False)
        engine.fused_module(x).sum().backward()
    finally:
        torch.set_default_dtype(torch.float32)
