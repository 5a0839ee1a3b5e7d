"""M objectives of P planes: several experts of one objective, experts of none; everywhere that planes go."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import paretofuse as pf
from paretofuse.api import stack_to_store
from paretofuse.cli import main
from paretofuse.engine.engine import Engine
from paretofuse.engine.errors import StoreError
from paretofuse.engine.merging.disk import merge_store
from paretofuse.engine.routing.families import FAMILIES
from paretofuse.engine.store.reader import Store
from tests.engine.test_heads import Classifier
from tests.support import cpplib
from tests.support.cpplib import Library, assert_same_bits
from tests.support.models import Net, net_and_experts, perturbed, same, tiny_gpt2

OBJECTIVES = {"news": ["c", "a"], "poems": ["b"]}  # d belongs to none
R = {"news": 0.3, "poems": 0.7}


def engine_of(**options: Any) -> Engine:
    """Four experts of two objectives, one of them of none."""
    base, experts = net_and_experts(count=4)
    return pf.stack(base, experts, objectives=OBJECTIVES, **{"route": "tensor", **options})


def moved(engine: Engine, family: str = "scalar") -> Engine:
    """Its routers away from their start."""
    engine.set_family(family)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in engine.routers.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return engine


def merged_truth(engine: Engine, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """Float64 merges of routed tensors at scalar routing weights [G, P]."""
    stack, layout = engine._stack, engine.layout
    return {
        name: stack.base[name].double()
        + sum(
            weights[row, j].double() * own[name].decode().double()
            for j, own in enumerate(stack.planes)
            if name in own
        )
        for name, row in layout.group_index.items()
    }


def test_who_belongs_to_whom() -> None:
    engine = engine_of()
    assert engine.objectives == ("news", "poems")
    assert engine.experts == {"a": "news", "b": "poems", "c": "news", "d": None}
    assert list(engine.planes) == ["a", "b", "c", "d"]
    assert "4 planes ['a', 'b', 'c', 'd']" in repr(engine)
    assert engine.routers(R).shape == (len(engine.groups), 4)


@pytest.mark.parametrize("init", ["identity", "sqrt", "constant"])
def test_where_routers_start(init: str) -> None:
    engine = engine_of(init=init)
    found = engine.routers(R)
    if init == "constant":  # with weights of .01
        assert (found - torch.tensor([0.15, 0.3, 0.15, 0.0])).abs().max() < 0.05
        assert torch.equal(engine.routers.output.bias[0], torch.tensor([0.15, 0.3, 0.15, 0.0]))
        return
    r = np.array([0.3, 0.7])
    news, poems = r if init == "identity" else np.sqrt(r)
    expected = torch.from_numpy(np.array([news / 2, poems, news / 2, 0.0]).astype(np.float32))
    assert torch.equal(found, expected.expand_as(found))


def test_a_one_hot_preference_starts_as_the_mean_of_its_experts() -> None:
    base, experts = net_and_experts(count=4)
    engine = pf.stack(base, experts, objectives=OBJECTIVES, route="tensor")
    merged = engine.merge({"news": 1.0}).state_dict()
    a, c = (experts[name].state_dict() for name in "ac")
    for spec in engine.layout.with_role("routed"):
        torch.testing.assert_close(merged[spec.name], (a[spec.name] + c[spec.name]) / 2)
    assert same(engine.merge({"poems": 1.0}), pf.stack(base, experts, route="tensor").merge({"b": 1.0}))


def test_static_tensors_take_the_constant_weight_shared_out() -> None:
    base, experts = net_and_experts(count=4)
    options = {"route": lambda name: "one" if "first" in name else None, "static_weight": 0.4}
    engine = pf.stack(base, experts, objectives=OBJECTIVES, **options)
    merged = engine.merge_state_dict(R)
    name, states = "second.weight", {n: e.state_dict() for n, e in experts.items()}
    own = base.state_dict()[name]
    deltas = {n: state[name] - own for n, state in states.items()}
    exact = (
        own.double() + 0.2 * deltas["a"].double() + 0.4 * deltas["b"].double() + 0.2 * deltas["c"].double()
    )
    torch.testing.assert_close(merged[name].double(), exact, rtol=0, atol=1e-6)
    assert engine.tensor_groups.keys() == {"first.weight", "first.bias"}


def test_an_expert_for_each_objective_is_what_it_was() -> None:
    base, experts = net_and_experts()
    told = pf.stack(base, experts, objectives={name: [name] for name in experts})
    plain = pf.stack(base, experts)
    assert told.layout == plain.layout
    assert all(
        torch.equal(a, b) for a, b in zip(told.routers.parameters(), plain.routers.parameters(), strict=True)
    )
    assert same(told.merge([0.2, 0.3, 0.5]), plain.merge([0.2, 0.3, 0.5]))


def test_the_order_of_the_planes_changes_nothing() -> None:
    base, experts = net_and_experts(count=4)
    engine = moved(pf.stack(base, experts, objectives=OBJECTIVES, route="tensor"), "rows")
    order = ["d", "b", "c", "a"]
    other = pf.stack(
        base, {name: experts[name] for name in order}, objectives=OBJECTIVES, route="tensor", family="rows"
    )
    where = [list(experts).index(name) for name in order]
    state = engine.routers.state_dict()
    permuted = {name: t[:, where] if name.startswith(("output", "rows")) else t for name, t in state.items()}
    other.routers.load_state_dict(permuted)
    assert torch.equal(other.routers(R), engine.routers(R)[:, where])
    ours, theirs = engine.merge_state_dict(R), other.merge_state_dict(R)
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_every_way_to_merge_gives_the_same_model(backend: str) -> None:
    engine = moved(engine_of(backend=backend))
    with torch.no_grad():
        truth = merged_truth(engine, engine.routers(R))
    state = engine.merge_state_dict(R)
    for name, exact in truth.items():
        torch.testing.assert_close(state[name].double(), exact, rtol=1e-6, atol=1e-6)
    engine.switch(R)
    with engine.replica(R) as replica:
        assert same(replica, engine.module)
    assert same(engine.merge(weights=engine.routers(R).detach()), engine.module)
    several = engine.merge(np.array([[0.3, 0.7], [1.0, 0.0]]))
    assert same(several[0], engine.module)
    x = torch.randn(2, 8)
    rows = engine.batched([R, {"news": 1.0}])(x)
    for own, row, model in zip(x, rows, several, strict=True):
        torch.testing.assert_close(row, model(own[None])[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"expected \[G, P\] = \[\d+, 4\]"):
        engine.merge(weights=torch.zeros(len(engine.groups), 2))
    front = pf.sweep(
        engine, lambda module: {"news": float(module.token.detach().sum()), "poems": 0.0}, [R, R]
    )
    assert front.preferences.shape == (2, 2)


@pytest.mark.parametrize("materialize", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_jacobian_is_autograds(family: str, materialize: bool) -> None:
    engine = moved(engine_of(), family)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
    engine.module.eval()
    engine.fused_module.eval()
    groups = len(engine.groups)
    weights = engine.train_at(R, materialize=materialize)
    module = engine.module if materialize else engine.fused_module
    output = module(x)
    found = engine.jacobian([output.square().mean(), output.abs().mean()])
    assert found.shape == (2, *weights.shape)
    leaf = weights.detach().double().requires_grad_()
    total = {}
    for name, spans in engine.layout.spans.items():
        base = engine._stack.base[name].double()
        total[name] = base
        for j, own in enumerate(engine._stack.planes):
            c = leaf[spans.group, j]
            if family != "scalar":
                own_rows = leaf[spans.rows, j]
                c = c + (own_rows.view(-1, *[1] * (base.dim() - 1)) if base.dim() > 1 else own_rows[0])
            if family == "rows+columns" and spans.columns is not None:
                c = c + leaf[spans.columns, j]
            total[name] = total[name] + c * own[name].decode().double()
    reference = copy.deepcopy(engine.merge(R)).double().eval()
    state = {n: t.double() if t.is_floating_point() else t for n, t in reference.state_dict().items()} | total
    parameters = dict(reference.named_parameters())
    state = {n: t if n in parameters else t.detach() for n, t in state.items()}  # buffers get no gradient
    state["head.weight"] = state["tied.weight"]
    out = torch.func.functional_call(reference, state, (x.double(),))
    for row, loss in zip(found, (out.square().mean(), out.abs().mean()), strict=True):
        (exact,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        assert (row - exact).abs().max() <= 1e-5 * exact.abs().max()
    assert found[:, :groups].any()


@pytest.mark.parametrize("method", ["ls", "epo", "mgda", "stch"])
def test_fit_trains_with_solvers_and_resumes(method: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    data = {name: [torch.randn(4, 8, generator=generator) for _ in range(2)] for name in OBJECTIVES}
    tasks = {
        "news": (data["news"], lambda module, x: module(x).square().mean()),
        "poems": (data["poems"], lambda module, x: (module(x) - 1).square().mean()),
    }
    whole, cut = engine_of(), engine_of()
    pf.fit(whole, tasks, method, steps=4, progress=False)
    for steps in (2, 4):
        pf.fit(
            cut, tasks, method, steps=4, progress=False, checkpoint=tmp_path / "run",
            callback=lambda record, last=steps: record["step"] == last,
        )  # fmt: skip
    for ours, theirs in zip(whole.routers.parameters(), cut.routers.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert whole.routers.output.weight[:, 3].any(), "a plane of no objective is trained too"
    base, experts = net_and_experts(count=4)
    other = pf.stack(base, experts, objectives={"news": ["a"], "poems": ["b"]}, route="tensor")
    with pytest.raises(ValueError, match="experts"):
        pf.fit(other, tasks, method, steps=4, progress=False, checkpoint=tmp_path / "run")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_store_gives_the_same_bits_in_python_cpp_and_from_the_shell(
    family: str, library: Library, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, route = tmp_path / "store", lambda name: None if name.startswith("second") else name
    engine = moved(engine_of(route=route, planes="int8"), family)
    engine.save(path)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["version"] == 3
    assert sorted(p.name for p in (path / "experts").iterdir()) == [f"{name}.safetensors" for name in "abcd"]
    again = pf.load(path, module=Net(), verify=True)
    assert again.layout == engine.layout
    assert again.planes == engine.planes
    weights = Store.open(path).routing_weights(np.array([0.3, 0.7]))
    np.testing.assert_array_max_ulp(weights, engine.routers(R).detach().numpy(), maxulp=1)
    truth = again.merge_state_dict(weights=torch.from_numpy(weights))
    opened = library.open(path, threads=2)
    assert opened.names("objective") == ["news", "poems"]
    assert opened.names("plane") == ["a", "b", "c", "d"]
    more = engine.routers.width - len(engine.groups)
    assert opened.routing_weights([0.3, 0.7], more).tobytes() == weights.tobytes()
    opened.switch([0.3, 0.7])
    names = opened.names("tensor")
    assert_same_bits(opened.tensors(), truth)
    replica = opened.acquire([0.3, 0.7])
    assert_same_bits({name: replica.view(name).array() for name in names}, truth)
    replica.release()
    with pytest.raises(cpplib.LibraryError, match="4 planes"):
        opened.switch_weights(weights[:, :2].copy())
    out = tmp_path / "merged.safetensors"
    assert main(["merge", str(path), "--preference", "news=0.3,poems=0.7", "-o", str(out)]) == 0
    written = load_file(out)
    assert all(torch.equal(written[name], truth[name]) for name in names)
    capsys.readouterr()
    assert main(["info", str(path)]) == 0
    assert "experts       a, c of news; b of poems; d of no objective" in capsys.readouterr().out
    merge_store(path, R, tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert all(f"| Expert {name} |" in card for name in "abcd")
    with pytest.raises(ValueError, match=r"expected finite numbers of shape \(\d+, 4\)"):
        merge_store(path, None, out, weights=weights[:, :2])


def test_the_command_line_stacks_them_as_python_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    models = {name: nn.Linear(3, 2).state_dict() for name in ("base", "x", "y", "z")}
    for name, state in models.items():
        save_file(state, f"{name}.safetensors")
    words = ["stack", "base.safetensors", *(w for n in "xyz" for w in ("--expert", f"{n}={n}.safetensors"))]
    named = ["--objective", "news=x,y", "--objective", "poems=z"]
    assert main([*words, *named, "-o", "shell", "--planes", "dense", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["experts"] == {"x": "news", "y": "news", "z": "poems"}
    base = models.pop("base")
    engine = pf.stack(base, models, objectives={"news": ["x", "y"], "poems": ["z"]})
    shell = pf.load("shell").merge_state_dict(R)
    assert all(torch.equal(shell[name], t) for name, t in engine.merge_state_dict(R).items())
    assert main([*words, "--objective", "news=x,nobody", "-o", "other"]) != 0
    assert "got expert 'nobody' for objective 'news'" in capsys.readouterr().err
    for wrong, said in (("news", "expected NAME=EXPERT"), ("news=x,,y", "expected NAME=EXPERT")):
        assert main([*words, "--objective", wrong, "-o", "other"]) != 0
        assert said in capsys.readouterr().err
    assert main([*words, *named, "--objective", "news=z", "-o", "other"]) != 0
    assert "argument --objective: got 'news' twice" in capsys.readouterr().err


def test_stores_of_an_expert_for_each_objective_stay_of_format_1(tmp_path: Path) -> None:
    base, experts = net_and_experts()
    pf.stack(base, experts, objectives={name: [name] for name in experts}).save(tmp_path / "told")
    pf.stack(base, experts).save(tmp_path / "plain")
    told, plain = ((tmp_path / name / "manifest.json").read_bytes() for name in ("told", "plain"))
    assert told == plain
    assert json.loads(plain)["version"] == 1


def test_the_head_of_an_objective_is_that_of_its_first_expert(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Classifier(2)
    experts = {"a": Classifier(3), "b": Classifier(4), "c": Classifier(5)}
    objectives = {"news": ["b", "a"]}
    engine = pf.stack(base, experts, objectives=objectives, heads=["classifier"])
    assert torch.equal(engine.heads["news"]["classifier.weight"], experts["a"].classifier.weight)
    assert engine.merge([1.0], head="news")(torch.randn(2, 4)).shape == (2, 3)
    assert any("b: its head is left out, as news has that of a" in note for note in engine.notes)
    assert any("c: its head is left out, as it belongs to no objective" in note for note in engine.notes)
    stack_to_store(base, experts, tmp_path / "store", objectives=objectives, heads=["classifier"])
    again = pf.load(tmp_path / "store", module=Classifier(3))
    assert torch.equal(again.heads["news"]["classifier.weight"], experts["a"].classifier.weight)


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "no dict": (["a"], TypeError, "expected a dict"),
    "a word": ({"news": "a"}, TypeError, "expected a list of experts' names"),
    "numbers": ({"news": [1]}, TypeError, "expected a list of experts' names"),
    "empty": ({"news": []}, ValueError, "got no experts for objective 'news'"),
    "none at all": ({}, ValueError, "expected at least one"),
    "unknown": ({"news": ["z"]}, ValueError, "got expert 'z' for objective 'news'"),
    "twice": ({"news": ["a"], "poems": ["a"]}, ValueError, "for objective 'news' and for 'poems'"),
    "twice in one": ({"news": ["a", "a"]}, ValueError, "expected it once"),
    "a name of two lines": ({"a\rb": ["a"]}, ValueError, "non-empty single lines"),
    "a zero byte": ({"a\0": ["a"]}, ValueError, "non-empty single lines"),
    "an empty name": ({"": ["a"]}, ValueError, "non-empty single lines"),
    "names that are one text": ({1: ["a"], "1": ["b"]}, ValueError, "names that differ"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused(name: str) -> None:
    base, experts = net_and_experts(count=2)
    given, kind, words = WRONG[name]
    with pytest.raises(kind, match=words):
        pf.stack(base, experts, objectives=given)


Change = Callable[[list[dict[str, Any]]], Any]

ATTACKS: dict[str, tuple[Change, str]] = {
    "none": (lambda m: m.clear(), "got no planes in 'members'"),
    "no object": (lambda m: m.append(3), "expected objects"),
    "a name twice": (lambda m: m.append(m[0]), "appears twice in 'members'"),
    "one less": (lambda m: m.pop(), "got experts of other names than the members'"),
    "another name": (lambda m: m[0].update(plane="z"), "got experts of other names than the members'"),
    "no name": (lambda m: m[0].pop("plane"), "'plane'"),
    "an unknown objective": (lambda m: m[0].update(objective="z"), "expected an objective or null"),
    "a number for one": (lambda m: m[0].update(objective=0), "expected an objective or null"),
    "no share": (lambda m: m[0].pop("share"), "expected a finite number"),
    "an infinite share": (lambda m: m[0].update(share=1e999), "(?s)"),
    "a share of none": (lambda m: m[3].update(share=1), "of no objective, expected 0"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_manifests_that_mean_harm_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "store"
    engine_of(route=lambda n: "one" if n == "token" else None).save(path)
    manifest = json.loads((path / "manifest.json").read_text())
    change, words = ATTACKS[name]
    change(manifest["members"])
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match=words):
        Store.open(path)


def test_an_adapter_of_several_experts(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(8, 6, bias=False))
    torch.manual_seed(0)
    experts = {name: perturbed(base, seed, 0.1) for seed, name in enumerate("abc", 1)}
    engine = pf.stack(
        base, experts, objectives={"news": ["a", "c"], "poems": ["b"]}, planes="lowrank:2",
        route="tensor",
    )  # fmt: skip
    engine.export_adapter(R, tmp_path / "adapter", rank=6)
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    (b,), (a,) = ([t for name, t in held.items() if f"lora_{x}" in name] for x in "BA")
    merged = engine.merge_state_dict(R)["0.weight"]
    torch.testing.assert_close(b @ a, merged - base[0].weight.detach(), rtol=0, atol=1e-5)


def test_a_recipes_merge_is_a_plane_of_no_objective(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A consensus plane: what `paretofuse recipe` makes of the experts stands beside them."""
    pytest.importorskip("yaml", reason="recipes come with the extra `recipe`")
    monkeypatch.chdir(tmp_path)
    base = tiny_gpt2()
    for seed, name in enumerate(("base", "news", "poems")):
        (perturbed(base, seed, 0.02) if seed else base).save_pretrained(name)
    models = "".join(
        f"  - {{model: {name}, parameters: {{weight: 1.0, density: 0.5}}}}\n" for name in ("news", "poems")
    )
    (tmp_path / "ties.yml").write_text(
        f"merge_method: ties\nbase_model: base\nmodels:\n{models}dtype: float32\n"
    )
    pf.run_recipe("ties.yml", "ties")
    experts = {"news": "news", "poems": "poems", "ties": "ties"}
    engine = pf.stack("base", experts, objectives={"news": ["news"], "poems": ["poems"]})
    assert engine.experts == {"news": "news", "poems": "poems", "ties": None}
    weights = engine.routers([0.5, 0.5]).detach()
    assert not weights[:, 2].any()
    alone = torch.zeros_like(weights)
    alone[:, 2] = 1
    merged, ties = engine.merge_state_dict(weights=alone), load_file("ties/model.safetensors")
    for spec in engine.layout.with_role("routed"):
        torch.testing.assert_close(merged[spec.name], ties[spec.name], rtol=0, atol=1e-6)
