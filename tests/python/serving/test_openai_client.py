"""The official openai client, over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import paretofuse as pf
from tests.support.served import character_tokenizer, running, text_store

openai = pytest.importorskip("openai", reason="the official client is among what the tests need")
pytest.importorskip("fastapi", reason="the server comes with the extra `serve`")

PREFERENCES = [{"news": i / 7, "poems": 1 - i / 7} for i in range(8)]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> pf.Engine:
    return pf.load(text_store(tmp_path_factory.mktemp("chat"), chat=True))


@pytest.fixture(scope="module")
def client(engine: pf.Engine) -> Iterator[Any]:
    from paretofuse.serving import create_app

    app = create_app(engine, model_name="tiny", api_keys=["right"])
    with running(app) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="right", max_retries=0) as client:
        yield client


def greedy(engine: pf.Engine, preference: dict[str, float], prompt: str, tokens: int) -> str:
    tokenizer = character_tokenizer()
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    found = engine.merge(preference).generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    return str(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True))


def test_models_and_completions(client: Any, engine: pf.Engine) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    answer = client.completions.create(
        model="tiny",
        prompt=["sea", "hill"],
        max_tokens=5,
        temperature=0,
        extra_body={"preference": PREFERENCES[2]},
    )
    assert [choice.text for choice in answer.choices] == [
        greedy(engine, PREFERENCES[2], prompt, 5) for prompt in ("sea", "hill")
    ]
    assert answer.usage.prompt_tokens == 7
    assert answer.preference == PREFERENCES[2]


def test_a_stream_has_the_same_text_and_the_usage(client: Any, engine: pf.Engine) -> None:
    chunks = list(
        client.completions.create(
            model="tiny", prompt="sea", max_tokens=6, temperature=0, stream=True,
            stream_options={"include_usage": True}, extra_body={"preference": PREFERENCES[5]},
        )
    )  # fmt: skip
    text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
    assert text == greedy(engine, PREFERENCES[5], "sea", 6)
    assert chunks[-1].usage.prompt_tokens == 3
    assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] in (
        ["stop"],
        ["length"],
    )


def test_chat(client: Any, engine: pf.Engine) -> None:
    templated = "system: be kind. user: the sea. assistant: "
    truth = greedy(engine, PREFERENCES[1], templated, 6)
    settings: dict[str, Any] = {
        "model": "tiny",
        "messages": [
            {"role": "system", "content": "be kind"},
            {"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "sea"}]},
        ],
        "temperature": 0,
        "max_completion_tokens": 6,
        "extra_body": {"preference": PREFERENCES[1]},
    }
    answer = client.chat.completions.create(**settings)
    assert answer.choices[0].message.content == truth
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage.prompt_tokens == len(templated)
    chunks = list(client.chat.completions.create(**settings, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == truth


def test_errors_are_openais(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="divide by the sum") as refused:
        client.completions.create(
            model="tiny", prompt="a", extra_body={"preference": {"news": 0.6, "poems": 0.6}}
        )
    assert refused.value.param == "preference"
    with pytest.raises(openai.NotFoundError, match="'gpt-4'"):
        client.completions.create(model="gpt-4", prompt="a")
    with pytest.raises(openai.BadRequestError, match="does not know") as unknown:
        client.completions.create(model="tiny", prompt="a", extra_body={"top_k": 3})
    assert unknown.value.param == "top_k"
    with pytest.raises(openai.AuthenticationError, match="Authorization: Bearer"):
        client.with_options(api_key="wrong").models.list()


def test_many_clients_at_many_preferences(client: Any, engine: pf.Engine) -> None:
    def ask(preference: dict[str, float]) -> str:
        answer = client.completions.create(
            model="tiny", prompt="The sea", max_tokens=6, temperature=0, extra_body={"preference": preference}
        )
        return str(answer.choices[0].text)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, PREFERENCES * 2))
    assert found == [greedy(engine, preference, "The sea", 6) for preference in PREFERENCES * 2]


def test_a_seed_repeats_and_n_differs(client: Any) -> None:
    def ask() -> list[str]:
        answer = client.completions.create(
            model="tiny", prompt="sea", max_tokens=8, temperature=1.5, top_p=0.95, seed=3, n=4
        )
        return [choice.text for choice in answer.choices]

    first = ask()
    assert first == ask()
    assert len(set(first)) > 1
