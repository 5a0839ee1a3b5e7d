"""Directories of timm, open_clip, sentence-transformers and diffusers, from their own save to their own load."""

from __future__ import annotations

import json
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paretofuse as pf
from paretofuse.api import stack_to_store
from paretofuse.engine.merging.disk import merge_store
from tests.support.models import perturbed
from tests.support.served import character_tokenizer

SHARES = {"a": 0.3, "b": 0.7}
STATIC = 0.4


@dataclass(frozen=True)
class Peer:
    """One library's way.

    Attributes:
        model: a tiny model of random weights.
        save: writes it into a directory.
        load: reads it from there.
        run: its outputs at one input.
        kind: the class, as the store tells it.
    """

    model: Callable[[], nn.Module]
    save: Callable[[Any, Path], None]
    load: Callable[[Path], nn.Module]
    run: Callable[[Any], Tensor]
    kind: str


def with_timm() -> Peer:
    timm = pytest.importorskip("timm")

    return Peer(
        lambda: timm.create_model(
            "vit_tiny_patch16_224",
            img_size=32,
            patch_size=8,
            embed_dim=24,
            depth=2,
            num_heads=2,
            num_classes=5,
        ),
        lambda model, path: timm.models.save_for_hf(model, path, safe_serialization=True),
        lambda path: timm.create_model(f"local-dir:{path}", pretrained=True),
        lambda model: model(torch.ones(1, 3, 32, 32)),
        "timm.vit_tiny_patch16_224",
    )


def with_timm_norms() -> Peer:
    """BatchNorm has running statistics, and counters that are integers."""
    timm = pytest.importorskip("timm")

    return Peer(
        lambda: timm.create_model("resnet10t", num_classes=5, in_chans=1),
        lambda model, path: timm.models.save_for_hf(model, path, safe_serialization=True),
        lambda path: timm.create_model(f"local-dir:{path}", pretrained=True),
        lambda model: model(torch.ones(1, 1, 32, 32)),
        "timm.resnet10t",
    )


CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 101, "width": 16, "heads": 2, "layers": 2},
}


def with_open_clip() -> Peer:
    open_clip = pytest.importorskip("open_clip")
    from open_clip.model import set_model_preprocess_cfg
    from open_clip.push_to_hf_hub import save_for_hf

    def model() -> Any:
        made = open_clip.CLIP(**CLIP)
        set_model_preprocess_cfg(made, {"mean": (0.5,) * 3, "std": (0.5,) * 3})
        return made

    def save(model: Any, path: Path) -> None:
        save_for_hf(model, character_tokenizer(), CLIP, str(path), safe_serialization=True)

    return Peer(
        model,
        save,
        lambda path: open_clip.create_model(f"local-dir:{path}"),
        lambda model: model.encode_image(torch.ones(1, 3, 16, 16)),
        "open_clip.CLIP",
    )


def with_sentence_transformers(mode: str = "mean") -> Peer:
    peer = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from transformers import BertConfig, BertModel

    def save(model: Any, path: Path) -> None:
        model.save_pretrained(path)
        tokenizer = character_tokenizer()
        tokenizer.pad_token = "<end>"
        tokenizer.save_pretrained(path)
        peer.SentenceTransformer(
            modules=[Transformer(str(path)), Pooling(16, pooling_mode=mode), Normalize()], device="cpu"
        ).save(str(path))

    return Peer(
        lambda: BertModel(
            BertConfig(
                vocab_size=101, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
                max_position_embeddings=64,
            )
        ),
        save,
        lambda path: peer.SentenceTransformer(str(path), device="cpu")[0].auto_model,
        lambda model: model(input_ids=torch.tensor([[5, 6, 7]])).last_hidden_state,
        "transformers.BertModel",
    )  # fmt: skip


def with_diffusers() -> Peer:
    diffusers = pytest.importorskip("diffusers")

    return Peer(
        lambda: diffusers.UNet2DModel(
            sample_size=8, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ),
        lambda model, path: model.save_pretrained(path, max_shard_size="100KB"),
        diffusers.UNet2DModel.from_pretrained,
        lambda model: model(torch.ones(1, 3, 8, 8), 1).sample,
        "diffusers.UNet2DModel",
    )  # fmt: skip


@pytest.fixture(
    params=[with_timm, with_timm_norms, with_open_clip, with_sentence_transformers, with_diffusers],
    ids=lambda make: make.__name__.removeprefix("with_"),
)
def peer(request: pytest.FixtureRequest) -> Peer:
    made: Peer = request.param()
    return made


def saved(peer: Peer, place: Path) -> dict[str, dict[str, Tensor]]:
    """Save a base and two fine-tunes by the peer; returns their tensors."""
    torch.manual_seed(0)
    base = peer.model().eval()
    models = {"base": base, "a": perturbed(base, 1, 0.05), "b": perturbed(base, 2, 0.05)}
    for name, model in models.items():
        (place / name).mkdir()
        peer.save(model, place / name)
    return {name: model.state_dict() for name, model in models.items()}


