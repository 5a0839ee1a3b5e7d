"""LoRA directories: what PEFT itself makes of them, or a refusal that names the key and what to do."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import paretofuse as pf
from paretofuse.api import stack_to_store
from tests.support.adapters import (
    C_ATTN,
    CASES,
    Q,
    check,
    convolutions,
    fill,
    llama,
    merged_by_peft,
    merged_by_us,
    mixtral,
    saved,
    stacked,
    wrapped,
)
from tests.support.models import perturbed, same, tiny_gpt2

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("case", CASES)
def test_the_merge_is_pefts_own(case: str, tmp_path: Path) -> None:
    make, settings = CASES[case]
    base = make()
    path = saved(base, tmp_path / "lora", **settings)
    check(merged_by_us(base, path), merged_by_peft(base, path), base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_embedding(dtype: torch.dtype, tmp_path: Path) -> None:
    base = llama().to(dtype)
    path = saved(base, tmp_path / "lora", target_modules=["embed_tokens", "q_proj"])
    ours, theirs = merged_by_us(base, path), merged_by_peft(base, path)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=2**-6, atol=1e-3, msg=name)


def test_an_unchanged_copy_of_the_weight_leaves_the_factors_exact(tmp_path: Path) -> None:
    """The embedding's own weight lies in the file; as it is the base's, the delta stays of rank 4."""
    from paretofuse.adapters.resolve import resolve

    base = llama()
    path = saved(base, tmp_path / "lora", target_modules=["embed_tokens"])
    tensors = safetensors.torch.load_file(path / "adapter_model.safetensors")
    assert "base_model.model.model.embed_tokens.base_layer.weight" in tensors
    source = resolve(path, "x", resolve(base, "base"))
    assert set(source.factors) == {"model.embed_tokens.weight"}
    a, b = source.factors["model.embed_tokens.weight"][0].read()
    assert a.shape == (4, 30)
    assert b.shape == (8, 4)
    delta = 7 / 4 * (b.double() @ a.double()).T
    got = torch.cat(list(source.blocks("model.embed_tokens.weight"))).view(30, 8)
    torch.testing.assert_close(got.double(), delta, rtol=1e-6, atol=1e-7)


def test_a_changed_copy_of_the_weight_counts(tmp_path: Path) -> None:
    base = llama()
    path = saved(base, tmp_path / "lora", target_modules=["embed_tokens"])
    file = path / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["base_model.model.model.embed_tokens.base_layer.weight"] += 1
    safetensors.torch.save_file(tensors, file)
    check(merged_by_us(base, path), merged_by_peft(base, path), base)


@pytest.mark.parametrize("block", [1, 7, 8, 100])
def test_blocks_of_any_size_give_the_same_delta(block: int, tmp_path: Path) -> None:
    from paretofuse.adapters.resolve import resolve

    for base, settings in (
        (mixtral(), {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}),
        (stacked(True), {"target_modules": [], "target_parameters": ["experts.first"]}),
        (convolutions(), {"target_modules": ["1", "4"]}),
    ):
        source = resolve(saved(base, tmp_path / type(base).__name__, **settings), "x", resolve(base, "base"))
        for name, info in source.infos.items():
            whole = source.read(name, 0, info.numel)
            parts = [source.read(name, i, min(i + block, info.numel)) for i in range(0, info.numel, block)]
            torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-6, atol=1e-7)


def rewrite(path: Path, change: Any) -> None:
    """Save an adapter's tensors again under other names; a name of None drops one."""
    file = path / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    renamed = {change(key): t.contiguous() for key, t in tensors.items()}
    safetensors.torch.save_file({k: t for k, t in renamed.items() if k is not None}, file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda k: k.replace("lora_A", "lora_A.default"), r"lora_A\.default\.weight' is no key of a LoRA"),
        (lambda k: k if "lora_B" not in k else None, r"'base_model.*lora_A\.weight' has no 'lora_B\.weight'"),
        (lambda k: k if "lora_A" not in k else None, r"'base_model.*lora_B\.weight' has no 'lora_A\.weight'"),
        (lambda k: k.replace("lora_A", "lora_E"), r"lora_E\.weight' is no key of a LoRA"),
        (lambda k: k.replace("q_proj", "z_proj"), r"z_proj.*belongs to no tensor of the base"),
        (lambda k: k.replace("layers.0", "layers.9"), r"layers\.9.*belongs to no tensor of the base"),
        (lambda k: k.replace("0.self_attn.q_proj.lora_A.weight", "ghost.weight") if "B" not in k else
            k if "layers.1" in k else None, r"Only in the expert: 'model\.layers\.ghost\.weight'"),
    ],
)  # fmt: skip
def test_every_key_is_used_or_refused_by_name(change: Any, message: str, tmp_path: Path) -> None:
    base = llama()
    path = saved(base, tmp_path / "lora", **Q)
    rewrite(path, change)
    with pytest.raises(pf.CheckpointError, match=message):
        pf.stack(base, {"x": path})


