"""Consensus planes: each method's formula, RegMean's least squares on the experts' inputs, merges left as they are."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils import merge_utils
from safetensors.torch import load_file
from torch import Tensor, nn

import paretofuse as pf
from paretofuse.cli import main
from paretofuse.engine.engine import Engine
from paretofuse.engine.methods.consensus import BY_DIFFERENCES
from tests.engine.test_planes import Two, two_experts
from tests.methods.test_singular_values import iso_formula, tsv_formula
from tests.support.models import perturbed, tiny_gpt2

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # of peft

R = [0.2, 0.8]


def tasks(seed: int = 0, width: int = 64) -> dict[str, tuple[list[Tensor], Any]]:
    generator = torch.Generator().manual_seed(seed)
    data = [[torch.randn(40, width, generator=generator) for _ in range(3)] for _ in "ab"]
    return {
        "a": (data[0], lambda module, x: module(x).square().mean()),
        "b": (data[1], lambda module, x: (module(x) - 1).square().mean()),
    }


def last_plane(engine: Engine) -> dict[str, Tensor]:
    return {name: plane.decode() for name, plane in engine._stack.planes[-1].items()}


def deltas_of(engine: Engine, name: str) -> list[Tensor]:
    return [own[name].decode().double() for own in engine._stack.planes[:2]]


def ties(deltas: list[Tensor]) -> Tensor:
    merged: Tensor = merge_utils.ties(deltas, torch.ones(len(deltas)), density=0.2)
    return merged


def mean(deltas: list[Tensor]) -> Tensor:
    return torch.stack(deltas).mean(0)


FORMULAS: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "iso_c": iso_formula,
    "iso_c:lambda=0.5": lambda deltas: 0.5 * iso_formula(deltas),
    "tsv": tsv_formula,
    "ties:density=0.2": ties,
    "task_arithmetic": lambda deltas: torch.stack(deltas).sum(0),
}


@pytest.mark.parametrize("method", FORMULAS)
def test_a_matrix_is_merged_by_the_methods_formula(method: str) -> None:
    engine = two_experts("dense")
    pf.add_consensus(engine, method)
    found = last_plane(engine)
    assert set(found) == {spec.name for spec in engine.layout.with_role("routed")}
    for name in ("first.weight", "second.weight"):
        torch.testing.assert_close(
            found[name].double(), FORMULAS[method](deltas_of(engine, name)), rtol=1e-4, atol=1e-6
        )


def test_every_method_of_differences_can_be_named() -> None:
    assert {"ties", "dare_linear", "dare_ties", "della", "breadcrumbs", "model_stock", "tsv", "iso_c"} <= set(
        BY_DIFFERENCES
    )
    for method in BY_DIFFERENCES:
        engine = two_experts("dense")
        pf.add_consensus(engine, method)
        assert engine.experts == {"a": "a", "b": "b", method: None}
        assert all(torch.isfinite(plane).all() for plane in last_plane(engine).values())


def test_a_seed_draws_the_same_again_and_another_seed_something_else() -> None:
    def drawn(seed: int) -> Tensor:
        engine = two_experts("dense")
        pf.add_consensus(engine, f"dare_linear:density=0.3,seed={seed}")
        return last_plane(engine)["first.weight"]

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("family", ["scalar", "rows"])
@pytest.mark.parametrize("init", ["identity", "sqrt", "constant"])
def test_it_changes_nothing_before_it_is_trained(init: str, family: str, backend: str) -> None:
    engine = two_experts("dense", init=init, family=family, backend=backend)
    before, held = engine.merge_state_dict(R), engine.module
    pf.add_consensus(engine, "iso_c")
    assert engine.module is not held
    assert engine.backend == backend
    after = engine.merge_state_dict(R)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    start = engine.routers(R).detach()
    assert not start[..., 2].any()
    pf.fit(engine, tasks(), steps=3, progress=False)
    assert engine.routers(R)[..., 2].abs().max() > 0.01, "its coefficient is learned"


def least_squares(
    experts: Iterable[nn.Module],
    data: Sequence[Sequence[Tensor]],
    layer: str,
    base: nn.Module,
    scale: float,
    conv1d: bool = False,
) -> Tensor:
    """RegMean in float64, from the experts themselves: (sum W_k G_k) (sum G_k)^-1 [O, I], less the base's weight."""
    name, total, weighted = f"{layer}.weight", torch.zeros(()), torch.zeros(())
    for expert, batches in zip(experts, data, strict=True):
        wide, seen = copy.deepcopy(expert).double(), []
        wide.get_submodule(layer).register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            for batch in batches:
                wide(batch.double() if batch.is_floating_point() else batch)
        x = torch.cat([inputs.flatten(0, -2) for inputs in seen])
        gram = x.T @ x / len(x)
        gram = torch.where(torch.eye(len(gram), dtype=torch.bool), gram, scale * gram)
        weight = wide.get_parameter(name).detach()
        total, weighted = total + gram, weighted + (weight.T if conv1d else weight) @ gram
    before = base.get_parameter(name).detach().double()
    return weighted @ torch.linalg.inv(total) - (before.T if conv1d else before)


