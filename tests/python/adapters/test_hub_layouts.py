"""Directories as they lie on hubs, whose keys are not their class's own: transformers' own loading is the truth."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import paretofuse as pf
from paretofuse.api import stack_to_store
from paretofuse.engine.merging.disk import merge_store

transformers = pytest.importorskip("transformers")

State = dict[str, Tensor]
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = {**SMALL, "vocab_size": 40, "max_position_embeddings": 12, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2}  # fmt: skip
VIT = {**SMALL, "image_size": 8, "patch_size": 4}
GPT2 = {"vocab_size": 40, "n_positions": 12, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 0,
        "eos_token_id": 0}  # fmt: skip
EXPERTS = {"num_key_value_heads": 1, "num_experts_per_tok": 2}


def without(part: str, state: State) -> State:
    """The tensors whose names lack some text."""
    return {key: tensor for key, tensor in state.items() if part not in key}


def gpt2_hub(state: State) -> State:
    """GPT-2 as OpenAI's conversion left it: no prefix, and a mask in each layer."""
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 12, 12).tril() for i in range(2)}
    return {key.removeprefix("transformer."): t for key, t in without("lm_head", state).items()} | masks


def gamma_beta(state: State) -> State:
    """BERT's norms by their TensorFlow names, with what pretraining left and the class has no use for."""
    renamed = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for key, tensor in state.items()
    }
    return {**renamed, "cls.seq_relationship.weight": torch.ones(2, 16)}


def with_inv_freq(state: State) -> State:
    """Llama-2's rotary tables, once a stored buffer of each layer."""
    return {**state, **{f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}}


def with_position_ids(state: State) -> State:
    """CLIP's position ids, once a stored buffer."""
    ids = {f"{part}_model.embeddings.position_ids": torch.arange(12)[None] for part in ("text", "vision")}
    return {**state, **ids}


FAMILIES: dict[str, tuple[str, dict[str, Any], Callable[[State], State] | None]] = {
    # the class, its configuration, and how its own tensors become the hub's; None: by save_pretrained
    "gpt2": ("GPT2LMHeadModel", GPT2, gpt2_hub),
    "bert, gamma and beta": ("BertForMaskedLM", TEXT, gamma_beta),
    "bert without pooler": ("BertModel", TEXT, lambda state: without("pooler", state)),
    "bert under its prefix": ("BertModel", TEXT, lambda state: {f"bert.{k}": t for k, t in state.items()}),
    "roberta without head": ("RobertaForMaskedLM", TEXT, lambda state: without("lm_head", state)),
    "vit": ("ViTForImageClassification", VIT, None),
    "deit": ("DeiTForImageClassification", VIT, None),
    "dinov2": ("Dinov2Model", VIT, None),
    "mixtral": ("MixtralForCausalLM", {**TEXT, **EXPERTS, "num_local_experts": 3}, None),
    "qwen2-moe": (
        "Qwen2MoeForCausalLM",
        {**TEXT, **EXPERTS, "num_experts": 3, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8},
        None,
    ),
    "qwen3-moe": ("Qwen3MoeForCausalLM", {**TEXT, **EXPERTS, "num_experts": 3, "moe_intermediate_size": 8}, None),
    "llama, inv_freq": ("LlamaForCausalLM", {**TEXT, "num_key_value_heads": 1}, with_inv_freq),
    "t5": (
        "T5ForConditionalGeneration",
        {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2},
        lambda state: without("lm_head", without("encoder.embed_tokens", without("decoder.embed_tokens", state))),
    ),
    "clip, position_ids": (
        "CLIPModel",
        {"text_config": TEXT, "vision_config": VIT, "projection_dim": 8},
        with_position_ids,
    ),
    "deberta": ("DebertaV2ForMaskedLM", TEXT, None),
}  # fmt: skip


def write(
    path: Path, cls: Any, settings: dict[str, Any], hub: Callable[[State], State] | None, seed: int
) -> None:
    """A model directory in the hub's layout, with random weights."""
    torch.manual_seed(0)
    model = cls(cls.config_class(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    model.save_pretrained(path)
    if hub is not None:
        state = {key: tensor.clone() for key, tensor in hub(model.state_dict()).items()}
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})