def edit(path: Path, **settings: object) -> None:
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, **settings}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 8}, "has rank 4, and the configuration says 8"),
        ({"rank_pattern": {"q_proj": 2}}, "has rank 4, and the configuration says 2"),
        ({"r": None}, "rank None and alpha 7"),
        ({"use_dora": True}, r"DoRA is not .*merge_and_unload"),
        ({"layer_replication": [[0, 2], [1, 2]]}, r"layer_replication.*merge_and_unload"),
        ({"megatron_config": {"x": 1}}, r"Megatron.*merge_and_unload"),
        ({"alora_invocation_tokens": [1]}, r"activated LoRA.*merge_and_unload"),
        ({"arrow_config": {"top_k": 2}}, r"Arrow.*merge_and_unload"),
        ({"monteclora_config": {"num_samples": 2}}, r"MonteCLoRA.*merge_and_unload"),
        ({"init_lora_weights": "pissa_niter_4"}, r"pissa_niter_4.*merge_and_unload"),
        ({"init_lora_weights": "olora"}, r"olora.*merge_and_unload"),
        ({"init_lora_weights": "corda"}, r"corda.*merge_and_unload"),
        ({"init_lora_weights": "loftq"}, r"loftq.*merge_and_unload"),
        ({"init_lora_weights": "lora_ga"}, r"lora_ga.*merge_and_unload"),
        *(({"peft_type": kind}, f"{kind} is not .*merge_and_unload")
          for kind in ("IA3", "LOHA", "LOKR", "VERA", "ADALORA", "OFT", "BOFT", "TRAINABLE_TOKENS")),
        *(({"peft_type": kind}, f"{kind} changes no weight")
          for kind in ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "ADAPTION_PROMPT")),
    ],
)  # fmt: skip
def test_what_is_no_plain_sum_is_refused_by_name(
    settings: dict[str, object], message: str, tmp_path: Path
) -> None:
    base = llama()
    path = saved(base, tmp_path / "lora", **Q)
    edit(path, **settings)
    with pytest.raises(pf.CheckpointError, match=message):
        pf.stack(base, {"x": path})


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["v_proj"]},
        {"target_modules": r".*\.7\..*q_proj"},
        {"exclude_modules": ["q_proj"]},
        {"exclude_modules": r".*\.1\..*"},
        {"layers_to_transform": [0]},
        {"layers_to_transform": 0, "layers_pattern": "layers"},
        {"modules_to_save": ["self_attn"]},
    ],
)
def test_factors_that_peft_would_ignore_are_refused(settings: dict[str, object], tmp_path: Path) -> None:
    base = llama()
    path = saved(base, tmp_path / "lora", **Q)
    edit(path, **settings)
    with pytest.raises(pf.CheckpointError, match=r"q_proj.*of a module that the configuration leaves out"):
        pf.stack(base, {"x": path})


def test_a_vocabulary_that_has_grown(tmp_path: Path) -> None:
    base = llama()
    wider = copy.deepcopy(base)
    wider.resize_token_embeddings(33)
    wrapped(wider, **Q).save_pretrained(tmp_path / "lora", save_embedding_layers=True)
    with pytest.raises(pf.CheckpointError, match=r"\[33, 8\].*\[30, 8\]; .*resize_token_embeddings"):
        pf.stack(base, {"x": tmp_path / "lora"})
    base.resize_token_embeddings(33)  # the remedy; its new rows are the adapter's
    check(merged_by_us(base, tmp_path / "lora"), merged_by_peft(base, tmp_path / "lora"), base)