@pytest.mark.parametrize("scale", [0.9, 0.5, 0.0])
def test_regmean_is_the_papers_formula_on_the_experts_own_inputs(scale: float) -> None:
    torch.manual_seed(0)
    base = Two().eval()
    experts = {"a": perturbed(base, 1, 0.1), "b": perturbed(base, 2, 0.1)}
    engine, found = pf.stack(base, experts), tasks()
    engine.module.train()  # RegMean looks at eval mode, and leaves the mode of what it builds alone
    pf.add_consensus(engine, f"regmean:scale={scale}", objectives=found, batches=3)
    plane = last_plane(engine)
    for layer in ("first", "second"):
        expected = least_squares(
            list(experts.values()), [data for data, _ in found.values()], layer, base, scale
        )
        torch.testing.assert_close(plane[f"{layer}.weight"].double(), expected, rtol=1e-3, atol=1e-4)
    for name in ("first.bias", "norm.weight", "norm.bias", "second.bias"):
        torch.testing.assert_close(plane[name].double(), mean(deltas_of(engine, name)), rtol=1e-6, atol=1e-8)


def test_with_all_products_it_is_the_least_squares_solution() -> None:
    """On inputs that determine it, no other matrix comes nearer to what the experts give."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 4, bias=False))
    experts = {name: perturbed(base, seed, 0.5) for seed, name in enumerate("ab", 1)}
    engine, found = pf.stack(base, experts), tasks(width=6)
    pf.add_consensus(engine, "regmean:scale=1", objectives=found, batches=3)
    x = [torch.cat(data).double() for data, _ in found.values()]
    y = [own @ delta.T for own, delta in zip(x, deltas_of(engine, "0.weight"), strict=True)]
    solution = torch.linalg.lstsq(torch.cat(x), torch.cat(y)).solution.T
    torch.testing.assert_close(last_plane(engine)["0.weight"].double(), solution, rtol=1e-4, atol=1e-5)


def test_where_no_input_is_active_it_is_the_experts_mean() -> None:
    base = nn.Sequential(nn.Linear(6, 4, bias=False))
    engine = pf.stack(base, {name: perturbed(base, seed, 0.5) for seed, name in enumerate("ab", 1)})
    found = tasks(width=6)
    for data, _ in found.values():
        for batch in data:
            batch[:, 2:4] = 0
    pf.add_consensus(engine, "regmean", objectives=found)
    plane, average = last_plane(engine)["0.weight"].double(), mean(deltas_of(engine, "0.weight"))
    torch.testing.assert_close(plane[:, 2:4], average[:, 2:4], rtol=1e-5, atol=1e-7)
    assert (plane[:, :2] - average[:, :2]).abs().max() > 1e-3


class Alone(nn.Module):
    """Gives its layer one example without an axis for others."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.layer(row) for row in x])


def test_regmean_takes_inputs_of_one_axis() -> None:
    torch.manual_seed(0)
    base, data = Alone().eval(), [torch.randn(8, 6)]
    experts = {"a": perturbed(base, 1, 0.1), "b": perturbed(base, 2, 0.1)}
    merged = []
    for model in (Alone, nn.Linear):
        engine = pf.stack(base, experts)
        own = Alone.forward if model is Alone else lambda module, x: module.layer(x)
        found = {name: (data, lambda module, x, own=own: own(module, x).square().mean()) for name in experts}
        pf.add_consensus(engine, "regmean", objectives=found)
        merged.append(last_plane(engine)["layer.weight"])
    torch.testing.assert_close(*merged)


