"""Trained planes: zero at the start, gradients as autograd has them, resumed, stored, merged everywhere alike."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import paretofuse as pf
from paretofuse.cli import main
from paretofuse.engine.engine import Engine
from paretofuse.engine.planes.trained import TrainedPlanes, trained_planes
from paretofuse.engine.routing.families import FAMILIES
from paretofuse.engine.store.reader import Store
from paretofuse.fronts.workers import store_of
from tests.engine.test_planes import Two, two_experts
from tests.support.cpplib import Library, assert_same_bits
from tests.support.models import net_and_experts

R = [0.2, 0.8]


def planes_of(engine: Engine) -> TrainedPlanes:
    found = trained_planes(engine.routers)
    assert found is not None
    return found


def moved(engine: Engine, seed: int = 1) -> Engine:
    """All that is trained away from its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in engine.routers.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return engine


def small(rank: int = 3, **options: Any) -> Engine:
    engine = two_experts("dense", **options)
    pf.add_planes(engine, rank)
    return engine


def tasks(seed: int = 0) -> dict[str, tuple[Iterable[torch.Tensor], Any]]:
    generator = torch.Generator().manual_seed(seed)
    data = [torch.randn(4, 64, generator=generator) for _ in range(3)]
    return {
        "a": (data, lambda module, x: module(x).square().mean()),
        "b": (data, lambda module, x: (module(x) - 1).square().mean()),
    }


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("family", ["scalar", "rows"])
@pytest.mark.parametrize("init", ["identity", "constant"])
def test_they_change_nothing_at_first(init: str, family: str, backend: str) -> None:
    options = {"init": init, "family": family, "backend": backend}
    plain, engine = two_experts("dense", **options), two_experts("dense", **options)
    held = engine.module
    pf.add_planes(engine, 3, seed=5)
    assert engine.experts == {"a": "a", "b": "b", "a.trained": "a", "b.trained": "b"}
    own = engine.planes["b.trained"]
    assert {name: plane.format for name, plane in own.items()} == dict.fromkeys(
        ("first.weight", "second.weight"), "lowrank"
    )
    assert engine.backend == backend
    assert engine.module is not held
    ours, theirs = engine.merge_state_dict(R), plain.merge_state_dict(R)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    planes = planes_of(engine)
    assert planes.size == 2 * 3 * (96 + 64 + 32 + 96)
    assert all(
        a.any() and not b.any() for b, a in zip(planes.factors[::2], planes.factors[1::2], strict=True)
    )
    weights = engine.routers(R)
    expected = plain.routers(R)
    assert torch.equal(weights[:, :2], expected)
    start = torch.tensor(R) if init == "identity" else torch.tensor([0.3, 0.3])
    assert torch.equal(weights[: len(engine.groups), 2:], start.expand(len(engine.groups), 2))


def test_a_matrix_of_few_rows_takes_a_smaller_rank_and_vectors_take_none() -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts, route=lambda n: None if n.startswith("second") else n)
    pf.add_planes(engine, 100)
    planes = planes_of(engine).planes
    assert [sorted((name, plane.rank) for name, plane in own.items()) for own in planes] == [
        [("first.weight", 8), ("tied.weight", 8)]
    ] * 3, "static tensors, vectors and a single row have none"


