"""The server's addresses, as clients see them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import paretofuse as pf
from tests.support.served import text_store
from tests.support.waiting import until

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


@pytest.mark.parametrize("address", ["/healthz", "/readyz", "/metrics", "/v1/models", "/v1/front", "/"])
def test_head_is_get_without_its_body(client: Any, address: str) -> None:
    """What watches a server asks so."""
    full, head = client.get(address), client.head(address)
    assert (head.status_code, head.content) == (full.status_code, b"")
    assert head.headers["content-type"] == full.headers["content-type"]
    refused = client.head("/v1/completions")
    assert (refused.status_code, refused.content) == (405, b"")


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
        (
            {"prompt": "a", "preference": "news"},
            "preference",
            'expected a share of each objective, as in {"news"',
        ),
        ({"prompt": "a", "temperature": 3}, "temperature", "less than or equal to 2"),
        ({"prompt": "a", "presence_penalty": 0.5}, "presence_penalty", "less than or equal to 0"),
        ({"prompt": "a", "echo": True}, "echo", "should be False"),
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


def test_openais_other_fields_may_say_nothing(client: Any) -> None:
    body = {
        "prompt": "a", "max_tokens": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {},
        "logprobs": None, "echo": False, "best_of": 1, "suffix": None,
    }  # fmt: skip
    assert client.post("/v1/completions", json=body).status_code == 200


def test_unknown_addresses_and_broken_bodies(client: Any) -> None:
    assert "no address" in client.get("/v1/nothing").json()["error"]["message"]
    assert "expected" in client.get("/v1/completions").json()["error"]["message"]
    broken = client.post("/v1/completions", content="{", headers={"Content-Type": "application/json"})
    assert (broken.status_code, broken.json()["error"]["type"]) == (400, "invalid_request_error")
    for body, kind in (
        (b'{"prompt": "a"}', "text/plain"),
        (b"[]", "application/json"),
        (b"", "application/json"),
    ):
        answer = client.post("/v1/completions", content=body, headers={"Content-Type": kind})
        assert answer.status_code == 400
        assert (
            "expected a JSON object with Content-Type application/json" in answer.json()["error"]["message"]
        )


HALF = "\ud800"


@pytest.mark.parametrize(
    ("address", "body"),
    [
        ("completions", {"prompt": HALF}),
        ("completions", {"prompt": ["a", HALF]}),
        ("completions", {"prompt": "a", "stop": [HALF]}),
        ("completions", {"prompt": "a", "model": HALF}),
        ("completions", {"prompt": "a", "preference": {HALF: 1}}),
        ("completions", {"prompt": "a", "preference": {"best": HALF}}),
        ("completions", {"prompt": "a", HALF: 1}),
        ("chat/completions", {"messages": [{"role": "user", "content": HALF}]}),
        ("embeddings", {"input": HALF}),
        ("classify", {"input": [HALF]}),
        ("predict", {"input": {"deep": [{"deeper": HALF}]}}),
        ("preference", {"preference": {HALF: 1}}),
    ],
)
def test_halves_of_surrogate_pairs_are_the_clients_fault(client: Any, address: str, body: Any) -> None:
    call = client.put if address == "preference" else client.post
    answer = call(f"/v1/{address}", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert "half of a surrogate pair is no character" in answer.json()["error"]["message"]


def test_a_model_without_a_chat_template_refuses_chats(client: Any) -> None:
    answer = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "no_chat_template")
    assert "ask /v1/completions" in answer.json()["error"]["message"]


def test_metrics_are_prometheus_and_tell_what_happened(tmp_path: Path) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    from paretofuse.serving import create_app

    engine = pf.load(text_store(tmp_path), replicas=2)
    with fastapi_client.TestClient(create_app(engine)) as client:

        def number(name: str, **labels: str) -> float:
            families = text_string_to_metric_families(client.get("/metrics").text)
            found = [
                sample.value
                for family in families
                for sample in family.samples
                if sample.name == f"paretofuse_{name}" and sample.labels == labels
            ]
            return found[0] if found else 0.0

        until(lambda: number("merge_seconds_count") == 1)  # the default preference, ahead of any request
        assert engine.is_merged({"news": 0.5, "poems": 0.5})
        body = {"prompt": "The sea", "max_tokens": 3, "preference": {"news": 0.9, "poems": 0.1}}
        for _ in range(3):
            assert client.post("/v1/completions", json=body).status_code == 200
        assert client.post("/v1/completions", json={**body, "n": 0}).status_code == 400
        path = "/v1/completions"
        assert number("requests_total", path=path, status="200") == 3
        assert number("requests_total", path=path, status="400") == 1
        assert number("request_seconds_count", merged="no") == 1
        assert number("request_seconds_count", merged="yes") == 2
        assert number("merge_seconds_count") == number("replicas_merged") == engine.pool.merged() == 2
        assert number("merge_bytes_per_second") > 0
        assert number("model_bytes") == sum(4 * spec.numel for spec in engine.layout.tensors)
        assert 3 <= number("tokens_total") <= 9
        assert number("batch_rows_count", kind="merged") == number("tokens_total")  # a row in each
        until(lambda: number("active_rows") == 0)
        assert number("queue_rows") == number("refused_total") == number("cancelled_total") == 0


def test_who_shuts_down_says_so(engine: pf.Engine) -> None:
    from paretofuse.serving import create_app

    app = create_app(engine)
    with fastapi_client.TestClient(app) as client:
        app.state.serving.stop()
        for answer in (client.get("/readyz"), client.post("/v1/completions", json={"prompt": "a"})):
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")
        assert client.get("/healthz").status_code == 200
