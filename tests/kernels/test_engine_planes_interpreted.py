"""Planes of every format and row coefficients on the Triton backend, in its interpreter; `test_in_interpreter.py` runs
it."""

from __future__ import annotations

import os

import pytest
import torch

import paretofuse as pf
from paretofuse.engine.routing.families import FAMILIES
from tests.support.models import perturbed

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in a child process of test_in_interpreter.py", allow_module_level=True)

R = [0.2, 0.8]


def model(hidden: int = 34) -> torch.nn.Module:
    """Matrices of more than a tile that end inside one; with 34 hidden units rows that no sixteen elements divide."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(48, hidden), torch.nn.GELU(), torch.nn.Linear(hidden, 48))


def engines(planes: str, dtype: torch.dtype = torch.float32) -> list[pf.Engine]:
    """The same stack on the Triton backend and on the native one."""
    base = model(34 if dtype == torch.float32 else 64).to(dtype)
    experts = {name: perturbed(base, seed) for seed, name in enumerate("ab")}
    return [pf.stack(base, experts, backend=b, planes=planes, route="tensor") for b in ("triton", "native")]


def give(pair: list[pf.Engine], family: str) -> None:
    """The same random coefficients of rows and columns, where the family has some."""
    for engine in pair:
        engine.set_family(family)
        generator = torch.Generator().manual_seed(1)
        for linear in engine.routers.linear:
            linear.weight.data.copy_(0.3 * torch.randn(linear.weight.shape, generator=generator))


def compare(ours: pf.Engine, truth: pf.Engine, dtype: torch.dtype) -> None:
    """Both merge the same models, for one preference and for several at once."""
    rounding = torch.finfo(dtype).eps
    grid = torch.tensor([R, [0.6, 0.4], [1.0, 0.0]], dtype=torch.float64)
    merged = [*ours.merge_state_dict(grid), ours.merge_state_dict(R)]
    for left, right in zip(merged, [*truth.merge_state_dict(grid), truth.merge_state_dict(R)], strict=True):
        assert left.keys() == right.keys()
        for name in left:
            torch.testing.assert_close(left[name], right[name], rtol=2 * rounding, atol=rounding)
    ours.switch(R)
    for name, tensor in ours.module.state_dict().items():
        assert torch.equal(tensor, merged[-1][name])


PLANES = ["dense", "int8", "int4"]


@pytest.mark.parametrize("planes", PLANES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merges_equal_the_native_ones(planes: str, family: str, dtype: torch.dtype) -> None:
    ours, truth = engines(planes, dtype)
    assert not any("made dense" in note for note in ours.notes)
    held = {info.format for own in ours.planes.values() for info in own.values()}
    assert planes in held
    give([ours, truth], family)
    compare(ours, truth, dtype)


@pytest.mark.parametrize("planes", PLANES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("materialize", [True, False])
def test_gradients_equal_the_native_ones(planes: str, family: str, materialize: bool) -> None:
    pair = engines(planes)
    give(pair, family)
    x = torch.randn(6, 48, generator=torch.Generator().manual_seed(2))
    jacobians = []
    for engine in pair:
        engine.train_at(R, materialize=materialize)
        module = engine.module if materialize else engine.fused_module
        jacobians.append(engine.jacobian([module(x).square().mean(), module(x).sin().mean()]))
    torch.testing.assert_close(jacobians[0], jacobians[1], rtol=1e-4, atol=1e-6)


def test_formats_are_mixed_from_tensor_to_tensor_and_within_one() -> None:
    """A tensor whose planes differ is decoded, and the engine says so; the others stay as they are."""
    base = model()
    stacks = [pf.stack(base, {"a": perturbed(base, 0)}, planes=planes) for planes in ("int8", "int4")]
    experts = {name: perturbed(base, seed) for seed, name in enumerate("ab")}
    pair = [pf.stack(base, experts, backend="native", planes="int8", route="tensor") for _ in range(2)]
    for engine in pair:
        engine._stack.planes[0]["2.weight"] = stacks[1]._stack.planes[0]["2.weight"]
    ours = pf.Engine(
        pair[0]._stack, pair[0].routers, pair[0].blueprint, device=torch.device("cpu"), backend="triton"
    )
    assert "int4, int8 were made dense" in ours.notes[0]
    assert ours.planes["a"]["2.weight"].format == ours.planes["b"]["2.weight"].format == "dense"
    assert ours.planes["a"]["0.weight"].format == "int8"
    compare(ours, pair[1], torch.float32)


def test_a_fused_switch_is_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear weights are hidden; the biases between them are chosen by a table."""
    from paretofuse.kernels.launch import Launch

    (ours, _) = engines("dense")
    module = ours.fused_module
    names, run = [], Launch.run
    monkeypatch.setattr(Launch, "run", lambda self: (names.append(self.kernel.fn.__name__), run(self))[1])
    ours.train_at([1.0, 0.0], materialize=False)
    assert names == ["merge_kernel"]
    truth = ours.merge_state_dict([1.0, 0.0])
    for name in ("0.bias", "2.bias"):
        assert torch.equal(module.state_dict()[name], truth[name])


