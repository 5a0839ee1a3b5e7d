"""Directories: what makes them complete, what is damaged, what is no directory, and what does not belong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import paretofuse as pf
from paretofuse.api import stack_to_store
from paretofuse.cli import main
from paretofuse.engine.merging.disk import merge_store
from tests.support.models import net_and_experts, perturbed, tiny_gpt2

transformers = pytest.importorskip("transformers")


def llama(**settings: Any) -> nn.Module:
    """A tiny Llama; no setting here changes a shape."""
    shapes = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "intermediate_size": 24,
        "head_dim": 4,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 12}
    config = transformers.LlamaConfig(**{**shapes, **heads, "bos_token_id": 1, "eos_token_id": 2, **settings})
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


EXTRA = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "preprocessor_config.json",
    "processor_config.json", "chat_template.jinja", "additional_chat_templates/tool.jinja", "modules.json",
    "1_Pooling/config.json", "sentence_bert_config.json", "modeling_own.py", "LICENSE",
)  # fmt: skip
LEFT = (
    "notes.pkl", "optimizer.pt", "training_args.bin", "a:b.json", "tf_model.h5", "onnx/model.onnx", "onnx/config.json",
    "runs/events.out.tfevents.1", "pytorch_model.bin.index.json", ".cache/x", "back\\slash.txt", "state.ckpt",
)  # fmt: skip


def test_a_merged_directory_is_complete(tmp_path: Path) -> None:
    base = tiny_gpt2()
    base.save_pretrained(tmp_path / "base")
    perturbed(base, 1, 0.001).save_pretrained(tmp_path / "a")
    for name in (*EXTRA, *LEFT):
        (tmp_path / "base" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "base" / name).write_text("{}")
    pf.stack(tmp_path / "base", {"a": tmp_path / "a"}).save(tmp_path / "saved")
    stack_to_store(tmp_path / "base", {"a": tmp_path / "a"}, tmp_path / "streamed")
    for store in ("saved", "streamed"):
        merge_store(tmp_path / store, [1.0], tmp_path / f"merged-{store}")
        merged = tmp_path / f"merged-{store}"
        found = {path.relative_to(merged).as_posix() for path in merged.rglob("*")}
        assert found - {"1_Pooling", "additional_chat_templates"} == {
            *EXTRA,
            "README.md",
            "config.json",
            "model.safetensors",
        }


def test_a_module_with_weights_of_its_own_is_named(tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "2_Dense").mkdir()
    save_file({"w": torch.ones(2)}, tmp_path / "base" / "2_Dense" / "model.safetensors")
    engine = pf.stack(tmp_path / "base", {"a": perturbed(tiny_gpt2(), 1)})
    assert any("folder '2_Dense' holds weights of its own" in note for note in engine.notes)


@pytest.mark.parametrize("sharded", [False, True])
def test_diffusers_names(sharded: bool, tmp_path: Path) -> None:
    weights = {"conv.weight": torch.randn(3, 3), "conv.bias": torch.randn(3)}
    for part, shift in (("base", 0.0), ("a", 1.0)):
        folder = tmp_path / part
        folder.mkdir()
        (folder / "config.json").write_text('{"_class_name": "UNet2DConditionModel", "sample_size": 8}')
        tensors = {name: tensor + shift for name, tensor in weights.items()}
        if not sharded:
            save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
            continue
        files = {}
        for i, (name, tensor) in enumerate(tensors.items()):
            files[name] = f"diffusion_pytorch_model-0000{i}-of-00002.safetensors"
            save_file({name: tensor}, folder / files[name])
        index = {"weight_map": files}
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    stack_to_store(tmp_path / "base", {"a": tmp_path / "a"}, tmp_path / "store")
    merge_store(tmp_path / "store", [1.0], tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "diffusion_pytorch_model.safetensors")
    for name, tensor in weights.items():
        torch.testing.assert_close(merged[name], tensor + 1)
    (tmp_path / "pipeline" / "unet").mkdir(parents=True)
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    (tmp_path / "pipeline" / "unet" / "config.json").write_text("{}")
    with pytest.raises(pf.CheckpointError, match=r"pipeline of diffusers.*stack one of its parts: 'unet'"):
        pf.stack(tmp_path / "pipeline", {"a": {}})


def test_an_index_that_promises_too_much(tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path, max_shard_size="40KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"]["transformer.h.7.mlp.bias"] = next(iter(index["weight_map"].values()))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        pf.CheckpointError, match=r"promises 'transformer\.h\.7\.mlp\.bias', which no shard holds"
    ):
        pf.stack(tmp_path, {"a": tmp_path})


MISFITS: dict[str, dict[str, Any]] = {
    "rope": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "eps": {"rms_norm_eps": 1e-3},
    "heads": {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8},
    "activation": {"hidden_act": "gelu"},
    "scaling": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
}


@pytest.mark.parametrize("setting", MISFITS)
@pytest.mark.parametrize("on_disk", [False, True])
def test_an_expert_configured_as_another_model(setting: str, on_disk: bool, tmp_path: Path) -> None:
    base: Any = llama()
    expert: Any = perturbed(llama(**MISFITS[setting]), 1, 0.001)
    if on_disk:
        base.save_pretrained(tmp_path / "base")
        expert.save_pretrained(tmp_path / "expert")
        base, expert = tmp_path / "base", tmp_path / "expert"
    with pytest.raises(
        pf.CheckpointError, match=r"configured as another model.*instead of.*allow_misfit=True"
    ):
        pf.stack(base, {"a": expert})
    engine = pf.stack(base, {"a": expert}, allow_misfit=True)
    assert sum("is configured with" in note for note in engine.notes) == 1


def test_misfits_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama().save_pretrained(tmp_path / "base")
    perturbed(llama(rms_norm_eps=1e-3), 1, 0.001).save_pretrained(tmp_path / "a")
    words = [
        "stack",
        str(tmp_path / "base"),
        "--expert",
        f"a={tmp_path / 'a'}",
        "-o",
        str(tmp_path / "store"),
    ]
    assert main(words) == 1
    assert "--allow-misfit" in capsys.readouterr().err
    assert main([*words, "--allow-misfit", "--dtype", "bf16", "--delta-dtype", "torch.float16"]) == 0
    out = capsys.readouterr().out
    assert "note: expert 'a'" in out
    assert "rms_norm_eps=0.001 instead of 1e-06" in out
    assert "base BF16, deltas F16" in out
    assert main([*words, "--dtype", "int8"]) == 2
    assert "argument --dtype: invalid choice 'int8'" in capsys.readouterr().err


def test_what_fine_tuning_changes_is_no_misfit(tmp_path: Path) -> None:
    base = llama()
    for settings in (
        {"attention_dropout": 0.1, "use_cache": False, "pad_token_id": 3},
        {"max_position_embeddings": 24},
    ):
        engine = pf.stack(base, {"a": perturbed(llama(**settings), 1, 0.0005)})
        noted = "max_position_embeddings" in settings
        assert any("max_position_embeddings=24 instead of 12" in note for note in engine.notes) is noted
        assert noted or engine.notes == ()


@pytest.mark.parametrize("streamed", [False, True])
def test_deltas_that_tell_of_a_misfit(streamed: bool, tmp_path: Path) -> None:
    base, _ = net_and_experts()
    torch.manual_seed(9)
    experts = {"same": base, "near": perturbed(base, 1, 0.01), "far": type(base)().eval()}
    with torch.no_grad():
        for parameter in experts["far"].parameters():
            parameter.normal_()
    notes = stack_to_store(base, experts, tmp_path / "s") if streamed else pf.stack(base, experts).notes
    assert [note.split(",")[0] for note in notes if "'same'" in note] == [
        "expert 'same' is identical to the base: all of its deltas are zero"
    ]
    delta = sum(
        float((e - b).double().square().sum()) for e, b in zip(*_floats(experts["far"], base), strict=True)
    )
    size = (delta / sum(float(b.double().square().sum()) for b in _floats(base)[0])) ** 0.5
    assert [note.split(" the base")[0] for note in notes if "'far'" in note] == [
        f"expert 'far' is {size:.3g} times as far from"
    ]
    assert not any("'near'" in note for note in notes)


def _floats(*modules: nn.Module) -> list[list[torch.Tensor]]:
    """Each module's tensors that are merged, ties once."""
    kept = []
    for module in modules:
        tensors = {t.data_ptr(): t for t in module.state_dict().values() if t.is_floating_point() and t.dim()}
        kept.append(list(tensors.values()))
    return kept