def test_regmean_sees_the_inputs_of_torchs_own_encoder_with_padding() -> None:
    merged = []
    data, padding = [torch.randn(3, 5, 8)], torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True

    def loss(module: nn.Module, x: Tensor) -> Tensor:
        found: Tensor = module(x, src_key_padding_mask=padding)[~padding].square().mean()
        return found

    for shortcut in (True, False):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        base = nn.TransformerEncoder(layer, 2, enable_nested_tensor=shortcut).eval()
        engine = pf.stack(base, {"a": perturbed(base, 1, 0.1), "b": perturbed(base, 2, 0.1)})
        pf.add_consensus(engine, "regmean", objectives={name: (data, loss) for name in engine.objectives})
        merged.append(last_plane(engine))
    torch.testing.assert_close(*merged)


def test_layers_that_keep_their_weight_the_other_way_round_and_ties() -> None:
    """GPT-2's Conv1D [I, O]; its embedding, which the output layer shares, is no linear layer's alone: the mean."""
    base = tiny_gpt2()
    experts = {name: perturbed(base, seed, 0.05) for seed, name in enumerate("ab", 1)}
    generator = torch.Generator().manual_seed(0)
    data = [[torch.randint(0, 101, (8, 16), generator=generator) for _ in range(4)] for _ in "ab"]
    loss = lambda module, ids: module(input_ids=ids, labels=ids).loss  # noqa: E731
    engine = pf.stack(base, experts)
    pf.add_consensus(engine, "regmean", objectives={"a": (data[0], loss), "b": (data[1], loss)}, batches=4)
    plane, name = last_plane(engine), "transformer.h.1.mlp.c_fc"
    expected = least_squares(experts.values(), data, name, base, 0.9, conv1d=True).T
    torch.testing.assert_close(plane[f"{name}.weight"].double(), expected, rtol=1e-3, atol=2e-4)
    tied = "transformer.wte.weight"
    torch.testing.assert_close(plane[tied].double(), mean(deltas_of(engine, tied)), rtol=1e-6, atol=1e-8)