def merged_by_hand(states: dict[str, dict[str, Tensor]], routed: Container[str]) -> dict[str, Tensor]:
    """base + sum of c x (expert - base), in float64, c the expert's share where a tensor is routed; no integers."""
    made = {}
    for name, tensor in states["base"].items():
        made[name] = tensor.double()
        for own, share in SHARES.items() if tensor.is_floating_point() else ():
            made[name] += (share if name in routed else STATIC) * (
                states[own][name].double() - tensor.double()
            )
    return made


@pytest.mark.filterwarnings("ignore")  # the peers' own
def test_from_their_save_to_their_load(peer: Peer, tmp_path: Path) -> None:
    states = saved(peer, tmp_path)
    experts = {name: tmp_path / name for name in SHARES}
    stack_to_store(tmp_path / "base", experts, tmp_path / "store", route="tensor", static_weight=STATIC)
    merge_store(tmp_path / "store", SHARES, tmp_path / "merged")
    theirs = peer.load(tmp_path / "merged").eval()
    engine = pf.load(tmp_path / "store")
    assert engine.blueprint.model_class == peer.kind
    ours = engine.merge(SHARES)
    truth = merged_by_hand(states, engine.tensor_groups)
    found = theirs.state_dict()
    assert found.keys() == truth.keys() == ours.state_dict().keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, ours.state_dict()[name]), name
        torch.testing.assert_close(tensor.double(), truth[name], rtol=1e-5, atol=1e-6, msg=name)
    assert len(engine.tensor_groups) > 5
    with torch.no_grad():
        torch.testing.assert_close(peer.run(theirs), peer.run(ours))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [with_timm, with_diffusers])
def test_in_another_dtype(make: Callable[[], Peer], tmp_path: Path) -> None:
    peer = make()
    saved(peer, tmp_path)
    experts = {name: tmp_path / name for name in SHARES}
    stack_to_store(tmp_path / "base", experts, tmp_path / "store", dtype=torch.bfloat16)
    merge_store(tmp_path / "store", SHARES, tmp_path / "merged")
    ours = pf.load(tmp_path / "store").merge(SHARES).state_dict()
    theirs = peer.load(tmp_path / "merged").state_dict()
    assert {tensor.dtype for tensor in ours.values()} == {torch.bfloat16}
    assert all(torch.equal(tensor.to(torch.bfloat16), ours[name]) for name, tensor in theirs.items())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["mean", "cls", "max", "lasttoken"])
def test_embeddings_are_those_of_sentence_transformers(mode: str, tmp_path: Path) -> None:
    testclient = pytest.importorskip("starlette.testclient")
    from sentence_transformers import SentenceTransformer

    from paretofuse.serving import create_app

    saved(with_sentence_transformers(mode), tmp_path)
    engine = pf.stack(tmp_path / "base", {name: tmp_path / name for name in SHARES})
    engine.save(tmp_path / "store")
    merge_store(tmp_path / "store", SHARES, tmp_path / "merged")
    texts = ["The sea is calm", "a", "hill 9"]
    truth = SentenceTransformer(str(tmp_path / "merged"), device="cpu").encode(texts)
    with testclient.TestClient(create_app(engine)) as client:
        answer = client.post("/v1/embeddings", json={"input": texts, "preference": SHARES}).json()
    found = torch.tensor([row["embedding"] for row in answer["data"]])
    torch.testing.assert_close(found, torch.from_numpy(truth), rtol=1e-4, atol=1e-5)


def test_what_embeddings_would_lack_is_refused() -> None:
    pytest.importorskip("fastapi")
    from paretofuse.serving.pooling import Pooling, pooling_of

    def files(kind: str = "Normalize", **config: Any) -> dict[str, bytes]:
        entries = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Last", kind)]
        modules = [{"path": path, "type": f"sentence_transformers.models.{name}"} for path, name in entries]
        return {
            "modules.json": json.dumps(modules).encode(),
            "1_Pooling/config.json": json.dumps(config).encode(),
        }

    assert pooling_of({}) == Pooling("mean", False)
    old = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False, "word_embedding_dimension": 16}
    assert pooling_of(files(**old)) == Pooling("cls", True)
    for wrong, message in (
        (files("Dense"), r"a Dense \(2_Last\), expected .*predict="),
        (files(pooling_mode="weightedmean"), "the pooling weightedmean, expected one of mean"),
        (files(pooling_mode=["cls", "mean"]), "the pooling cls, mean, expected one of"),
        (files(pooling_mode_cls_token=True, pooling_mode_max_tokens=True), "the pooling cls, max"),
        (files(pooling_mode_mean_sqrt_len_tokens=True), "the pooling mean_sqrt_len_tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            pooling_of(wrong)


def test_a_class_that_the_library_lacks(tmp_path: Path) -> None:
    """What a store names is looked up among diffusers' models alone."""
    pytest.importorskip("diffusers")
    from safetensors.torch import save_file

    for name in ("base", "a"):
        (tmp_path / name).mkdir()
        config = {"_class_name": "DiffusionPipeline", "_diffusers_version": "0.1"}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        save_file({"x": torch.randn(4, 4)}, tmp_path / name / "diffusion_pytorch_model.safetensors")
    engine = pf.stack(tmp_path / "base", {"a": tmp_path / "a"})
    assert engine.merge_state_dict([1.0])["x"].shape == (4, 4)
    with pytest.raises(ValueError, match="class DiffusionPipeline, expected a model of diffusers"):
        engine.merge([1.0])