def test_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, what the local cache holds is found, links and all, at main or at a revision; nothing else is."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        pf.CheckpointError, match=r"org/name.: no such file or directory, nor a model that the Hugging"
    ):
        pf.stack("org/name", {"a": {}})
    for path in ("no/such/path", "none.safetensors", "/none"):
        with pytest.raises(pf.CheckpointError, match=r"no such file or directory; pass a model's directory"):
            pf.stack(path, {"a": {}})
    models = {"main": tiny_gpt2(), "v2": perturbed(tiny_gpt2(), 1)}
    (tmp_path / "models--org--name" / "refs").mkdir(parents=True)
    for number, (revision, model) in enumerate(models.items()):
        snapshot = tmp_path / "models--org--name" / "snapshots" / (str(number) * 40)
        model.save_pretrained(tmp_path / "blobs" / revision)  # type: ignore[operator]
        snapshot.mkdir(parents=True)
        for file in (tmp_path / "blobs" / revision).iterdir():
            (snapshot / file.name).symlink_to(file)
        (tmp_path / "models--org--name" / "refs" / revision).write_text(snapshot.name)
    engine = pf.stack(
        "org/name", {"same": "org/name@main", "branch": "org/name@v2", "commit": f"org/name@{'1' * 40}"}
    )
    for objective, revision in (("same", "main"), ("branch", "v2"), ("commit", "v2")):
        merged = engine.merge({objective: 1.0}).state_dict()
        for name, tensor in models[revision].state_dict().items():
            torch.testing.assert_close(merged[name], tensor)
    with pytest.raises(pf.CheckpointError, match=r"org/name@v3.: no such file or directory, nor"):
        pf.stack("org/name", {"a": "org/name@v3"})