def opened(cls: Any, path: Path) -> tuple[nn.Module, dict[str, set[Any]]]:
    """What from_pretrained makes of a directory, and what it says of its keys."""
    model, loading = cls.from_pretrained(path, output_loading_info=True)
    return model.eval(), {
        kind: set(loading[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_memory_and_disk_give_one_model(family: str, tmp_path: Path) -> None:
    name, settings, hub = FAMILIES[family]
    cls = getattr(transformers, name)
    paths = {part: tmp_path / part for part in ("base", "a", "b")}
    for seed, path in enumerate(paths.values()):
        write(path, cls, settings, hub, seed)
    theirs = {part: opened(cls, path) for part, path in paths.items()}
    (base, loading), a, b = theirs["base"], theirs["a"][0].state_dict(), theirs["b"][0].state_dict()
    truth = {
        key: w.double() + 0.3 * (a[key].double() - w.double()) + 0.7 * (b[key].double() - w.double())
        if w.is_floating_point()
        else w
        for key, w in base.state_dict().items()
        if key not in loading["missing_keys"]
    }  # fmt: skip
    experts = {"a": paths["a"], "b": paths["b"]}
    engine = pf.stack(paths["base"], experts)
    stack_to_store(paths["base"], experts, tmp_path / "streamed")
    engine.save(tmp_path / "saved")
    merge_store(tmp_path / "saved", [0.3, 0.7], tmp_path / "merged")
    engine.switch([0.3, 0.7])
    again, loading_again = opened(cls, tmp_path / "merged")
    assert loading_again == loading
    models = {
        "merge": engine.merge([0.3, 0.7]),
        "switch": engine.module,
        "saved": pf.load(tmp_path / "saved").merge([0.3, 0.7]),
        "streamed": pf.load(tmp_path / "streamed").merge([0.3, 0.7]),
        "merged": again,
    }
    for way, model in models.items():
        state = model.state_dict()
        assert type(model) is cls, way
        assert state.keys() == base.state_dict().keys(), way
        for key, value in truth.items():
            torch.testing.assert_close(
                state[key].double(), value.double(), rtol=1e-6, atol=1e-6, msg=f"{way} {key}"
            )
    for key in loading["missing_keys"]:  # no file holds them: one initial value everywhere in memory
        for way in ("switch", "saved", "streamed"):
            assert torch.equal(models[way].state_dict()[key], models["merge"].state_dict()[key]), (way, key)
    in_memory = pf.stack(base, {part: theirs[part][0] for part in ("a", "b")}).merge([0.3, 0.7]).state_dict()
    for key, value in truth.items():
        torch.testing.assert_close(in_memory[key].double(), value.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_experts_in_another_layout_than_their_base(tmp_path: Path) -> None:
    """The same values as the class's own directory, a hub's, a bare file of each, a wrapper's file, a bare encoder."""
    cls = transformers.GPT2LMHeadModel
    write(tmp_path / "base", cls, GPT2, None, 0)
    write(tmp_path / "own", cls, GPT2, None, 1)
    write(tmp_path / "hub", cls, GPT2, gpt2_hub, 1)
    own = load_file(tmp_path / "own" / "model.safetensors")
    for name, prefix in (("parallel", "module."), ("compiled", "_orig_mod."), ("both", "module._orig_mod.")):
        save_file({prefix + key: tensor for key, tensor in own.items()}, tmp_path / f"{name}.safetensors")
    inner = {
        key.replace("transformer.h.0.", "transformer.h.0._orig_mod."): tensor for key, tensor in own.items()
    }
    experts = {
        "hub": tmp_path / "hub",
        "file": tmp_path / "hub" / "model.safetensors",
        "parallel": tmp_path / "parallel.safetensors",
        "compiled": tmp_path / "compiled.safetensors",
        "both": tmp_path / "both.safetensors",
        "layer": inner,
        "state": {f"module.{key}": tensor for key, tensor in own.items()},
    }  # fmt: skip
    for base in (tmp_path / "base", cls.from_pretrained(tmp_path / "base")):
        truth = pf.stack(base, {"own": tmp_path / "own"}).merge([1.0]).state_dict()
        engine = pf.stack(base, experts)
        for name in experts:
            merged = engine.merge({name: 1.0}).state_dict()
            assert all(torch.equal(merged[key], truth[key]) for key in truth), name


def test_bert_without_its_prefix_under_a_base_with_it(tmp_path: Path) -> None:
    """A sentence encoder saved as BertModel is an expert of a BertForMaskedLM; only its head is its base's."""
    write(tmp_path / "base", transformers.BertForMaskedLM, TEXT, None, 0)
    write(tmp_path / "expert", transformers.BertModel, TEXT, None, 1)
    engine = pf.stack(tmp_path / "base", {"a": tmp_path / "expert"}, heads=["cls"])
    expert = transformers.BertModel.from_pretrained(tmp_path / "expert").state_dict()
    merged = engine.merge([1.0]).state_dict()
    for key, tensor in expert.items():
        if "pooler" not in key:
            torch.testing.assert_close(merged[f"bert.{key}"], tensor, rtol=1e-6, atol=1e-6)
    assert any("has no use for 'pooler.dense.bias'" in note for note in engine.notes)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_a_base_saved_from_within_a_wrapper(family: str, prefix: str, tmp_path: Path) -> None:
    name, settings, _ = FAMILIES[family]
    cls = getattr(transformers, name)
    for part, seed in (("base", 0), ("a", 1)):
        write(tmp_path / part, cls, settings, None, seed)
    truth = pf.stack(tmp_path / "base", {"a": tmp_path / "a"}).merge([1.0]).state_dict()
    for part in ("base", "a"):
        state = load_file(tmp_path / part / "model.safetensors")
        save_file({prefix + k: t for k, t in state.items()}, tmp_path / part / "model.safetensors")
    engine = pf.stack(tmp_path / "base", {"a": tmp_path / "a"})
    merged = engine.merge([1.0]).state_dict()
    assert merged.keys() == truth.keys()
    assert all(torch.equal(merged[key], truth[key]) for key in truth)
    engine.save(tmp_path / "store")
    merge_store(tmp_path / "store", [1.0], tmp_path / "merged")
    again, loading = opened(cls, tmp_path / "merged")
    assert not any(loading.values())
    assert all(torch.equal(again.state_dict()[key], truth[key]) for key in truth)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("differ", [True, False])
def test_a_configuration_that_ties_what_the_file_holds_twice(differ: bool, tmp_path: Path) -> None:
    """As from_pretrained: untied where the values differ, in memory, in the store and in the merged directory."""
    cls = transformers.GPT2LMHeadModel
    for part, seed in (("base", 0), ("a", 1)):
        write(tmp_path / part, cls, GPT2, None, seed)
        state = load_file(tmp_path / part / "model.safetensors")
        state["lm_head.weight"] = state["transformer.wte.weight"] + float(differ)
        save_file(state, tmp_path / part / "model.safetensors", metadata={"format": "pt"})
    engine = pf.stack(tmp_path / "base", {"a": tmp_path / "a"})
    engine.save(tmp_path / "store")
    merge_store(tmp_path / "store", [1.0], tmp_path / "merged")
    engine.switch([1.0])
    truth = cls.from_pretrained(tmp_path / "a").state_dict()
    loaded = pf.load(tmp_path / "store")
    again = cls.from_pretrained(tmp_path / "merged")
    for model in (engine.merge([1.0]), engine.module, loaded.merge([1.0]), loaded.module, again):
        assert (model.lm_head.weight is model.transformer.wte.weight) is not differ
        for key, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, truth[key], rtol=1e-6, atol=1e-6)
    engine.merge([1.0]).save_pretrained(tmp_path / "saved")
    saved = cls.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(tensor, saved[key]) for key, tensor in engine.merge([1.0]).state_dict().items())
    in_memory = pf.stack(cls.from_pretrained(tmp_path / "base"), {"a": cls.from_pretrained(tmp_path / "a")})
    in_memory.save(tmp_path / "memory")
    for key, tensor in pf.load(tmp_path / "memory").merge([1.0]).state_dict().items():
        torch.testing.assert_close(tensor, truth[key], rtol=1e-6, atol=1e-6)


def test_a_configuration_of_another_model_names_the_tensor(tmp_path: Path) -> None:
    write(tmp_path / "base", transformers.GPT2LMHeadModel, GPT2, None, 0)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "n_positions": 13}))
    with pytest.raises(
        pf.CheckpointError, match=r"wpe.weight' has shape \[12, 16\], but config.json makes it \[13, 16\]"
    ):
        pf.stack(tmp_path / "base", {"a": tmp_path / "base"})
