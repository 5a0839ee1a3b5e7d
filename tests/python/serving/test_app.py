"""The server's addresses, as clients see them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import paretofuse as pf
from tests.support.served import text_store

fastapi_client = pytest.importorskip("starlette.testclient", reason="the server comes with the extra `serve`")

FRONT = pf.Front(
    np.array([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]),
    np.array([[10.0, 40.0], [20.0, 25.0], [45.0, 9.0]]),
    ("news", "poems"),
    ("news", "poems"),
    maximize=False,
)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> pf.Engine:
    return pf.load(text_store(tmp_path_factory.mktemp("served")))


@pytest.fixture
def client(engine: pf.Engine) -> Iterator[Any]:
    from paretofuse.serving import create_app

    with fastapi_client.TestClient(create_app(engine, model_name="tiny", front=FRONT)) as client:
        yield client


def greedy(engine: pf.Engine, preference: dict[str, float], prompt: str, tokens: int) -> str:
    """What the merged model generates by itself."""
    from tests.support.served import character_tokenizer

    tokenizer = character_tokenizer()
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    found = engine.merge(preference).generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    return str(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True))


def test_what_it_says_of_itself(client: Any) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"status": "ok"}
    models = client.get("/v1/models").json()
    assert [model["id"] for model in models["data"]] == ["tiny"]


def test_front_and_default_preference(client: Any) -> None:
    document = client.get("/v1/front").json()
    assert document["task"] == "text-generation"
    assert document["objectives"] == ["news", "poems"]
    assert document["metrics"] == {"news": {"maximize": False}, "poems": {"maximize": False}}
    assert document["default"] == {"news": 0.5, "poems": 0.5}
    assert document["points"][2] == {
        "preference": {"news": 0.0, "poems": 1.0},
        "values": {"news": 45.0, "poems": 9.0},
    }
    changed = client.put("/v1/preference", json={"preference": {"at_most": {"news": 30.0}, "best": "poems"}})
    assert changed.json() == {"preference": {"news": 0.5, "poems": 0.5}}
    changed = client.put("/v1/preference", json={"preference": {"news": 1}})
    assert changed.json() == {"preference": {"news": 1.0, "poems": 0.0}}
    assert client.get("/v1/front").json()["default"] == {"news": 1.0, "poems": 0.0}


def test_completions_are_the_merged_models(client: Any, engine: pf.Engine) -> None:
    preference = {"news": 0.7, "poems": 0.3}
    body = {"prompt": "The sea", "max_tokens": 8, "temperature": 0, "preference": preference}
    answer = client.post("/v1/completions", json=body).json()
    assert answer["preference"] == preference
    assert answer["choices"][0]["text"] == greedy(engine, preference, "The sea", 8)
    assert answer["usage"]["prompt_tokens"] == 7


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"prompt": "a", "preference": {"news": 0.7}}, "preference", "give 'poems' as well"),
        ({"prompt": "a", "preference": {"sports": 1}}, "preference", "'sports'"),
        ({"prompt": "a", "preference": {"at_most": {"news": 1.0}}}, "preference", "lowest 10"),
        ({"prompt": "a", "model": "gpt-4"}, "model", "expected 'tiny'"),
        ({"prompt": "a", "preferences": {"news": 1}}, "preferences", "does not know"),
        ({"prompt": "a", "temperature": 3}, "temperature", "less than or equal to 2"),
        ({}, "prompt", "required"),
    ],
)
def test_refusals_have_openais_shape(client: Any, body: dict[str, Any], param: str, words: str) -> None:
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == (404 if param == "model" else 400)
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert words in error["message"]


def test_unknown_addresses_and_broken_bodies(client: Any) -> None:
    assert "no address" in client.get("/v1/nothing").json()["error"]["message"]
    assert "expected" in client.get("/v1/completions").json()["error"]["message"]
    broken = client.post("/v1/completions", content="{", headers={"Content-Type": "application/json"})
    assert (broken.status_code, broken.json()["error"]["type"]) == (400, "invalid_request_error")
