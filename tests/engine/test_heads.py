"""Heads: tensors that one objective keeps for itself, in merges and in stores."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import paretofuse as pf
from tests.support.models import perturbed, tiny_gpt2


class Classifier(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.classifier = nn.Linear(4, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.body(x))


def test_heads_of_each_objective() -> None:
    torch.manual_seed(0)
    base = Classifier(2)
    experts = {"cola": Classifier(2), "mnli": Classifier(3)}
    with pytest.raises(pf.CheckpointError, match=r"classifier.weight.*\[3, 4\].*\[2, 4\].*heads"):
        pf.stack(base, experts)
    engine = pf.stack(base, experts, heads=["classifier"])
    assert set(engine.tensor_groups) == {"body.weight", "body.bias"}
    for name, expert in experts.items():
        merged = engine.merge({name: 1.0}, head=name)
        x = torch.randn(5, 4)
        torch.testing.assert_close(merged(x), expert(x))
        assert torch.equal(merged.classifier.weight, expert.classifier.weight)
    assert torch.equal(engine.merge({"cola": 1.0}).classifier.weight, base.classifier.weight)
    assert engine.heads["mnli"]["classifier.bias"].shape == (3,)
    with pytest.raises(ValueError, match="got head='x'"):
        engine.merge({"cola": 1.0}, head="x")


def test_heads_that_only_experts_have() -> None:
    torch.manual_seed(0)
    base = {"body.weight": torch.randn(4, 4), "body.bias": torch.randn(4)}
    experts = {"a": Classifier(2), "b": Classifier(3)}
    with pytest.raises(pf.CheckpointError, match=r"Only in the expert: 'classifier\.weight'"):
        pf.stack(base, experts)
    engine = pf.stack(base, experts, heads=["classifier"])
    merged = engine.merge({"b": 1.0}, head="b")
    x = torch.randn(5, 4)
    torch.testing.assert_close(merged(x), experts["b"](x))


def test_heads_whose_tensors_are_tied() -> None:
    class Twice(Classifier):
        def __init__(self, seed: int) -> None:
            torch.manual_seed(seed)
            super().__init__(2)
            self.again = nn.Linear(4, 2)
            self.again.weight = self.classifier.weight

    base, expert = Twice(0), Twice(1)
    engine = pf.stack(base, {"a": expert}, heads=["classifier", "again"])
    merged, tensors = engine.merge([1.0], head="a"), engine.merge_state_dict([1.0], head="a")
    assert merged.again.weight is merged.classifier.weight
    for found in (merged.classifier.weight, tensors["classifier.weight"], tensors["again.weight"]):
        assert torch.equal(found, expert.classifier.weight)
    # The same where the base has no head at all.
    body = {name: t for name, t in base.state_dict().items() if name.startswith("body")}
    engine = pf.stack(body, {"a": expert}, heads=["classifier", "again"])
    torch.testing.assert_close(engine.merge([1.0], head="a").classifier.weight, expert.classifier.weight)


def test_head_names_that_match_nothing() -> None:
    base, experts = Classifier(2), {"a": Classifier(2)}
    with pytest.raises(ValueError, match=r"'clasifier' matches no tensor; correct"):
        pf.stack(base, experts, heads=["clasifier"])
    gpt2 = tiny_gpt2()
    with pytest.raises(ValueError, match=r"'lm_head.weight' is tied to 'transformer.wte.weight'"):
        pf.stack(gpt2, {"a": perturbed(gpt2, 1)}, heads=["lm_head"])


def test_a_store_with_heads_and_a_given_module(tmp_path: Path) -> None:
    base, experts = Classifier(2), {"a": Classifier(2), "b": Classifier(3)}
    pf.stack(base, experts, heads=["classifier"]).save(tmp_path / "store")
    engine = pf.load(tmp_path / "store", module=Classifier(2))
    assert torch.equal(engine.merge([0, 1], head="b").classifier.weight, experts["b"].classifier.weight)
    with pytest.raises(ValueError, match="the store's tensors and Linear do not fit"):
        pf.load(tmp_path / "store", module=nn.Linear(7, 7))
