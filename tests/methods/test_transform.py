"""Experts whose differences were transformed are what mergekit's methods make of them, one expert at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import paretofuse as pf
from paretofuse.api import stack_to_store
from paretofuse.engine.methods.deltas import agreement
from paretofuse.engine.methods.random import key_of
from paretofuse.engine.methods.registry import by_name
from paretofuse.engine.methods.transform import parse_transform
from tests.support.command import call
from tests.support.models import net_and_experts

State = dict[str, torch.Tensor]


def stacked(transform: str | None, **options: object) -> tuple[pf.Engine, State, dict[str, State]]:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts, route="tensor", transform=transform, **options)  # type: ignore[arg-type]
    return engine, base.state_dict(), {name: model.state_dict() for name, model in experts.items()}


@pytest.mark.parametrize(
    "text",
    [
        "ties:density=0.3",
        "dare_linear:density=0.5,seed=7",
        "dare_ties:density=0.4",
        "breadcrumbs:density=0.6,gamma=0.1",
        "della:density=0.5,epsilon=0.2,rescale=false",
    ],
)
def test_each_expert_is_the_base_and_its_transformed_difference(text: str) -> None:
    engine, base, experts = stacked(text)
    transform = parse_transform(text)
    method = by_name()[text.partition(":")[0]]
    for name in engine.tensor_groups:
        deltas = [(own[name] - base[name]).numpy() for own in experts.values()]
        thinned = [
            transform.method.thin(
                delta, transform.options, transform.options["rescale"], key_of(transform.seed, name, k)
            )
            for k, delta in enumerate(deltas)
        ]
        if transform.method.elects:
            thinned = [np.where(kept, own, 0) for kept, own in zip(agreement(thinned), thinned, strict=True)]
        for k, objective in enumerate(experts):
            found = engine.merge_state_dict({objective: 1.0})[name]
            np.testing.assert_allclose(found.numpy(), base[name].numpy() + thinned[k], rtol=1e-6, atol=1e-6)
    assert transform.method is method
    assert any(text in note for note in engine.notes)


def test_a_store_holds_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts, transform="ties:density=0.2")
    stack_to_store(base, experts, tmp_path / "store", transform="ties:density=0.2")
    loaded = pf.load(tmp_path / "store", module=base)
    shares = {name: 1 / 3 for name in experts}
    ours, theirs = engine.merge_state_dict(shares), loaded.merge_state_dict(shares)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    code, _, err = call(
        capsys, "stack", tmp_path / "none", "--expert", "a=x", "--transform", "mean", "-o", tmp_path / "out"
    )
    assert code == 1
    assert "--transform" in err


def test_planes_of_any_format_hold_transformed_differences() -> None:
    exact = stacked("ties:density=0.3")[0].merge_state_dict({"a": 1.0})
    held = stacked("ties:density=0.3", planes="int8")[0].merge_state_dict({"a": 1.0})
    assert all(torch.allclose(exact[name], held[name], atol=5e-3) for name in exact)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("linear", "expected one of ties, dare_linear"),
        ("task_arithmetic", "expected one of ties, dare_linear"),
        ("slerp:t=0.5", "expected one of ties, dare_linear"),
        ("ties:weight=0.5", "ties has no 'weight=0.5'; expected NAME=VALUE of density, rescale, seed"),
        ("ties:density", "ties has no 'density'"),
        ("ties:density=much", "got density: 'much', expected a finite number"),
        ("ties:seed=x", "ties has no 'seed=x'"),
    ],
)
def test_what_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        stacked(text)
    with pytest.raises(TypeError, match="expected a text such as"):
        stacked(3)  # type: ignore[arg-type]
