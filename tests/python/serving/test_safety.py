"""Keys, hosts, sizes, downloads; and what schemathesis thinks up."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import paretofuse as pf
from tests.support.models import tiny_gpt2
from tests.support.served import text_store

testclient = pytest.importorskip("starlette.testclient", reason="the server comes with the extra `serve`")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> pf.Engine:
    return pf.load(text_store(tmp_path_factory.mktemp("safe"), chat=True))


def client_of(engine: pf.Engine, **options: Any) -> Any:
    from paretofuse.serving import create_app

    return testclient.TestClient(create_app(engine, **options), raise_server_exceptions=False)


def test_keys(engine: pf.Engine) -> None:
    client = client_of(engine, api_keys=["first", "zweiter schlüssel"])
    for right in ("first", "zweiter schlüssel"):
        headers = {"Authorization": b"Bearer " + right.encode()}
        assert client.get("/v1/models", headers=headers).status_code == 200
    for wrong in ({}, {"Authorization": "Bearer "}, {"Authorization": "first"}, {"Authorization": "Basic first"},
                  {"Authorization": "Bearer firs"}, {"Authorization": "Bearer first "+"x" * 5000}):  # fmt: skip
        answer = client.get("/v1/models", headers=wrong)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200
    assert client.get("/metrics").status_code == 401
    for wrong_keys in ("first", [""], [3]):
        with pytest.raises(TypeError, match="api_keys"):
            client_of(engine, api_keys=wrong_keys)


def test_a_key_is_compared_with_all_of_them_whichever_it_is(
    engine: pf.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the time tells nothing: each comparison is hmac's, of digests of one length."""
    import hmac

    seen: list[tuple[int, int]] = []
    compare = hmac.compare_digest

    def counting(a: bytes, b: bytes) -> bool:
        seen.append((len(a), len(b)))
        return compare(a, b)

    client = client_of(engine, api_keys=["first", "the second", "x" * 100])
    monkeypatch.setattr(hmac, "compare_digest", counting)
    for key in ("first", "the second", "f", "y" * 1000):
        client.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
        assert seen == [(32, 32)] * 3
        seen.clear()


def test_hosts_and_headers(engine: pf.Engine) -> None:
    client = client_of(engine, hosts={"localhost", "[::1]"})
    for right in ("localhost", "localhost:8000", "[::1]:8000", "LOCALHOST"):
        answer = client.get("/healthz", headers={"Host": right})
        assert answer.status_code == 200
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
    for wrong in ("evil.example", "localhost.evil.example", "127.0.0.1", ""):
        answer = client.get("/healthz", headers={"Host": wrong})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "wrong_host")
        assert "content-security-policy" in answer.headers


def test_sizes_are_bounded(engine: pf.Engine) -> None:
    from paretofuse.serving import Limits

    client = client_of(engine, limits=Limits(body_bytes=2000, inputs=3, max_tokens=20))

    def ask(**body: Any) -> Any:
        return client.post("/v1/completions", json={"prompt": "a", **body})

    assert ask(prompt="a" * 3000).status_code == 413

    def pieces() -> Iterator[bytes]:  # without a length told ahead
        for _ in range(30):
            yield b" " * 100

    assert client.post("/v1/completions", content=pieces()).status_code == 413
    for body, words in (
        ({"prompt": ["a"] * 4}, "at most 3 answers"),
        ({"n": 4}, "at most 3 answers"),
        ({"max_tokens": 21}, "20 new ones"),
        ({"prompt": "a" * 64}, "at most 64 in all"),
        ({"prompt": [101]}, "tokens below 101"),
        ({"prompt": ""}, "at least one"),
        ({"preference": {f"o{i}": 0.001 for i in range(300)}}, "256"),
        ({"stop": ["x"] * 17}, "16"),
    ):
        answer = client.post("/v1/completions", json={"prompt": "a", **body})
        if len(answer.request.content) <= 2000:
            assert answer.status_code == 400, body
            assert words in answer.json()["error"]["message"]
        else:
            assert answer.status_code == 413


