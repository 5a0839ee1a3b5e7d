"""Adapters of tied weights: where PEFT's forward pass unties them, one stored tensor cannot hold the expert."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paretofuse as pf
from tests.support.adapters import llama, peft, saved, wrapped
from tests.support.models import tiny_gpt2

pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.arange(1, 9).unsqueeze(0)


def untied(base: nn.Module) -> nn.Module:
    """The remedy of the message."""
    model = copy.deepcopy(base)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def tied_llama() -> nn.Module:
    return llama(tied=True)


ONE_SIDE = {
    "embedding": (tied_llama, {"target_modules": ["embed_tokens"]}),
    "head": (tied_llama, {"target_modules": ["lm_head"]}),
    "both, differently": (tied_llama, {"target_modules": ["embed_tokens", "lm_head"]}),
    "a head of its own": (tied_llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "an embedding of its own": (tied_llama, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "both of their own": (tied_llama, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "GPT-2's embedding": (tiny_gpt2, {"target_modules": ["c_attn", "wte"]}),
}  # fmt: skip


@pytest.mark.parametrize("case", ONE_SIDE)
def test_what_unties_is_refused_and_the_remedy_works(case: str, tmp_path: Path) -> None:
    make, settings = ONE_SIDE[case]
    base = make()
    path, model = saved(base, tmp_path / "lora", **settings), wrapped(base, **settings)
    theirs = logits(model)  # not merged: merge_and_unload() adds to both sides at once
    untied(base).save_pretrained(tmp_path / "untied")
    for expert in (path, model):
        with pytest.raises(pf.CheckpointError, match=r"ties them; untie the base first.*tie_word_embeddings"):
            pf.stack(base, {"x": expert})
        for start in (untied(base), tmp_path / "untied"):
            engine = pf.stack(start, {"x": expert}, static_weight=1.0)
            torch.testing.assert_close(logits(engine.merge([1.0])), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ],
)
def test_adapters_that_keep_the_tie(settings: dict[str, Any], tmp_path: Path) -> None:
    """Each delta counts once (merge_and_unload() adds a tied adapter's twice; the forward pass does not)."""
    base = tied_llama()
    settings = {**settings, "ensure_weight_tying": True}
    path, model = saved(base, tmp_path / "lora", **settings), wrapped(base, **settings)
    reloaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), path)
    for expert, theirs in ((path, logits(reloaded)), (model, logits(model))):
        merged = pf.stack(base, {"x": expert}, static_weight=1.0).merge([1.0])
        assert merged.lm_head.weight is merged.model.embed_tokens.weight
        torch.testing.assert_close(logits(merged), theirs, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(theirs, logits(base))