def test_a_flag_that_is_wrong_for_the_modules_is_corrected_as_peft_does(tmp_path: Path) -> None:
    base = tiny_gpt2()
    path = saved(base, tmp_path / "lora", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    edit(path, fan_in_fan_out=False)
    check(merged_by_us(base, path), merged_by_peft(base, path), base)


def test_square_weights_of_bare_tensors(tmp_path: Path) -> None:
    """The flag tells, unless the weights that are not square contradict it."""
    base = tiny_gpt2()
    path = saved(base, tmp_path / "lora", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    state = dict(base.state_dict())
    check(merged_by_us(state, path), merged_by_peft(base, path), base)
    edit(path, fan_in_fan_out=False)
    with pytest.raises(pf.CheckpointError, match=r"c_proj\.weight' is square.*pass the base as a module"):
        pf.stack(state, {"x": path})
    stack = stacked(True)
    path = saved(stack, tmp_path / "two", target_modules=[], target_parameters=["first", "second"])
    with pytest.raises(pf.CheckpointError, match=r"may belong to any of .*pass the base as a module"):
        pf.stack(dict(stack.state_dict()), {"x": path})


def test_errors_of_the_place(tmp_path: Path) -> None:
    base = tiny_gpt2()
    path = saved(base, tmp_path / "lora", **C_ATTN)
    with pytest.raises(pf.CheckpointError, match="belongs to no tensor"):
        pf.stack(nn.Linear(3, 3), {"x": path})
    with pytest.raises(pf.CheckpointError, match="can be an expert only"):
        pf.stack(path, {"x": path})
    (path / "adapter_config.json").write_text('{"peft_type"')
    with pytest.raises(pf.CheckpointError, match=r"adapter_config\.json is no JSON.*copy it again"):
        pf.stack(base, {"x": path})
    edit(saved(base, path, **C_ATTN))
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    with pytest.raises(pf.CheckpointError, match=r"expected adapter_model\.safetensors"):
        pf.stack(base, {"x": path})
    other = saved(llama(), tmp_path / "other", **Q)
    wider = llama()
    wider.model.layers[0].self_attn.q_proj = nn.Linear(9, 8)
    with pytest.raises(pf.CheckpointError, match=r"do not fit tensor .*q_proj.*\[8, 9\]"):
        pf.stack(wider, {"x": other})


def test_grouped_convolutions_are_refused_as_peft_refuses_to_merge_them(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    path = saved(base, tmp_path / "lora", target_modules=["0"])
    with pytest.raises(NotImplementedError, match="groups"):
        merged_by_peft(base, path)
    with pytest.raises(pf.CheckpointError, match=r"do not fit tensor '0\.weight'"):
        pf.stack(base, {"x": path})


def test_named_adapters(tmp_path: Path) -> None:
    """PEFT saves the adapter "default" in the folder itself and every other in a folder of its name."""
    import peft

    base = llama()
    model = wrapped(base, 1, name="news", **Q)
    model.save_pretrained(tmp_path / "one")
    assert (tmp_path / "one" / "news" / "adapter_config.json").is_file()
    theirs = merged_by_peft(base, tmp_path / "one" / "news")
    for path in (tmp_path / "one", tmp_path / "one" / "news"):
        check(merged_by_us(base, path), theirs, base)
    model.add_adapter("poems", peft.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    model.set_adapter("poems")
    fill(model, 2)
    model.save_pretrained(tmp_path / "two")
    with pytest.raises(pf.CheckpointError, match=r"holds the adapters \['news', 'poems'\]; .*two/news'"):
        pf.stack(base, {"x": tmp_path / "two"})
    check(
        merged_by_us(base, tmp_path / "two" / "poems"),
        merged_by_peft(base, tmp_path / "two" / "poems"),
        base,
    )


def test_stores_and_directories_of_lora_experts(tmp_path: Path) -> None:
    base = tiny_gpt2()
    path = saved(base, tmp_path / "lora", **C_ATTN)
    base.save_pretrained(tmp_path / "base")
    experts = {"lora": path, "full": perturbed(base, 5)}
    engines = [pf.stack(start, experts) for start in (base, tmp_path / "base")]
    for engine in engines:
        check(engine.merge_state_dict({"lora": 1.0}), merged_by_peft(base, path), base)
    engines[0].save(tmp_path / "store")
    assert same(pf.load(tmp_path / "store").merge([0.5, 0.5]), engines[0].merge([0.5, 0.5]))
    stack_to_store(tmp_path / "base", experts, tmp_path / "streamed")
    assert same(pf.load(tmp_path / "streamed").merge([0.5, 0.5]), engines[1].merge([0.5, 0.5]))