def test_experts_of_one_objective_count_each_and_those_of_none_do_not() -> None:
    base = Two().eval()
    experts = {name: perturbed(base, seed, 0.01) for seed, name in enumerate(("x", "y", "z", "w"), 1)}
    engine = pf.stack(base, experts, objectives={"a": ["x", "y"], "b": ["z"]})
    pf.add_consensus(engine, "task_arithmetic")
    pf.add_consensus(engine, "task_arithmetic:lambda=2")
    pf.add_consensus(engine, "regmean", objectives=tasks())
    assert list(engine.experts) == ["x", "y", "z", "w", "task_arithmetic", "task_arithmetic2", "regmean"]
    planes = [own["first.weight"].decode() for own in engine._stack.planes]
    torch.testing.assert_close(planes[4], sum(planes[:3]), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(planes[5], 2 * sum(planes[:3]), rtol=1e-6, atol=1e-8)


def test_what_no_expert_changes_has_no_plane() -> None:
    base = Two().eval()
    experts = {name: copy.deepcopy(base) for name in "ab"}
    with torch.no_grad():
        experts["a"].first.weight += 0.5
    engine = pf.stack(base, experts)
    pf.add_consensus(engine, "iso_c")
    assert set(last_plane(engine)) == {"first.weight"}


@pytest.mark.parametrize("word", ["int8", "int4", "lowrank:4"])
def test_it_is_held_in_any_format_and_stored(word: str, tmp_path: Path) -> None:
    engine = two_experts(word)
    pf.add_consensus(engine, "iso_c", planes=word)
    exact = two_experts(word)
    pf.add_consensus(exact, "iso_c")
    assert engine.planes["iso_c"]["first.weight"].format == word.partition(":")[0]
    assert engine.planes["iso_c"]["first.bias"].format == "dense"
    bound = {"int8": 0.01, "int4": 0.1, "lowrank:4": 1.0}[word]
    ours, theirs = last_plane(engine)["first.weight"], last_plane(exact)["first.weight"]
    assert 0 < (ours - theirs).norm() <= bound * theirs.norm()

    weights = torch.rand(len(engine.groups), 3)
    expected = engine.merge_state_dict(weights=weights)
    engine.save(tmp_path / "store")
    again = pf.load(tmp_path / "store", module=Two())
    assert again.experts == engine.experts
    loaded = again.merge_state_dict(weights=weights)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_a_loss_that_fails_leaves_the_engine_as_it_was() -> None:
    engine = two_experts("dense")
    before, held = engine.merge_state_dict(R), engine.module

    def fails(module: nn.Module, x: Tensor) -> Tensor:
        raise RuntimeError("no data today")

    with pytest.raises(RuntimeError, match="no data today"):
        pf.add_consensus(engine, "regmean", objectives={**tasks(), "b": ([torch.ones(2, 64)], fails)})
    assert engine.module is held
    assert list(engine.experts) == ["a", "b"]
    after = engine.merge_state_dict(R)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_what_is_refused() -> None:
    engine, objectives = two_experts("dense"), tasks()
    for method, options, kind, words in (
        (
            "median",
            {},
            ValueError,
            r"the method 'median', expected one of task_arithmetic, .*, regmean, such as",
        ),
        ("iso_c:density=1", {}, ValueError, r"iso_c has no 'density=1'; expected NAME=VALUE of lambda, seed"),
        ("ties:density=2", {}, ValueError, "density: '2', expected 0 to 1"),
        ("regmean:scale=2", {"objectives": objectives}, ValueError, "scale: '2', expected 0 to 1"),
        ("regmean", {}, ValueError, "without objectives, expected them for 'regmean'"),
        ("iso_c", {"objectives": objectives}, ValueError, "with objectives, expected them for 'regmean'"),
        (
            "regmean",
            {"objectives": {"a": objectives["a"]}},
            ValueError,
            r"expected one for each of \['a', 'b'\]",
        ),
        ("regmean", {"objectives": objectives, "batches": 0}, ValueError, "batches=0, expected at least 1"),
        ("iso_c", {"planes": "int7"}, ValueError, "got planes='int7'"),
        (
            "iso_c",
            {"planes": "bf16"},
            ValueError,
            "got planes='bf16', expected dense, which has the dtype of",
        ),
        (3, {}, TypeError, "the method 3, expected a text"),
    ):
        with pytest.raises(kind, match=words):
            pf.add_consensus(engine, method, **options)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got Two to add a plane to, expected an engine"):
        pf.add_consensus(Two(), "iso_c")  # type: ignore[arg-type]
    alone = pf.stack(Two(), {"a": Two()})
    with pytest.raises(ValueError, match="got 1 expert of an objective, expected at least two"):
        pf.add_consensus(alone)
    pf.add_planes(engine, 2)
    with pytest.raises(ValueError, match=r"call pf\.add_consensus before pf\.add_planes"):
        pf.add_consensus(engine)
    assert list(engine.experts) == ["a", "b", "a.trained", "b.trained"]


TASKS = """
import torch

loss = lambda module, batch: module(input_ids=batch, labels=batch).loss


def objectives():
    generator = torch.Generator().manual_seed(0)
    data = [torch.randint(0, 101, (4, 16), generator=generator) for _ in range(3)]
    return {"a": (data, loss), "b": (data[::-1], loss)}
"""


@pytest.mark.parametrize("method", ["iso_c", "regmean"])
def test_on_the_command_line(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny_gpt2()
    base.save_pretrained(tmp_path / "base")
    for seed, name in enumerate("ab", 1):
        perturbed(base, seed, 0.02).save_pretrained(tmp_path / name)  # type: ignore[operator]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "consensus_tasks.py").write_text(TASKS, encoding="utf-8")
    assert main(["stack", "base", "--expert", "a=a", "--expert", "b=b", "-o", "both.store"]) == 0
    fit = ["fit", "both.store", "--objectives", "consensus_tasks:objectives", "--steps", "2"]
    assert main([*fit, "--add-consensus", method, "-o", "trained.store"]) == 0
    capsys.readouterr()
    assert main(["info", "trained.store"]) == 0
    assert f"{method} of no objective" in capsys.readouterr().out
    assert main(["merge", "trained.store", "--preference", "a=0.4,b=0.6", "-o", "merged"]) == 0
    assert load_file(tmp_path / "merged" / "model.safetensors")
    capsys.readouterr()
    assert main([*fit, "--add-consensus", "iso_d", "-o", "no.store"]) != 0
    assert "expected one of" in capsys.readouterr().err
    assert not (tmp_path / "no.store").exists()
