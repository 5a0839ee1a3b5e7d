"""Classifiers whose head an adapter keeps whole (modules_to_save), as objectives' own heads."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import paretofuse as pf
from paretofuse.engine.merging.disk import merge_store
from tests.support.adapters import peft, roberta, saved, wrapped

pytestmark = pytest.mark.filterwarnings("ignore")


SETTINGS = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}


def test_heads_of_lora_experts(tmp_path: Path) -> None:
    """A classifier's LoRA keeps its head whole (modules_to_save); the merge holds that head, bit for bit."""
    from transformers import GPT2Config, GPT2ForSequenceClassification

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )  # fmt: skip
    base = GPT2ForSequenceClassification(config).eval()
    base.save_pretrained(tmp_path / "base")
    settings = {"task_type": "SEQ_CLS", "target_modules": ["c_attn"], "fan_in_fan_out": True}
    experts = {name: saved(base, tmp_path / name, i, **settings) for i, name in enumerate(("cola", "sst2"))}
    trained = {
        name: peft.PeftModel.from_pretrained(copy.deepcopy(base), path).merge_and_unload().eval()
        for name, path in experts.items()
    }
    ids = torch.arange(8).unsqueeze(0)
    pf.stack(tmp_path / "base", experts, heads=["score"]).save(tmp_path / "store")
    for engine in (pf.stack(tmp_path / "base", experts, heads=["score"]), pf.load(tmp_path / "store")):
        for name, model in trained.items():
            merged = engine.merge({name: 1.0}, head=name)
            assert torch.equal(merged.score.weight, model.score.weight)
            torch.testing.assert_close(merged(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-6)
    merge_store(tmp_path / "store", {"cola": 1}, tmp_path / "out", head="cola")
    again = GPT2ForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(again(ids).logits, trained["cola"](ids).logits, rtol=1e-5, atol=1e-6)


def test_heads_with_other_label_counts(tmp_path: Path) -> None:
    """The merged model says how many labels it has, so that its directory opens again."""
    from transformers import RobertaForSequenceClassification

    base = roberta(2)
    base.save_pretrained(tmp_path / "base")
    models = {name: roberta(labels) for name, labels in (("pairs", 2), ("triples", 3), ("one", 1))}
    for model in models.values():  # one backbone under every classifier
        model.roberta.load_state_dict(base.roberta.state_dict())
    experts = {
        name: saved(model, tmp_path / name, i, **SETTINGS) for i, (name, model) in enumerate(models.items())
    }
    theirs = {name: wrapped(model, i, **SETTINGS).eval() for i, (name, model) in enumerate(models.items())}
    ids = torch.arange(3, 9).unsqueeze(0)
    with pytest.raises(pf.CheckpointError, match=r"declare it a head: heads=\['classifier\.out_proj'\]"):
        pf.stack(base, experts)
    for start, own in ((base, experts), (tmp_path / "base", experts), (base, theirs)):
        engine = pf.stack(start, own, heads=["classifier"])
        engine.save(tmp_path / "store")
        for one in (engine, pf.load(tmp_path / "store")):
            for name, model in theirs.items():
                merged = one.merge({name: 1.0}, head=name)
                assert merged.config.num_labels == model.config.num_labels
                torch.testing.assert_close(merged(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-6)
        merge_store(tmp_path / "store", {"triples": 1}, tmp_path / "out", head="triples")
        again = RobertaForSequenceClassification.from_pretrained(tmp_path / "out").eval()
        torch.testing.assert_close(again(ids).logits, theirs["triples"](ids).logits, rtol=1e-5, atol=1e-6)
        for folder in ("store", "out"):
            shutil.rmtree(tmp_path / folder)


def test_a_head_that_the_base_does_not_have(tmp_path: Path) -> None:
    class Body(nn.Module):
        def __init__(self, labels: int | None) -> None:
            super().__init__()
            self.body = nn.Linear(4, 4)
            if labels is not None:
                self.score = nn.Linear(4, labels)

    base = Body(None)
    model = Body(3)
    model.body.load_state_dict(base.body.state_dict())
    settings = {"target_modules": ["body"], "modules_to_save": ["score"]}
    path = saved(model, tmp_path / "lora", **settings)
    with pytest.raises(pf.CheckpointError, match=r"Only in the expert: 'score\..*heads="):
        pf.stack(base, {"x": path})
    theirs = wrapped(model, **settings).merge_and_unload().state_dict()
    ours = pf.stack(base, {"x": path}, heads=["score"]).merge_state_dict([1.0], head="x")
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6)
