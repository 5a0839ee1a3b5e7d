"""open_clip and Hugging Face directories, against the libraries' own results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import paretofuse as pf
from paretofuse.engine.merging.disk import merge_store
from tests.support.models import perturbed, same, tiny_gpt2

open_clip = pytest.importorskip("open_clip")


CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 2},
}


@pytest.mark.filterwarnings("ignore")
def test_open_clip_in_memory_and_on_disk(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(0)
    base = open_clip.CLIP(**CLIP).eval()
    experts = {"a": perturbed(base, 1, 0.02), "b": perturbed(base, 2, 0.02)}
    engine = pf.stack(base, experts)
    for bare in (
        "visual.class_embedding",
        "visual.positional_embedding",
        "visual.proj",
        "positional_embedding",
    ):
        assert bare in engine.tensor_groups
    assert engine.tensor_groups["visual.class_embedding"] == "visual"
    partial = pf.stack(base, experts, route="mlp")
    assert set(partial.groups) == {
        f"{tower}transformer.resblocks.{i}.mlp" for tower in ("visual.", "") for i in range(2)
    }
    images = torch.randn(2, 3, 16, 16)
    model = engine.merge({"a": 1.0})
    torch.testing.assert_close(
        model.encode_image(images), experts["a"].encode_image(images), rtol=1e-4, atol=1e-5
    )
    for name, part in {"base": base, **experts}.items():
        (tmp_path / name).mkdir()
        save_file(part.state_dict(), tmp_path / name / "open_clip_model.safetensors")
        (tmp_path / name / "open_clip_config.json").write_text(json.dumps({"model_cfg": CLIP}))
    on_disk = pf.stack(tmp_path / "base", {name: tmp_path / name for name in experts})
    assert same(on_disk.merge([0.4, 0.6]), engine.merge([0.4, 0.6]))
    on_disk.save(tmp_path / "store")
    assert same(pf.load(tmp_path / "store").merge([0.4, 0.6]), engine.merge([0.4, 0.6]))
    merge_store(tmp_path / "store", [0.4, 0.6], tmp_path / "merged")
    assert same(
        pf.stack(tmp_path / "merged", {"same": tmp_path / "merged"}).merge([1.0]), engine.merge([0.4, 0.6])
    )


@pytest.mark.filterwarnings("ignore")
def test_open_clip_trains(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = open_clip.CLIP(**CLIP)
    engine = pf.stack(base, {"a": perturbed(base, 1, 0.02), "b": perturbed(base, 2, 0.02)})
    engine.train_at([0.5, 0.5])
    jacobian = engine.jacobian([engine.module.encode_image(torch.randn(2, 3, 16, 16)).square().mean()])[0]
    visual = [i for i, group in enumerate(engine.groups) if group.startswith("visual")]
    assert (jacobian[visual].abs().sum(1) > 0).all()


def test_an_hf_model_with_heads(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    def bert(labels: int, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        config = BertConfig(
            vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=20, num_labels=labels,
        )  # fmt: skip
        return BertForSequenceClassification(config).eval()

    base, experts = bert(2, 0), {"cola": bert(2, 1), "mnli": bert(3, 2)}
    for name, model in {"base": base, **experts}.items():
        model.save_pretrained(tmp_path / name)
    engine = pf.stack(
        tmp_path / "base",
        {n: tmp_path / n for n in experts},
        route="mlp",
        heads=["classifier"],
        static_weight=1.0,
    )
    assert engine.groups == ("bert.encoder.layer.0.mlp", "bert.encoder.layer.1.mlp")
    engine.save(tmp_path / "store")
    ids = torch.randint(0, 60, (2, 7))
    for one in (engine, pf.load(tmp_path / "store")):
        merged = one.merge({"mnli": 1.0}, head="mnli")
        assert merged.config.num_labels == 3
        assert merged(ids).logits.shape == (2, 3)
        assert torch.equal(merged.classifier.weight, experts["mnli"].classifier.weight)
    solo = pf.stack(base, {"mnli": experts["mnli"]}, heads=["classifier"])
    torch.testing.assert_close(solo.merge([1.0], head="mnli")(ids).logits, experts["mnli"](ids).logits)


def test_half_precision_directories_say_so(tmp_path: Path) -> None:
    base = tiny_gpt2()
    base.save_pretrained(tmp_path / "base")
    engine = pf.stack(tmp_path / "base", {"a": perturbed(base, 1)}, dtype=torch.bfloat16)
    engine.save(tmp_path / "store")
    assert json.loads((tmp_path / "store" / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    merged = pf.load(tmp_path / "store").merge([1.0])
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert engine.merge([1.0]).lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", '{"model_type": "gp', "config.json is no JSON"),
        ("config.json", "", "config.json is no JSON"),
        ("config.json", "[1]", "config.json holds a list"),
        ("model.safetensors.index.json", '{"weight_map": {', "index.json is no JSON"),
        ("model.safetensors.index.json", "{}", "index.json has no 'weight_map'"),
        ("model.safetensors.index.json", '{"weight_map": {"x": 1}}', "index.json has no 'weight_map'"),
    ],
)
def test_damaged_json_names_the_file_and_what_to_do(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    tiny_gpt2().save_pretrained(tmp_path / "base", max_shard_size="40KB")
    (tmp_path / "base" / name).write_text(content)
    with pytest.raises(pf.CheckpointError, match=rf"^the base \(.*base\): .*{message}.*; .*copy it again"):
        pf.stack(tmp_path / "base", {"one": tmp_path / "base"})


@pytest.mark.parametrize("content", ['{"model_cfg"', "{}"])
def test_damaged_open_clip_configuration(tmp_path: Path, content: str) -> None:
    safetensors.torch.save_file({"x": torch.ones(2)}, tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(content)
    with pytest.raises(pf.CheckpointError, match=r"the base .*open_clip_config\.json .*copy it again"):
        pf.stack(tmp_path, {"one": {"x": torch.ones(2)}})


def test_one_file_goes_before_the_shards_beside_it(tmp_path: Path) -> None:
    """A model saved anew into an old directory leaves the old shards and their index there."""
    base = tiny_gpt2()
    base.save_pretrained(tmp_path / "base", max_shard_size="40KB")
    newer = perturbed(base, 1)
    newer.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "base" / "model.safetensors")
    assert (tmp_path / "base" / "model.safetensors.index.json").is_file()
    theirs = type(base).from_pretrained(tmp_path / "base")
    ours = pf.stack(base, {"one": tmp_path / "base"}).merge([1.0])
    assert torch.equal(theirs.lm_head.weight, newer.lm_head.weight)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_opening_a_store_imports_no_model_library(tmp_path: Path) -> None:
    import subprocess
    import sys

    base = tiny_gpt2()
    base.save_pretrained(tmp_path / "base")
    pf.stack(tmp_path / "base", {"one": perturbed(base, 1)}).save(tmp_path / "store")
    code = (
        "import sys, paretofuse as pf; engine = pf.load(sys.argv[1]); engine.merge_state_dict([1.0]); "
        "print('transformers' in sys.modules); engine.merge([1.0]); print('transformers' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "store")], capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["False", "True"], done.stderr


def test_a_class_that_this_transformers_does_not_have(tmp_path: Path) -> None:
    base = tiny_gpt2()
    base.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["architectures"] = ["NextYearsModel"]
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    untied = {k: v for k, v in base.state_dict().items() if k != "lm_head.weight"}
    engine = pf.stack(tmp_path / "base", {"one": {k: v * 1.5 for k, v in untied.items()}})
    with pytest.raises(
        ValueError, match=r"class transformers\.NextYearsModel, which transformers \S+ does not have"
    ):
        engine.merge([1.0])
    engine.save(tmp_path / "store")
    with pytest.raises(ValueError, match=r"class transformers\.NextYearsModel.*pass module= to pf\.load"):
        pf.load(tmp_path / "store").merge([1.0])
    merged = pf.load(tmp_path / "store", module=base).merge([1.0]).state_dict()
    for name, tensor in untied.items():
        torch.testing.assert_close(merged[name], tensor * 1.5)
    merge_store(tmp_path / "store", [1.0], tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text()) == config


def test_a_model_in_memory_leaves_complete_model_directories(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = tiny_gpt2()  # made of a configuration, never saved
    engine = pf.stack(base, {"one": perturbed(base, 1), "two": perturbed(base, 2)})
    engine.save(tmp_path / "store")
    loaded = pf.load(tmp_path / "store")
    assert type(loaded.module) is type(base)
    assert same(loaded.merge([0.3, 0.7]), engine.merge([0.3, 0.7]))
    merge_store(tmp_path / "store", [0.3, 0.7], tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.dtype == base.dtype
    ids = torch.arange(12).view(1, 12)
    torch.testing.assert_close(model(ids).logits, engine.merge([0.3, 0.7])(ids).logits)