def truth(engine: Engine, weights: torch.Tensor, factors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The merged tensors in float64 from float64 leaves: routing weights [G or more, P], factors in their order."""
    left = iter(factors)
    planes: list[dict[str, torch.Tensor]] = []
    for own in engine._stack.planes:
        trained = any(plane.format == "lowrank" for plane in own.values())
        planes.append(
            {
                n: (next(left) @ next(left)).view(p.shape) if trained else p.decode().double()
                for n, p in own.items()
            }
        )
    merged = {}
    for name, spans in engine.layout.spans.items():
        total = engine._stack.base[name].double()
        for j, own in enumerate(planes):
            if name in own:
                c = weights[spans.group, j]
                if len(weights) > len(engine.groups):
                    rows = weights[spans.rows, j]
                    c = c + (rows.view(-1, *[1] * (total.dim() - 1)) if total.dim() > 1 else rows[0])
                if engine.routers.columns is not None and spans.columns is not None:
                    c = c + weights[spans.columns, j]
                total = total + c * own[name]
        merged[name] = total
    return merged


@pytest.mark.parametrize("materialize", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_autograds_in_float64(family: str, materialize: bool) -> None:
    engine = moved(small(family=family))
    planes = planes_of(engine)
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(3))
    weights = engine.routers(R).detach().double().requires_grad_()
    factors = [factor.detach().double().requires_grad_() for factor in planes.factors]
    module = Two().double()
    state = {
        **{n: t.double() for n, t in engine.merge_state_dict(R).items()},
        **truth(engine, weights, factors),
    }
    output = torch.func.functional_call(module, state, (x.double(),))
    exact = torch.autograd.grad(output.square().mean(), [weights, *factors])

    def loss() -> torch.Tensor:
        return (engine.module if materialize else engine.fused_module)(x).square().mean()

    engine.train_at(R, materialize=materialize)
    for factor in planes.factors:
        factor.grad = torch.full_like(factor, torch.nan)  # what parameters hold has no part in a Jacobian
    whole = engine.jacobian([loss()], flat=True)
    found, flat = whole[:, : weights.numel()].view(1, *weights.shape), whole[:, weights.numel() :]
    parts = [
        part.view(f.shape)
        for part, f in zip(flat[0].split([f.numel() for f in factors]), factors, strict=True)
    ]
    for ours, theirs in zip((found[0], *parts), exact, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert torch.equal(engine.jacobian([loss()]), found)
    for factor in planes.factors:
        factor.grad = None
    for times in (1, 2):  # ordinary passes add up
        loss().backward()
        for factor, theirs in zip(planes.factors, exact[1:], strict=True):
            assert factor.grad is not None
            assert (factor.grad - times * theirs).abs().max() <= 1e-5 * times * theirs.abs().max()


def test_a_failed_pass_leaves_nothing_behind() -> None:
    engine = moved(small())
    x = torch.randn(3, 64)
    engine.train_at(R)
    engine.module(x).square().mean().backward()
    once = [factor.grad.clone() for factor in planes_of(engine).factors if factor.grad is not None]
    engine.train_at(R)
    output = engine.module(x)
    hook = engine.module.first.weight.register_hook(lambda gradient: 1 / 0)  # type: ignore[union-attr]
    with pytest.raises(ZeroDivisionError):
        output.square().mean().backward()
    hook.remove()
    for factor in planes_of(engine).factors:
        factor.grad = None
    engine.module(x).square().mean().backward()
    for factor, gradient in zip(planes_of(engine).factors, once, strict=True):
        assert factor.grad is not None
        assert torch.equal(factor.grad, gradient)


@pytest.mark.parametrize("method", ["ls", "epo", "mgda", "stch", "cosmos"])
def test_every_solver_trains_them(method: str) -> None:
    engine = small()
    before = [factor.clone() for factor in planes_of(engine).factors]
    pf.fit(engine, tasks(), method, steps=3, progress=False)
    assert all((f != old).any() for f, old in zip(planes_of(engine).factors, before, strict=True))


def test_a_solver_sees_them_behind_the_routing_weights() -> None:
    engine, seen = small(), []

    def solver(losses: torch.Tensor, jacobian: torch.Tensor, preference: torch.Tensor) -> torch.Tensor:
        seen.append(jacobian)
        return 0 * jacobian[0]

    before = [parameter.clone() for parameter in engine.routers.parameters()]
    pf.fit(engine, tasks(), solver, steps=1, family="scalar", progress=False)
    weights = engine.routers(R)
    assert seen[0].shape == (2, 1, weights.numel() + planes_of(engine).size)
    assert seen[0][0, 0, : weights.numel()].any()
    assert seen[0][0, 0, weights.numel() :].any()
    assert all(torch.equal(p, old) for p, old in zip(engine.routers.parameters(), before, strict=True))


def test_linear_scalarization_steps_along_the_weighted_sum() -> None:
    engine = moved(small())
    twin = copy.deepcopy(planes_of(engine))
    data = tasks()
    record = pf.fit(engine, data, steps=1, plane_lr=0.01, progress=False)[0]
    ray = [record["preference/a"], record["preference/b"]]
    other = moved(small())
    other.train_at(ray)
    batch = next(iter(data["a"][0]))
    total = sum(share * data[name][1](other.module, batch) for share, name in zip(ray, "ab", strict=True))
    total.backward()
    for factor, start, reference in zip(
        planes_of(engine).factors, twin.factors, planes_of(other).factors, strict=True
    ):
        assert reference.grad is not None
        sure = reference.grad.abs() > 1e-6
        torch.testing.assert_close(
            (start - factor)[sure], 0.01 * reference.grad[sure].sign(), rtol=1e-2, atol=0
        )


@pytest.mark.parametrize("materialize", [True, False])
def test_a_resumed_run_equals_an_uninterrupted_one(materialize: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 4, "progress": False, "materialize": materialize, "family": "rows",
                               "plane_lr": 0.02, "plane_shrinkage": 0.5,
                               "plane_orthogonality": 5.0}  # fmt: skip
    whole, first, second = small(), small(), small()
    pf.fit(whole, tasks(), **options)
    path = tmp_path / "run"
    pf.fit(first, tasks(), **options, checkpoint=path, callback=lambda record: record["step"] == 2)
    pf.fit(second, tasks(), **options, checkpoint=path)
    for ours, theirs in zip(whole.routers.parameters(), second.routers.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    for change in ({"plane_lr": 0.03}, {"plane_shrinkage": 0.0}, {"plane_orthogonality": 1.0}):
        with pytest.raises(ValueError, match=next(iter(change))):
            pf.fit(small(), tasks(), **(options | change), checkpoint=path)
    with pytest.raises(ValueError, match="rank=3 "):
        pf.fit(small(2), tasks(), **options, checkpoint=path)
    of_planes = {name: options.pop(name) for name in ("plane_lr", "plane_shrinkage", "plane_orthogonality")}
    with pytest.raises(ValueError, match="experts="):
        pf.fit(two_experts("dense"), tasks(), **options, checkpoint=path)
    longer = pf.fit(second, tasks(), **(options | of_planes | {"steps": 5}), checkpoint=path)
    assert [record["step"] for record in longer] == [5], (
        "the same engine goes on, though its planes have moved"
    )


def test_shrinkage_takes_planes_toward_zero() -> None:
    free, held = moved(small()), moved(small())
    pf.fit(free, tasks(), steps=2, plane_lr=1e-4, progress=False)
    pf.fit(held, tasks(), steps=2, plane_lr=1e-4, plane_shrinkage=1e4, progress=False)
    for theirs, ours in zip(planes_of(free).factors[::2], planes_of(held).factors[::2], strict=True):
        assert ours.abs().max() <= 3e-4 < theirs.abs().max()


def test_a_validation_gives_the_best_planes_back() -> None:
    engine = small()
    seen: list[torch.Tensor] = []

    def worse_each_time(module: nn.Module) -> dict[str, float]:
        seen.append(planes_of(engine).factors[0].detach().clone())
        return {"a": -len(seen), "b": -len(seen)}

    validation = pf.Validation(worse_each_time, every=1, preferences=[R], reference=[-100, -100])
    pf.fit(engine, tasks(), steps=2, validation=validation, progress=False)
    assert (seen[-1] != seen[0]).any()
    assert torch.equal(planes_of(engine).factors[0], seen[0])


def test_merges_follow_their_planes() -> None:
    engine = small()
    with engine.replica(R):
        pass
    engine.switch(R)
    moved(engine)
    exact = truth(engine, engine.routers(R).double(), [f.double() for f in planes_of(engine).factors])
    merged = engine.merge_state_dict(R)
    for name, tensor in exact.items():
        torch.testing.assert_close(merged[name].double(), tensor, rtol=1e-5, atol=1e-6)
    engine.switch(R)
    x = torch.randn(2, 64)
    with engine.replica(R) as replica:
        assert torch.equal(replica(x), engine.module(x))
    for _ in range(2):
        rows = engine.batched([R, R])(x)
        torch.testing.assert_close(rows, engine.merge(R)(x), rtol=1e-4, atol=1e-5)
        moved(engine, 7)


@pytest.mark.parametrize("family", ["scalar", "rows"])
def test_a_store_of_them_merges_to_the_same_bits_everywhere(
    family: str, library: Library, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine, path, out = moved(small(family=family)), tmp_path / "store", tmp_path / "merged.safetensors"
    engine.save(path)
    weights = torch.from_numpy(Store.open(path).routing_weights(np.array(R)))
    expected = engine.merge_state_dict(weights=weights)
    again = pf.load(path, module=Two(), verify=True)
    assert again.experts == engine.experts
    assert again.routers.planes is None
    loaded = again.merge_state_dict(weights=weights)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    opened = library.open(path)
    opened.switch(R)
    assert_same_bits(opened.tensors(), expected)
    assert main(["merge", str(path), "--preference", "a=0.2,b=0.8", "-o", str(out)]) == 0
    written = load_file(out)
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
    capsys.readouterr()
    assert main(["info", str(path)]) == 0
    assert "a, a.trained of a; b, b.trained of b" in capsys.readouterr().out
    pf.add_planes(again)
    assert list(again.experts) == ["a", "b", "a.trained", "b.trained", "a.trained2", "b.trained2"]
    more = again.merge_state_dict(weights=again.routers(R).detach())
    assert all(torch.allclose(more[name], tensor, atol=1e-6) for name, tensor in expected.items())


def test_workers_of_a_sweep_open_what_was_saved(tmp_path: Path) -> None:
    engine = moved(small())
    with pytest.raises(ValueError, match="engine of no store"):
        store_of(engine)
    engine.save(tmp_path / "store")
    opened = store_of(engine).engine().merge_state_dict(R)
    assert all(torch.equal(opened[name], tensor) for name, tensor in engine.merge_state_dict(R).items())
    pf.fit(engine, tasks(), steps=1, progress=False)
    with pytest.raises(ValueError, match="routers differ"):
        store_of(engine)


def test_lora_experts_and_trained_planes_make_an_exact_adapter(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(8, 6, bias=False))
    engine = pf.stack(base, {"a": copy.deepcopy(base), "b": copy.deepcopy(base)}, route="tensor")
    pf.add_planes(engine, 2)
    moved(engine)
    assert engine.export_adapter(R, tmp_path / "adapter") == 0
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    (b,), (a,) = ([t for name, t in held.items() if f"lora_{x}" in name] for x in "BA")
    merged = engine.merge_state_dict(R)["0.weight"]
    torch.testing.assert_close(b @ a, merged - base[0].weight.detach(), rtol=0, atol=1e-5)


def test_a_fused_module_that_is_made_anew_trains_them_alone() -> None:
    engine = moved(small())
    x = torch.randn(3, 64)

    def gradients() -> list[torch.Tensor]:
        for factor in planes_of(engine).factors:
            factor.grad = None
        engine.train_at(R, materialize=False)
        engine.fused_module(x).square().mean().backward()
        return [factor.grad.clone() for factor in planes_of(engine).factors if factor.grad is not None]

    first = gradients()
    held = engine.fused_module  # somebody keeps it
    engine.unload(R)
    assert engine.fused_module is not held
    again = gradients()
    assert len(first) == len(again) == len(planes_of(engine).factors)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    engine.set_family("rows")
    assert all(torch.allclose(a, b, rtol=1e-4) for a, b in zip(first, gradients(), strict=True))


def test_what_is_refused() -> None:
    engine = two_experts("dense")
    for wrong, kind in ((0, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(kind, match="rank"):
            pf.add_planes(engine, wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got Two to add planes to, expected an engine"):
        pf.add_planes(Two())  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"got plane_lr=0\.1 for an engine without trained planes; call pf\.add_planes"
    ):
        pf.fit(engine, tasks(), plane_lr=0.1)
    assert engine.routers.planes is None
    pf.add_planes(engine)
    with pytest.raises(ValueError, match="has trained planes already"):
        pf.add_planes(engine)
    with pytest.raises(ValueError, match="plane_lr=0"):
        pf.fit(engine, tasks(), plane_lr=0)
    with pytest.raises(ValueError, match="expected at most 1 / plane_lr"):
        pf.fit(engine, tasks(), plane_shrinkage=334)
    reference = small(backend="reference")
    with pytest.raises(ValueError, match="materialize=False with trained planes and the reference backend"):
        pf.fit(reference, tasks(), steps=1, materialize=False, progress=False)


TASKS = """
import torch

loss = lambda module, batch: module(batch).square().mean()


def objectives():
    data = [torch.randn(4, 3, generator=torch.Generator().manual_seed(0))]
    return {"news": (data, loss), "poems": (data, loss)}


def build():
    return torch.nn.Linear(3, 2)
"""


def test_the_command_line_trains_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plane_tasks.py").write_text(TASKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    torch.manual_seed(0)
    for name in ("base", "news", "poems"):
        save_file(nn.Linear(3, 2).state_dict(), f"{name}.safetensors")
    experts = ["--expert", "news=news.safetensors", "--expert", "poems=poems.safetensors"]
    assert main(["stack", "base.safetensors", *experts, "-o", "store", "--planes", "dense"]) == 0
    fit = ["fit", "store", "--objectives", "plane_tasks:objectives", "--module", "plane_tasks:build", "--steps", "3",
           "--threads", "1"]  # fmt: skip
    planes = ["--add-planes", "2", "--plane-lr", "0.02", "--plane-shrinkage", "0.1",
              "--plane-orthogonality", "2"]  # fmt: skip
    assert main([*fit, *planes, "-o", "trained"]) == 0
    assert "news, news.trained of news" in capsys.readouterr().out
    engine = pf.load("trained")
    assert engine.planes["news.trained"]["weight"].format == "lowrank"
    assert engine._stack.planes[2]["weight"].decode().any()
    assert main([*fit, "--plane-lr", "0.02", "-o", "other"]) != 0
    assert "without trained planes" in capsys.readouterr().err
