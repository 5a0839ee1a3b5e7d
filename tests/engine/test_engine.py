"""The engine's public contract: merge, switch, routing weights, heads, backends, errors."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import paretofuse as pf
from paretofuse.engine.merging.disk import merge_store
from paretofuse.engine.routing.families import FAMILIES
from paretofuse.engine.routing.routers import INITS
from tests.support.models import Net, net_and_experts, perturbed, same, tiny_gpt2

BACKENDS = ["native", "reference"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_merge_is_the_formula(backend: str, seed: int) -> None:
    base, experts = net_and_experts(seed)
    engine = pf.stack(base, experts, route="tensor", backend=backend, static_weight=0.3)
    weights = torch.randn(len(engine.groups), 3, generator=torch.Generator().manual_seed(seed))
    merged = engine.merge_state_dict(weights=weights)
    row = {group: i for i, group in enumerate(engine.groups)}
    for name, group in engine.tensor_groups.items():
        start = base.state_dict()[name].double()
        truth = start.clone()
        for e, expert in enumerate(experts.values()):
            truth += weights[row[group], e].double() * (expert.state_dict()[name].double() - start)
        torch.testing.assert_close(merged[name].double(), truth, rtol=1e-5, atol=1e-6)
    assert torch.equal(merged["steps"], base.steps)
    assert torch.equal(merged["scale"], base.scale)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_hot_is_the_expert_and_zero_weights_are_the_base(backend: str) -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts, backend=backend)
    for name, expert in experts.items():
        merged = engine.merge({name: 1.0})
        assert type(merged) is Net
        for (key, ours), theirs in zip(
            merged.state_dict().items(), expert.state_dict().values(), strict=True
        ):
            expected = base.state_dict()[key] if key == "scale" else theirs
            torch.testing.assert_close(ours, expected, rtol=0, atol=3e-7)
    nothing = engine.merge(weights=torch.zeros(len(engine.groups), 3))
    assert same(nothing, base)


def test_switch_keeps_addresses_and_equals_merge_after_a_thousand() -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts)
    module = engine.module
    addresses = [t.data_ptr() for t in module.state_dict().values()]
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        r = torch.rand(3, generator=generator, dtype=torch.float64) + 1e-3
        engine.switch(r / r.sum())
    engine.switch([0.2, 0.3, 0.5])
    assert engine.module is module
    assert [t.data_ptr() for t in module.state_dict().values()] == addresses
    assert same(module, engine.merge([0.2, 0.3, 0.5]))


def test_switch_restores_what_training_mode_changed() -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts, route=lambda name: name if name.startswith("first") else None)
    engine.module.train()
    engine.module(torch.randn(16, 8))
    engine.switch([0.2, 0.3, 0.5])
    assert same(engine.module, engine.merge([0.2, 0.3, 0.5]))


def test_bad_input_changes_nothing() -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts)
    engine.switch([0.2, 0.3, 0.5])
    before = copy.deepcopy(engine.module.state_dict())
    bad: list[object] = [
        [0.5, 0.5],
        [1.5, -0.5, 0.0],
        [float("nan"), 0.5, 0.5],
        {"a": 0.5, "z": 0.5},
        [0.2, 0.2, 0.2],
    ]
    for preference in bad:
        with pytest.raises(ValueError, match="got"):
            engine.switch(preference)  # type: ignore[arg-type]
    for weights in (torch.zeros(2, 3), torch.zeros(len(engine.groups), 2)):
        with pytest.raises(ValueError, match="expected"):
            engine.switch(weights=weights)
    with pytest.raises(ValueError, match="NaN"):
        engine.switch(weights=torch.full((len(engine.groups), 3), float("nan")))
    for grid in (torch.eye(3), np.eye(3), pf.simplex_grid(3, 4)):
        with pytest.raises(ValueError, match=r"got \d+ preferences, expected one"):
            engine.switch(grid)
        with pytest.raises(TypeError, match=r"got \d+ preferences, expected one"):
            engine.replica(grid)
    with pytest.raises(ValueError, match="got no preferences"):
        engine.merge(np.empty((0, 3)))
    with pytest.raises(ValueError, match="either"):
        engine.switch()
    with pytest.raises(ValueError, match="one live module"):
        engine.switch(weights=torch.zeros(2, len(engine.groups), 3))
    after = engine.module.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_preferences_in_one_pass(backend: str) -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts, backend=backend)
    grid = torch.from_numpy(pf.simplex_grid(3, 4))
    together = engine.merge(grid)
    assert len(together) == len(grid)
    assert all(same(model, engine.merge(r)) for model, r in zip(together, grid, strict=True))
    states = engine.merge_state_dict(weights=engine.routers(grid))
    assert torch.equal(states[3]["token"], together[3].token)
    for rows in (
        grid.numpy(),
        grid.float(),
    ):  # an array is what simplex_grid makes, without a word about torch
        again = engine.merge(rows)
        assert len(again) == len(grid)
        assert all(same(model, other) for model, other in zip(together, again, strict=True))
        found = engine.merge_state_dict(rows)
        assert [set(state) for state in found] == [set(state) for state in states]
        assert torch.equal(found[3]["token"], together[3].token)
    weights = engine.routers(grid).detach()
    for given in (weights.numpy(), weights.tolist()):
        assert len(engine.merge_state_dict(weights=given)) == len(grid)  # type: ignore[arg-type]
    for one in (grid[:1], grid[:1].numpy()):
        assert isinstance(engine.merge(one), list)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("init", INITS)
def test_every_way_to_a_preferences_model_gives_the_same_bits(tmp_path: Path, init: str, family: str) -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts, init=init, family=family, backend="native")
    with torch.no_grad():
        for parameter in engine.routers.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    engine.save(tmp_path / "store")
    grid = pf.simplex_grid(3, 5)
    for preference, model in zip(grid, engine.merge(grid), strict=True):
        assert same(model, engine.merge(preference))
        engine.switch(preference)
        assert same(model, engine.module)
        with engine.replica(preference) as replica:
            assert same(model, replica)
        merge_store(tmp_path / "store", preference, tmp_path / "merged.safetensors")
        own = model.state_dict()
        written = load_file(tmp_path / "merged.safetensors")
        assert all(torch.equal(tensor, own[name]) for name, tensor in written.items())


def test_merge_is_independent() -> None:
    base, experts = net_and_experts()
    snapshot = copy.deepcopy(base.state_dict())
    engine = pf.stack(base, experts)
    one, two = engine.merge([1, 0, 0]), engine.merge([1, 0, 0])
    storages = [
        t.untyped_storage().data_ptr() for m in (one, two, base, engine.module) for t in m.parameters()
    ]
    live = len(list(engine.module.parameters()))
    assert len(set(storages[:-live])) == len(storages) - live
    with torch.no_grad():
        for p in one.parameters():
            p.zero_()
    assert same(two, engine.merge([1, 0, 0]))
    assert all(torch.equal(v, snapshot[k]) for k, v in base.state_dict().items())
    assert one.head.weight is one.tied.weight


def test_requires_grad_and_mode_follow_the_base() -> None:
    base, experts = net_and_experts()
    base.first.weight.requires_grad_(False)
    base.train()
    merged = pf.stack(base, experts).merge([1, 0, 0])
    assert not merged.first.weight.requires_grad
    assert merged.second.weight.requires_grad
    assert merged.training


def test_permuting_experts_changes_nothing() -> None:
    base, experts = net_and_experts()
    turned = dict(reversed(experts.items()))
    r = {"a": 0.2, "b": 0.3, "c": 0.5}
    one, two = pf.stack(base, experts).merge(r), pf.stack(base, turned).merge(r)
    for left, right in zip(one.state_dict().values(), two.state_dict().values(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("init", "expected"), [("identity", [0.25, 0.75]), ("sqrt", [0.5, 0.75**0.5])])
def test_router_starts(init: str, expected: list[float]) -> None:
    base, experts = net_and_experts(count=2)
    weights = pf.stack(base, experts, init=init).routers([0.25, 0.75])
    torch.testing.assert_close(weights, torch.tensor(expected).expand_as(weights))


def test_constant_start_is_pwemoes() -> None:
    base, experts = net_and_experts(count=2)
    engine = pf.stack(base, experts, init="constant", static_weight=0.4)
    assert (engine.routers([0.25, 0.75]) - 0.4).abs().max() < 2e-3
    assert engine.routers.hidden.weight.std().item() == pytest.approx(0.01, rel=0.3)


def test_preference_kinds_agree() -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts)
    expected = engine.routers([0.2, 0.3, 0.5])
    for r in (
        {"c": 0.5, "a": 0.2, "b": 0.3},
        torch.tensor([0.2, 0.3, 0.5]),
        torch.tensor([0.2, 0.3, 0.5]).double().numpy(),
    ):
        torch.testing.assert_close(engine.routers(r), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_models(dtype: torch.dtype, backend: str) -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts, dtype=dtype, backend=backend)
    merged = engine.merge_state_dict([0.2, 0.3, 0.5])
    for name, start in base.state_dict().items():
        if not start.is_floating_point() or name == "scale":
            continue
        assert merged[name].dtype == dtype
        moves = [e.state_dict()[name].double() - start.double() for e in experts.values()]
        truth = start.double() + sum(w * d for w, d in zip([0.2, 0.3, 0.5], moves, strict=True))
        plain = start.to(dtype)
        for w, d in zip([0.2, 0.3, 0.5], moves, strict=True):
            plain = plain + w * d.to(dtype)
        ours, theirs = (merged[name].double() - truth).abs().max(), (plain.double() - truth).abs().max()
        assert ours <= 2 * theirs + 1e-12


def test_deltas_may_be_narrower_than_the_base() -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts, delta_dtype=torch.bfloat16)
    merged = engine.merge([1, 0, 0])
    expert = experts["a"]
    assert merged.first.weight.dtype == torch.float32
    torch.testing.assert_close(merged.first.weight, expert.get_parameter("first.weight"), rtol=0, atol=2e-3)
    assert not torch.equal(merged.first.weight, expert.get_parameter("first.weight"))
    assert "deltas BF16" in engine.notes[0]


def test_mixed_dtypes_work_and_are_stated() -> None:
    base, experts = net_and_experts()
    half = {name: copy.deepcopy(e).to(torch.bfloat16) for name, e in experts.items()}
    engine = pf.stack(base, half)
    merged = engine.merge([0, 1, 0])
    assert merged.token.dtype == torch.float32
    torch.testing.assert_close(merged.token, half["b"].get_parameter("token").float())
    assert any("BF16 in the expert and F32 in the base" in note for note in engine.notes)


def test_float16_that_overflows_is_an_error() -> None:
    large = {"w": torch.tensor([1e5, 1.0]), "head": torch.tensor([1.0])}
    fine = {"w": torch.tensor([0.0, 1.0]), "head": torch.tensor([1e5])}
    with pytest.raises(
        pf.CheckpointError, match=r"the base: tensor 'w' overflows torch.float16; pass dtype="
    ):
        pf.stack(large, {"a": large}, dtype=torch.float16)
    with pytest.raises(pf.CheckpointError, match=r"expert 'a': tensor 'head' overflows torch.float16"):
        pf.stack({**fine, "head": torch.ones(1)}, {"a": fine}, heads=["head"], dtype=torch.float16)


def test_expert_names_that_are_one_as_text() -> None:
    base, experts = net_and_experts(count=2)
    with pytest.raises(ValueError, match="differ as text"):
        pf.stack(base, {1: experts["a"], "1": experts["b"]})


def test_a_tied_gpt2_stays_tied() -> None:
    base = tiny_gpt2()
    engine = pf.stack(base, {"a": perturbed(base, 1), "b": perturbed(base, 2)})
    assert "lm_head.weight" not in engine.tensor_groups
    for model in (engine.merge([0.5, 0.5]), engine.module):
        assert model.lm_head.weight is model.transformer.wte.weight
    ids = torch.arange(10).unsqueeze(0)
    assert torch.equal(engine.merge([0.5, 0.5])(ids).logits, engine.module(ids).logits)


def test_state_dicts_merge_without_a_class() -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base.state_dict(), {k: e.state_dict() for k, e in experts.items()})
    state = engine.merge_state_dict([0.2, 0.3, 0.5])
    other = pf.stack(base, experts).merge_state_dict([0.2, 0.3, 0.5])
    assert state.keys() == other.keys()
    assert all(torch.equal(state[k], other[k]) for k in state if k != "scale")
    assert state["head.weight"] is state["tied.weight"]
    for call in (lambda: engine.merge([1, 0, 0]), lambda: engine.module):
        with pytest.raises(ValueError, match="knows no module class"):
            call()


def test_one_expert_and_eight() -> None:
    for count in (1, 8):
        base, experts = net_and_experts(count=count)
        engine = pf.stack(base, experts)
        r = [1 / count] * count
        engine.switch(r)
        assert same(engine.module, engine.merge(r))


def test_wrong_arguments() -> None:
    base, experts = net_and_experts()
    with pytest.raises(ValueError, match="got no experts"):
        pf.stack(base, {})
    with pytest.raises(TypeError, match="dict"):
        pf.stack(base, list(experts.values()))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got route"):
        pf.stack(base, experts, route="layers")
    with pytest.raises(ValueError, match="matches none"):
        pf.stack(base, experts, route="mlp")
    with pytest.raises(ValueError, match="got init"):
        pf.stack(base, experts, init="zero")
    with pytest.raises(ValueError, match="got dtype"):
        pf.stack(base, experts, dtype=torch.int8)
    with pytest.raises(ValueError, match="got backend"):
        pf.stack(base, experts, backend="numpy")
    with pytest.raises(ValueError, match="static_weight"):
        pf.stack(base, experts, static_weight=float("nan"))
    with pytest.raises(TypeError, match=r"expected an nn\.Module"):
        pf.stack(base, {"a": 3})


def test_unload_and_repr() -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts)
    dense = engine.unload([0.2, 0.3, 0.5])
    assert type(dense) is Net
    assert same(dense, engine.merge([0.2, 0.3, 0.5]))
    assert "3 objectives" in repr(engine)


def test_the_engine_says_what_its_live_module_is_merged_for() -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts)
    assert engine.preference is None
    assert "preference=None" in repr(engine)
    engine.switch([0.2, 0.3, 0.5])
    assert engine.preference == {"a": 0.2, "b": 0.3, "c": 0.5}
    assert "preference={'a': 0.2, 'b': 0.3, 'c': 0.5}" in repr(engine)
    with pytest.raises(ValueError, match="sum"):
        engine.switch([0.2, 0.2, 0.2])
    assert engine.preference == {"a": 0.2, "b": 0.3, "c": 0.5}
    engine.switch(weights=engine.routers([1, 0, 0]))
    assert engine.preference is None
    assert "preference=given as weights" in repr(engine)
    engine.train_at({"b": 1.0})
    assert engine.preference == {"a": 0.0, "b": 1.0, "c": 0.0}
    engine.train_at([1, 0, 0], materialize=False)  # another module
    assert engine.preference == {"a": 0.0, "b": 1.0, "c": 0.0}
    engine.unload([1, 0, 0])
    assert engine.preference is None


def test_named_tensors_are_a_checkpoints() -> None:
    base = tiny_gpt2()
    engine = pf.stack(base, {name: perturbed(base, seed) for seed, name in enumerate(("news", "poems"))})
    preference = {"news": 0.7, "poems": 0.3}
    pairs = engine.named_tensors(preference)
    merged = engine.merge(preference)
    parameters = dict(merged.named_parameters())
    found = dict(pairs)
    assert next(pairs, None) is None
    assert parameters.keys() <= found.keys()
    assert "lm_head.weight" not in found  # tied to the embedding, which is there
    assert all(torch.equal(tensor, merged.state_dict()[name]) for name, tensor in found.items())
    with pytest.raises(ValueError, match="expected a sum of 1"):
        engine.named_tensors({"news": 0.7, "poems": 0.7})
