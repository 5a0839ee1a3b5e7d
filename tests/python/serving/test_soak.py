"""At saturation, with clients that leave, read slowly or send nonsense, and with reloads: no wrong answer."""

from __future__ import annotations

import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import paretofuse as pf
from benchmarks.harness.record import resident
from tests.support.served import character_tokenizer, running, text_store
from tests.support.waiting import until

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi", reason="the server comes with the extra `serve`")

CLIENTS = 8
PROMPTS = ["The sea", "a", "Nine hills and a river", "x y"]
SHARES = [0.0, 0.15, 0.3, 0.5, 0.7, 0.85, 1.0]
NONSENSE = [
    b"", b"{", b"[]", b'{"prompt": 3}', b'{"prompt": "a", "preference": {"news": 2}}', b"\xff\xfe",
    b'{"prompt": "a", "max_tokens": 1e9}', b'{"prompt": "a", "what": 1}',
]  # fmt: skip


def truths(engine: pf.Engine, tokens: int) -> dict[tuple[str, float], str]:
    """What the merged models generate alone."""
    tokenizer, found = character_tokenizer(), {}
    for share in SHARES:
        module = engine.merge({"news": share, "poems": 1 - share})
        for prompt in PROMPTS:
            ids = torch.tensor([tokenizer(prompt)["input_ids"]])
            new = module.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
            )
            found[prompt, share] = str(tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True))
    return found


class Clients:
    """Clients that go on until they are told to stop, and what they found."""

    def __init__(self, url: str, expected: list[dict[tuple[str, float], str]], tokens: int) -> None:
        self._url, self._expected, self._tokens = url, expected, tokens
        self._stop = threading.Event()
        self.wrong: list[str] = []
        self.right = self.full = self.refused = 0

    def stop(self) -> None:
        """After the request that each is at."""
        self._stop.set()

    def run(self, seed: int) -> None:
        """One client."""
        draw = random.Random(seed)
        with httpx.Client(base_url=self._url, timeout=120) as client:
            while not self._stop.is_set():
                kind = draw.choices(["ask", "stream", "slow", "leave", "nonsense"], [6, 3, 1, 2, 1])[0]
                if kind == "nonsense":
                    answer = client.post("/v1/completions", content=draw.choice(NONSENSE))
                    if answer.status_code not in (400, 429) or "error" not in answer.json():
                        self.wrong.append(f"{answer.status_code} for nonsense")
                    self.refused += 1
                    continue
                self._ask(client, kind, draw)

    def _ask(self, client: Any, kind: str, draw: random.Random) -> None:
        prompt, share = draw.choice(PROMPTS), draw.choice(SHARES)
        body = {
            "prompt": prompt, "max_tokens": self._tokens, "temperature": 0,
            "preference": {"news": share, "poems": 1 - share}, "stream": kind != "ask",
        }  # fmt: skip
        with client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code == 429:
                self.full += 1
                answer.read()
                return
            if answer.status_code != 200:
                self.wrong.append(f"{answer.status_code}: {answer.read()!r}")
                return
            if kind == "ask":
                text = json.loads(answer.read())["choices"][0]["text"]
            else:
                text = ""
                for line in answer.iter_lines():
                    if not line.startswith("data: {"):
                        continue
                    if kind == "leave":
                        return
                    text += json.loads(line[6:])["choices"][0]["text"]
                    if kind == "slow":
                        time.sleep(0.01)
        if any(text == version[prompt, share] for version in self._expected):
            self.right += 1
        else:
            self.wrong.append(f"{prompt!r} at {share}: {text!r}")


@pytest.mark.parametrize("seconds", [3.0, pytest.param(60.0, marks=pytest.mark.long)])
def test_no_wrong_answer_at_saturation(tmp_path: Path, seconds: float) -> None:
    from paretofuse.serving import Limits, create_app, reload

    tokens = 10
    stores = [pf.load(text_store(tmp_path / name, size=size)) for name, size in (("one", 0.1), ("two", 0.2))]
    expected = [truths(engine, tokens) for engine in stores]
    assert expected[0] != expected[1]
    app = create_app(pf.load(tmp_path / "one" / "store"), limits=Limits(max_batch=4, queue=6))
    with running(app) as url, ThreadPoolExecutor(CLIENTS) as pool, httpx.Client(base_url=url) as client:
        clients = Clients(url, expected, tokens)
        running_clients = [pool.submit(clients.run, seed) for seed in range(CLIENTS)]
        try:
            until(lambda: clients.right >= 20)
            before = resident("RssAnon") or 0
            end, number = time.monotonic() + seconds, 0
            while time.monotonic() < end or number < 2:
                number += 1
                reload(app, pf.load(tmp_path / ("two" if number % 2 else "one") / "store"))
                enough = clients.right + 20
                until(lambda least=enough: clients.right >= least)  # type: ignore[misc]
        finally:
            clients.stop()
        for future in running_clients:
            future.result()
        grown = (resident("RssAnon") or 0) - before
        assert clients.wrong == []
        assert clients.refused > 0
        until(lambda: "paretofuse_active_rows 0.0" in client.get("/metrics").text)
        assert "paretofuse_queue_rows 0.0" in client.get("/metrics").text
        if seconds >= 60:
            assert grown < 100e6, f"memory grew by {grown / 1e6:.0f} MB over {number} reloads"