def test_online_the_hub_is_asked_for_safetensors_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    asked: list[tuple[str, dict[str, Any]]] = []
    tiny_gpt2().save_pretrained(tmp_path / "downloaded")  # type: ignore[operator]

    def download(repo_id: str, **options: Any) -> str:
        asked.append((repo_id, options))
        return str(tmp_path / "downloaded")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    pf.stack("org/name@v2", {"a": "org/name"})
    assert [(name, options["revision"]) for name, options in asked] == [
        ("org/name", "v2"),
        ("org/name", None),
    ]
    assert "*.bin" in asked[0][1]["ignore_patterns"]
    assert not asked[0][1]["local_files_only"]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda e, m: pf.stack(e, {"a": m}),
            TypeError,
            "the base: got Engine, expected an nn.Module.*engine.merge",
        ),
        (lambda e, m: pf.stack(m, {"a": e}), TypeError, "expert 'a': got Engine"),
        (lambda e, m: pf.stack(m, [("a", m)]), TypeError, "got experts of type list"),
        (lambda e, m: pf.stack(m, {"a": 3}), TypeError, "expert 'a': got int"),
        (lambda e, m: pf.stack(m, {"a": m}, route=None), ValueError, "got route None, expected one of"),
        (lambda e, m: pf.stack(m, {"a": m}, route=["mlp"]), ValueError, "got route"),
        (lambda e, m: pf.stack(m, {"a": m}, heads="w"), TypeError, "got heads='w', expected a list"),
        (lambda e, m: pf.stack(m, {"a": m}, heads=[1]), TypeError, "got heads=.1., expected a list"),
        (lambda e, m: pf.stack(m, {"a": m}, device="gpu"), ValueError, "got device='gpu', expected a name"),
        (lambda e, m: pf.stack(m, {"a": m}, device=0), TypeError, "got device=0, expected a torch.device"),
        (
            lambda e, m: pf.stack(m, {"a": m}, dtype="int4"),
            ValueError,
            "got dtype=int4, expected torch.float32",
        ),
        (lambda e, m: pf.stack(m, {"a": m}, dtype=16), ValueError, "got dtype=16"),
        (lambda e, m: pf.stack(m, {"a": m}, static_weight="x"), ValueError, "got static_weight='x'"),
        (lambda e, m: e.merge("a"), TypeError, "preference"),
        (lambda e, m: e.switch(m), TypeError, "preference"),
        (lambda e, m: e.merge(weights="a"), TypeError, "weights"),
    ],
)
def test_arguments_of_a_wrong_kind(
    call: Callable[[Any, Any], Any], error: type[Exception], message: str
) -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(error, match=message):
        call(pf.stack(model, {"a": perturbed(model, 1)}), model)


