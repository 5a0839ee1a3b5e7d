"""Classification, embeddings, images, and users' own functions are the merged models'."""

from __future__ import annotations

import base64
import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import paretofuse as pf
from tests.support.models import net_and_experts, perturbed
from tests.support.served import character_tokenizer

testclient = pytest.importorskip("starlette.testclient", reason="the server comes with the extra `serve`")

PREFERENCES = [{"news": 0.7, "poems": 0.3}, {"news": 0.2, "poems": 0.8}]
TEXTS = ["The sea is calm", "a", "hill 9"]


@contextmanager
def client_of(engine: pf.Engine, **options: Any) -> Iterator[Any]:
    from paretofuse.serving import create_app

    with testclient.TestClient(create_app(engine, **options)) as client:
        yield client


def bert(kind: str) -> nn.Module:
    import transformers

    config = transformers.BertConfig(
        vocab_size=101, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32, num_labels=3, id2label={0: "low", 1: "middle", 2: "high"},
    )  # fmt: skip
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, kind)(config).eval()
    return model


def stacked(base: nn.Module) -> pf.Engine:
    return pf.stack(base, {name: perturbed(base, i, 0.2) for i, name in enumerate(("news", "poems"), 1)})


def batch_of(texts: list[str]) -> dict[str, torch.Tensor]:
    tokenizer = character_tokenizer()
    tokenizer.pad_token = "<end>"
    return dict(tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False))


def test_classify() -> None:
    engine = stacked(bert("BertForSequenceClassification"))
    with client_of(engine, processor=character_tokenizer()) as client:
        for preference in PREFERENCES:
            answer = client.post("/v1/classify", json={"input": TEXTS, "preference": preference}).json()
            truth = engine.merge(preference)(**batch_of(TEXTS)).logits.softmax(-1)
            found = np.array([row["probs"] for row in answer["data"]])
            np.testing.assert_allclose(found, truth.detach().numpy(), atol=1e-5)
            labels = [["low", "middle", "high"][i] for i in truth.argmax(-1).tolist()]
            assert [row["label"] for row in answer["data"]] == labels
            assert answer["preference"] == preference
        assert answer["usage"]["prompt_tokens"] == sum(map(len, TEXTS))
        refused = client.post("/v1/classify", json={"input": "a" * 33})
        assert "expected 1 to 32" in refused.json()["error"]["message"]
        assert client.post("/v1/completions", json={"prompt": "a"}).json()["error"]["code"] == "wrong_task"


def test_classify_with_an_objectives_own_head() -> None:
    base = bert("BertForSequenceClassification")
    experts = {name: perturbed(base, i, 0.2) for i, name in enumerate(("news", "poems"), 1)}
    engine = pf.stack(base, experts, heads=["classifier"])
    with client_of(engine, processor=character_tokenizer()) as client:
        body = {"input": TEXTS, "preference": PREFERENCES[0], "head": "poems"}
        answer = client.post("/v1/classify", json=body).json()
        truth = engine.merge(PREFERENCES[0], head="poems")(**batch_of(TEXTS)).logits.softmax(-1)
        found = np.array([row["probs"] for row in answer["data"]])
        np.testing.assert_allclose(found, truth.detach().numpy(), atol=1e-5)
        wrong = client.post("/v1/classify", json={**body, "head": "sports"})
        assert "one of ['news', 'poems']" in wrong.json()["error"]["message"]


def test_embeddings_by_the_official_client_in_base64() -> None:
    engine = stacked(bert("BertModel"))
    mask = batch_of(TEXTS)["attention_mask"].unsqueeze(-1)
    with client_of(engine, processor=character_tokenizer()) as client:
        states = engine.merge(PREFERENCES[0])(**batch_of(TEXTS)).last_hidden_state
        truth = ((states * mask).sum(1) / mask.sum(1)).detach().numpy()
        body: dict[str, Any] = {"input": TEXTS, "preference": PREFERENCES[0]}
        floats = client.post("/v1/embeddings", json=body).json()["data"]
        np.testing.assert_allclose([row["embedding"] for row in floats], truth, atol=1e-5)
        packed = client.post("/v1/embeddings", json={**body, "encoding_format": "base64"}).json()["data"]
        numbers = [struct.unpack("<16f", base64.b64decode(row["embedding"])) for row in packed]
        np.testing.assert_allclose(numbers, truth, atol=1e-5)


def picture(seed: int) -> str:
    from PIL import Image

    content = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode()


def test_images(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=16,
        patch_size=8, num_labels=4,
    )  # fmt: skip
    torch.manual_seed(0)
    base = ViTForImageClassification(config).eval()
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    for name, model in {
        "base": base,
        "news": perturbed(base, 1, 0.2),
        "poems": perturbed(base, 2, 0.2),
    }.items():
        model.save_pretrained(tmp_path / name)  # type: ignore[operator]
        processor.save_pretrained(tmp_path / name)
    engine = pf.stack(tmp_path / "base", {name: tmp_path / name for name in ("news", "poems")})
    images = [picture(0), "data:image/png;base64," + picture(1)]
    with client_of(engine) as client:
        assert client.get("/v1/front").json()["task"] == "image-classification"
        for preference in PREFERENCES:
            answer = client.post("/v1/classify", json={"input": images, "preference": preference}).json()
            from PIL import Image

            opened = [Image.open(io.BytesIO(base64.b64decode(own.rpartition(",")[2]))) for own in images]
            pixels = processor(images=opened, return_tensors="pt")["pixel_values"]
            truth = engine.merge(preference)(pixel_values=pixels).logits.softmax(-1)
            found = np.array([row["probs"] for row in answer["data"]])
            np.testing.assert_allclose(found, truth.detach().numpy(), atol=1e-5)
        for wrong in ("no image", "bm8gaW1hZ2U=", "/etc/passwd"):
            refused = client.post("/v1/classify", json={"input": wrong})
            assert refused.status_code == 400
            assert "PNG" in refused.json()["error"]["message"]


def test_a_function_of_ones_own() -> None:
    base, experts = net_and_experts(count=2)
    engine = pf.stack(base, experts)

    def predict(module: nn.Module, given: Any) -> list[list[float]]:
        if not isinstance(given, list):
            raise ValueError("got no list, expected rows of 8 numbers")
        return module(torch.tensor(given)).tolist()  # type: ignore[no-any-return]

    rows = torch.randn(3, 8).tolist()
    with client_of(engine, predict=predict) as client:
        assert client.get("/v1/front").json()["task"] == "callable"
        for share in (0.25, 1.0):
            preference = {"a": share, "b": 1 - share}
            answer = client.post("/v1/predict", json={"input": rows, "preference": preference}).json()
            truth = engine.merge(preference)(torch.tensor(rows))
            torch.testing.assert_close(torch.tensor(answer["output"]), truth.detach(), atol=1e-5, rtol=1e-5)
        refused = client.post("/v1/predict", json={"input": 3})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "input")
    with pytest.raises(ValueError, match="a function that answers for it, predict="):
        client_of(engine).__enter__()
