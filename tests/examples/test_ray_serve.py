"""examples/ray_serve: two replicas in processes of their own, one of which is killed under load."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import paretofuse as pf
from tests.support.process import ROOT
from tests.support.served import character_tokenizer, text_store
from tests.support.waiting import until

httpx = pytest.importorskip("httpx")
ray = pytest.importorskip("ray")
pytest.importorskip("ray.serve", reason="needs ray[serve]")

CLIENTS = 4


def body(number: int) -> dict[str, Any]:
    """A request; requests go round three preferences."""
    share = (0.2, 0.5, 0.9)[number % 3]
    return {
        "prompt": "The sea",
        "max_tokens": 12,
        "temperature": 0,
        "preference": {"news": share, "poems": 1 - share},
    }


def greedy(engine: pf.Engine, preference: dict[str, float]) -> str:
    """What the merged model answers."""
    tokenizer = character_tokenizer()
    ids = torch.tensor([tokenizer("The sea")["input_ids"]])
    found = engine.merge(preference).generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    return str(tokenizer.decode(found[0, 7:], skip_special_tokens=True))


@contextmanager
def served(store: Path) -> Iterator[str]:
    """The URL of the example's application on a local cluster."""
    from ray import serve

    from examples.ray_serve.app import Arguments, build

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    environment = {"env_vars": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build(Arguments(store=str(store), replicas=2)))
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def with_the_store(store: Path) -> set[int]:
    """The processes that have mapped a store's files."""
    found = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            if str(store) in maps.read_text():
                found.add(int(maps.parent.name))
        except OSError:  # it ended, or is another user's
            continue
    return found - {os.getpid()}


def test_the_app_of_a_replica(tmp_path: Path) -> None:
    from starlette.testclient import TestClient

    from examples.ray_serve.app import Arguments, make_app

    store = text_store(tmp_path)
    with TestClient(make_app(Arguments(store=str(store), model_name="mine"))) as client:
        answer = client.post("/v1/completions", json={**body(0), "model": "mine"}).json()
    assert answer["choices"][0]["text"] == greedy(pf.load(store), body(0)["preference"])
    with pytest.raises(ValueError, match="front_csv"):
        Arguments(store=str(store), front_csv="front.csv")  # type: ignore[call-arg]


@pytest.mark.long
@pytest.mark.skipif(
    not Path("/proc/self/maps").exists(), reason="finds the replicas by what they have mapped"
)
def test_a_killed_replica_costs_only_what_it_had_in_work(tmp_path: Path) -> None:
    store = text_store(tmp_path)
    engine = pf.load(store)
    truths = [greedy(engine, body(number)["preference"]) for number in range(3)]
    asked: list[tuple[float, int, str]] = []  # when, its number, and what came
    stop = threading.Event()

    def client(url: str, first: int) -> None:
        with httpx.Client(base_url=url, timeout=120) as own:
            number = first
            while not stop.is_set():
                when = time.monotonic()
                try:
                    answer = own.post("/v1/completions", json=body(number))
                    text = answer.json()["choices"][0]["text"] if answer.status_code == 200 else answer.text
                except httpx.HTTPError as error:
                    text = repr(error)
                asked.append((when, number, text))
                number += 1

    def right(when: float) -> int:
        return sum(began >= when and text == truths[n % 3] for began, n, text in asked)

    with served(store) as url, ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(client, url, first) for first in range(CLIENTS)]
        try:
            until(lambda: right(0.0) >= 3 * CLIENTS)
            replicas = with_the_store(store)
            assert len(replicas) == 2
            killed = replicas.pop()
            os.kill(killed, signal.SIGKILL)
            when = time.monotonic()
            until(lambda: right(when) >= 10 * CLIENTS)
            until(lambda: len(with_the_store(store) - {killed}) == 2)  # another takes its place
            again = time.monotonic()
            until(lambda: right(again) >= 3 * CLIENTS)
        finally:
            stop.set()
        for future in clients:
            future.result()
    wrong = [(began - when, text) for began, number, text in asked if text != truths[number % 3]]
    assert len(wrong) <= CLIENTS, wrong
    assert all(began <= 0 for began, _ in wrong), wrong