def test_low_rank_planes_never_become_dense() -> None:
    """A stack of factors, and trained planes, stay what they are; merges and gradients equal the native ones."""
    pair = engines("lowrank:3")
    assert all(info.format == "lowrank" for info in (own["0.weight"] for own in pair[0].planes.values()))
    assert {spec.name for flat in pair[0]._bound.flat for spec in flat.bucket.specs} == {"0.bias", "2.bias"}
    compare(*pair, torch.float32)
    x = torch.randn(6, 48, generator=torch.Generator().manual_seed(2))
    for engine in pair:
        pf.add_planes(engine, rank=2, seed=3)
        for factor in engine.routers.planes.factors:
            factor.data.add_(0.1)
    compare(*pair, torch.float32)
    jacobians = []
    for engine in pair:
        engine.train_at(R)
        jacobians.append(engine.jacobian([engine.module(x).square().mean()], flat=True))
    torch.testing.assert_close(jacobians[0], jacobians[1], rtol=1e-4, atol=1e-6)


def test_merged_tensors_have_memory_of_their_own_by_few_copies() -> None:
    """One copy of many tensors at once for all preferences, whatever their number."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.copies: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            name = func.overloadpacket.__name__
            if "clone" in name or "copy" in name:
                self.copies.append(name)
            return func(*args, **(kwargs or {}))

    (ours, _) = engines("dense")
    routing = torch.rand(5, 4, 2)
    ours._bound.static()
    with Counter() as counter:
        merged = ours._bound.merge(routing)
    assert counter.copies.count("_foreach_copy_") == 1
    assert "clone" not in counter.copies
    storages = {t.untyped_storage().data_ptr() for state in merged for t in state.values()}
    assert len(storages) == 5 * 4


def test_an_expert_that_changes_nothing_takes_no_memory() -> None:
    """The buffers hold the planes that there are; merges and gradients put them in their places."""
    base = model()
    experts = {"a": base, "b": perturbed(base, 1)}
    pair = [pf.stack(base, experts, backend=b, planes="int8", route="tensor") for b in ("triton", "native")]
    assert {flat.stored.planes for flat in pair[0]._bound.flat} == {(1,)}
    compare(*pair, torch.float32)
    x = torch.randn(6, 48, generator=torch.Generator().manual_seed(2))
    jacobians = []
    for engine in pair:
        engine.train_at(R)
        jacobians.append(engine.jacobian([engine.module(x).square().mean()]))
    torch.testing.assert_close(jacobians[0], jacobians[1], rtol=1e-4, atol=1e-6)


def test_a_switch_of_low_rank_planes_is_one_launch_beside_dense_ones_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One for all matrices of factors, one for the biases; trained planes beside int8 ones are PyTorch's."""
    from paretofuse.kernels.launch import Launch

    low, dense, quantized = engines("lowrank:3"), engines("dense"), engines("int8")
    for engine in (*dense, *quantized):
        pf.add_planes(engine, rank=2, seed=3)
        for factor in engine.routers.planes.factors:
            factor.data.add_(0.1)
    names, run = [], Launch.run
    monkeypatch.setattr(Launch, "run", lambda self: (names.append(self.kernel.fn.__name__), run(self))[1])
    low[0].switch(R)
    names.clear()
    low[0].switch([0.5, 0.5])
    assert names == ["merge_kernel", "lowrank_merge_kernel"]
    compare(*dense, torch.float32)
    names.clear()
    dense[0].switch([0.5, 0.5])
    assert names == ["merge_kernel", "lowrank_merge_kernel"]
    names.clear()
    compare(*quantized, torch.float32)
    assert set(names) == {"merge_kernel"}