def test_weights_are_the_merged_models(engine: pf.Engine) -> None:
    client = client_of(engine)
    answer = client.get("/v1/models/news=0.7,poems=0.3/weights")
    found = safetensors.torch.load(answer.content)
    truth = engine.merge_state_dict({"news": 0.7, "poems": 0.3})
    assert set(found) <= set(truth)
    assert {id(truth[name]) for name in found} == {id(tensor) for tensor in truth.values()}  # tied ones once
    for name, tensor in found.items():
        assert torch.equal(tensor, truth[name])
    for wrong in ("news=0.7", "news", "..%2f..%2fetc%2fpasswd", "news=0.5,news=0.5", "news=nan,poems=0"):
        refused = client.get(f"/v1/models/{wrong}/weights")
        assert refused.status_code in (400, 404)
        assert refused.json()["error"]["message"].startswith("got ")
    dense = client.get("/v1/models/news=1,poems=0/adapter")
    assert (dense.status_code, dense.json()["error"]["code"]) == (404, "no_adapter")
    assert "/v1/models/{preference}/weights" in dense.json()["error"]["message"]  # what this client can do
    assert "rank=" not in dense.json()["error"]["message"]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # of peft
def test_an_adapter_loads_with_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from tests.support import adapters

    base = tiny_gpt2()
    experts = {
        name: adapters.saved(base, tmp_path / name, seed, fan_in_fan_out=True)
        for seed, name in enumerate("ab")
    }
    engine = pf.stack(base, experts, planes="auto")
    preference = dict(zip(experts, (0.4, 0.6), strict=True))
    words = ",".join(f"{name}={share}" for name, share in preference.items())
    client = client_of(engine, predict=lambda module, given: None)
    answer = client.get(f"/v1/models/{words}/adapter")
    assert answer.status_code == 200, answer.text
    zipfile.ZipFile(io.BytesIO(answer.content)).extractall(tmp_path / "adapter")
    ids = torch.arange(6).view(1, 6)
    with torch.no_grad():
        truth = engine.merge(preference)(ids).logits
        found = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")(ids).logits
    torch.testing.assert_close(found, truth, atol=1e-4, rtol=1e-4)


def test_no_code_of_a_stores_runs(tmp_path: Path) -> None:
    """A base directory whose files name classes of a file beside them: a store keeps it, as text."""
    text_store(tmp_path)
    base, ran = tmp_path / "base", tmp_path / "ran"
    (base / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Evil: pass\n")
    for name, word in (("config.json", "AutoConfig"), ("tokenizer_config.json", "AutoTokenizer")):
        document = json.loads((base / name).read_text())
        document["auto_map"] = {word: "evil.Evil" if word == "AutoConfig" else ["evil.Evil", "evil.Evil"]}
        (base / name).write_text(json.dumps(document))
    pf.stack(base, {name: tmp_path / name for name in ("news", "poems")}).save(tmp_path / "evil.store")
    with client_of(pf.load(tmp_path / "evil.store")) as client:
        assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200
    assert not ran.exists()


def test_docs_need_no_network(engine: pf.Engine) -> None:
    client = client_of(engine)
    page = client.get("/docs").text
    assert "POST /v1/completions" in page
    assert "preference" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    assert "<script" not in page


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_nothing_that_schemathesis_sends_breaks_it(engine: pf.Engine) -> None:
    schemathesis: Any = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis.errors import Unsatisfiable
    from schemathesis.specs.openapi import checks

    from paretofuse.serving import Limits, create_app

    app = create_app(engine, limits=Limits(max_tokens=8))
    promised = [
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_schema_conformance,
    ]
    seen: set[int] = set()

    def send(case: Any) -> None:
        answer = case.call()
        seen.add(answer.status_code)
        case.validate_response(answer, checks=promised)
        assert answer.status_code < 500, answer.text
        if answer.status_code >= 400:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

    with testclient.TestClient(app):  # its lifespan
        for found in schemathesis.openapi.from_asgi("/openapi.json", app).get_all_operations():
            for mode in schemathesis.GenerationMode:
                cases = found.ok().as_strategy(generation_mode=mode)
                bounded = settings(
                    max_examples=8, deadline=None, derandomize=True, database=None,
                    phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck),
                )  # fmt: skip
                with suppress(Unsatisfiable):  # where nothing can be wrong, as in GET /healthz
                    bounded(given(cases)(send))()
    assert {200, 400} <= seen