@pytest.mark.parametrize("name", ["bf16", "BF16", "bfloat16", "torch.bfloat16", "BFloat16", torch.bfloat16])
def test_dtypes_by_any_usual_name(name: Any) -> None:
    model = nn.Linear(3, 2)
    engine = pf.stack(model, {"a": perturbed(model, 1)}, dtype=name, delta_dtype="half")
    assert {p.dtype for p in engine.merge([1.0]).parameters()} == {torch.bfloat16}
    assert {spec.delta_dtype for spec in engine.layout.tensors} == {"F16"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_dtype_changes_nothing(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_gpt2()
    expert = perturbed(model, 1)
    for init in ("identity", "constant"):
        truth = pf.stack(model, {"a": expert}, init=init)
        torch.set_default_dtype(dtype)
        try:
            engine = pf.stack(model, {"a": expert}, init=init)
            engine.save(tmp_path / "store")
            loaded = pf.load(tmp_path / "store")
            states = [
                engine.merge([1.0]).state_dict(),
                loaded.merge([1.0]).state_dict(),
                loaded.module.state_dict(),
            ]
        finally:
            torch.set_default_dtype(torch.float32)
        for name, parameter in truth.routers.state_dict().items():
            assert torch.equal(parameter, engine.routers.state_dict()[name])
        for state in states:
            assert all(torch.equal(t, state[n]) for n, t in truth.merge([1.0]).state_dict().items())


def test_without_transformers_the_extra_is_named(tmp_path: Path) -> None:
    """Neither a stack nor a model; a store is merged from disk to disk all the same."""
    tiny_gpt2().save_pretrained(tmp_path / "base")
    perturbed(tiny_gpt2(), 1).save_pretrained(tmp_path / "a")
    stack_to_store(tmp_path / "base", {"a": tmp_path / "a"}, tmp_path / "store")
    code = """
import sys
sys.modules["transformers"] = None
import paretofuse as pf
for call in (lambda: pf.stack("base", {"a": "a"}), lambda: pf.load("store").merge([1.0])):
    try:
        call()
    except ImportError as error:
        print("paretofuse[hf]" in str(error), "bare tensors" in str(error))
from paretofuse.engine.merging.disk import merge_store
print(merge_store("store", [1.0], "merged").tensors > 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path, timeout=200
    )
    assert done.stdout.split() == ["True", "False", "True", "False", "True"], done.stderr


def test_an_old_transformers_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_gpt2().save_pretrained(tmp_path / "base")
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.1")
    with pytest.raises(ImportError, match=r"got transformers 4\.57\.1, expected at least 5\.0"):
        pf.stack(tmp_path / "base", {"a": tmp_path / "base"})


def test_a_store_of_a_module_is_not_called_bare_tensors(tmp_path: Path) -> None:
    base, experts = net_and_experts()
    pf.stack(base, experts).save(tmp_path / "store")
    with pytest.raises(
        ValueError, match=r"how to build a tests\.support\.models\.Net; pass module= to pf\.load"
    ) as error:
        pf.load(tmp_path / "store").merge([1, 0, 0])
    assert "bare" not in str(error.value)
    with pytest.raises(TypeError, match=r"got module=str, expected an nn.Module"):
        pf.load(tmp_path / "store", module="Net")
