"""A new store version takes over while requests go on, clients leave, and the command starts and stops."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch

import paretofuse as pf
from tests.support.models import perturbed, tiny_gpt2
from tests.support.served import character_tokenizer, running, text_store
from tests.support.waiting import until

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi", reason="the server comes with the extra `serve`")

BODY = {"prompt": "The sea", "max_tokens": 12, "temperature": 0, "preference": {"news": 0.6, "poems": 0.4}}


def greedy(engine: pf.Engine) -> str:
    tokenizer = character_tokenizer()
    ids = torch.tensor([tokenizer("The sea")["input_ids"]])
    found = engine.merge(BODY["preference"]).generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    return str(tokenizer.decode(found[0, 7:], skip_special_tokens=True))


def other_version(path: Path) -> pf.Engine:
    """Write other experts into a store's place."""
    base = path.parent / "base"
    for seed, name in enumerate(("news", "poems"), start=11):
        perturbed(tiny_gpt2(positions=64), seed, 0.2).save_pretrained(path.parent / name)  # type: ignore[operator]
    engine = pf.stack(base, {name: path.parent / name for name in ("news", "poems")})
    engine.save(path)
    return engine


def test_a_reload_drops_no_request(tmp_path: Path) -> None:
    from paretofuse.serving import create_app, reload

    store = text_store(tmp_path)
    old = pf.load(store)
    app = create_app(old)
    before = greedy(old)
    answers: list[str] = []

    def ask(client: Any) -> None:
        answer = client.post("/v1/completions", json=BODY)
        assert answer.status_code == 200, answer.text
        answers.append(answer.json()["choices"][0]["text"])

    with running(app) as url, httpx.Client(base_url=url, timeout=60) as client, ThreadPoolExecutor(4) as pool:
        ask(client)
        asked = [pool.submit(ask, client) for _ in range(20)]
        after = greedy(other_version(store))
        new = pf.load(store)
        reload(app, new)
        for _ in range(10):
            asked.append(pool.submit(ask, client))
        for future in asked:
            future.result()
        ask(client)
        assert answers[0] == before
        assert answers[-1] == after != before
        assert set(answers) == {before, after}
        assert "reloads_total 1.0" in client.get("/metrics").text
        wrong = pf.stack(tiny_gpt2(), {"a": perturbed(tiny_gpt2(), 1)})
        with pytest.raises(ValueError, match="start another server"):
            reload(app, wrong)
        ask(client)
        assert answers[-1] == after


def test_a_client_that_leaves_frees_its_place(tmp_path: Path) -> None:
    from paretofuse.serving import Limits, create_app

    engine = pf.load(text_store(tmp_path))
    app = create_app(engine, limits=Limits(max_batch=1))

    def number(client: Any, name: str) -> float:
        return float(re.search(rf"^paretofuse_{name}(?:{{.*}})? (.*)$", client.get("/metrics").text, re.M)[1])  # type: ignore[index]

    with running(app) as url, httpx.Client(base_url=url, timeout=60) as client:
        for stream in (True, False):
            before = number(client, "cancelled_total")
            with httpx.Client(base_url=url, timeout=60) as leaver:
                request = leaver.build_request(
                    "POST", "/v1/completions", json={**BODY, "max_tokens": 57, "n": 60, "stream": stream}
                )
                _left(leaver, request, stream)
            until(lambda seen=before: number(client, "cancelled_total") == seen + 1)
            until(lambda: number(client, "active_rows") <= 1)
        answer = client.post("/v1/completions", json=BODY)
        assert answer.json()["choices"][0]["text"] == greedy(engine)


def _left(client: Any, request: Any, stream: bool) -> None:
    """Send a request and close the connection before its answer is whole."""
    if stream:
        answer = client.send(request, stream=True)
        next(answer.iter_lines())
        answer.close()
        return
    request.extensions["timeout"] = {"connect": 60, "read": 0.05, "write": 60, "pool": 60}
    with pytest.raises(httpx.ReadTimeout):
        client.send(request)


@contextmanager
def served(store: Path, *words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command in a process of its own, and its URL."""
    command = [sys.executable, "-m", "paretofuse", "serve", str(store), "--port", "0", *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(r"served at (http://127\.0\.0\.1:\d+)", line)
        assert found, line + process.stderr.read()
        yield process, found[1]
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_the_command(tmp_path: Path) -> None:
    store = text_store(tmp_path)
    (tmp_path / "keys").write_text("open sesame\n")
    front = pf.sweep(pf.load(store), lambda module: {"loss": 1.0}, pf.simplex_grid(2, 3), maximize=False)
    front.to_csv(tmp_path / "front.csv")
    words = (
        "--front",
        str(tmp_path / "front.csv"),
        "--api-key-file",
        str(tmp_path / "keys"),
        "--grid",
        "10",
        "--threads",
        "1",
    )
    with served(store, *words) as (process, url):
        client = httpx.Client(base_url=url, timeout=60, headers={"Authorization": "Bearer open sesame"})

        def ask() -> Any:
            return client.post("/v1/completions", json=BODY).json()["choices"][0]["text"]

        with client:
            assert len(client.get("/v1/front").json()["points"]) == 3
            before = greedy(pf.load(store))
            assert ask() == before
            after = greedy(other_version(store))
            process.send_signal(signal.SIGHUP)
            until(lambda: ask() == after)
            answer = client.post(
                "/v1/completions", json={**BODY, "preference": {"news": 0.58, "poems": 0.42}}
            )
            assert answer.json()["preference"] == {"news": 0.6, "poems": 0.4}  # on the grid
            many = {**BODY, "n": 40, "max_tokens": 50, "stream": True}
            with client.stream("POST", "/v1/completions", json=many) as stream:
                lines = stream.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                rest = [line for line in lines if line]  # what is in work ends first
            assert rest[-1] == "data: [DONE]"
            assert sum('"finish_reason":null' not in line for line in rest[:-1]) in (39, 40)
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        assert "no longer served" in out


def test_a_new_version_is_taken_up_unasked_and_a_bad_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[logging.LogRecord]
) -> None:
    from paretofuse.serving import create_app, server

    store = text_store(tmp_path)
    app = create_app(pf.load(store))
    monkeypatch.setattr(server, "_LOOK_EVERY", 0.01)

    def served_now() -> pf.Engine:
        engine: pf.Engine = app.state.serving.model.engine
        return engine

    async def watched() -> None:
        watching = asyncio.create_task(server._watch(app, asyncio.Event(), store, lambda: pf.load(store)))
        await asyncio.sleep(0)  # it has seen the first version
        first = served_now()
        truth = greedy(other_version(store))
        while served_now() is first:
            await asyncio.sleep(0.01)
        second = served_now()
        assert greedy(second) == truth
        (store / "manifest.json").write_text("{}")
        while not any("cannot be served" in record.getMessage() for record in logged):
            await asyncio.sleep(0.01)
        assert served_now() is second
        watching.cancel()

    asyncio.run(asyncio.wait_for(watched(), 120))
    app.state.serving.stop()


ENDLESS = """
import threading

def answer(module, given):
    if given == "wait":
        threading.Event().wait()
    return "here"
"""


def test_a_second_signal_waits_for_no_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = text_store(tmp_path)
    (tmp_path / "endless.py").write_text(ENDLESS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with (
        served(store, "--predict", "endless:answer") as (process, url),
        httpx.Client(base_url=url, timeout=600) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        assert client.post("/v1/predict", json={"input": "here"}).json()["output"] == "here"

        def refused() -> bool:
            try:
                client.get("/healthz")
            except httpx.HTTPError:
                return True
            return False

        wait = pool.submit(httpx.post, f"{url}/v1/predict", json={"input": "wait"}, timeout=600)
        until(lambda: "paretofuse_active_rows 1.0" in client.get("/metrics").text)
        process.send_signal(signal.SIGTERM)
        until(refused)
        assert process.poll() is None
        assert not wait.done()  # it is in work
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=600)
        with pytest.raises(httpx.HTTPError):
            wait.result()
    assert process.returncode == 0
    assert "no longer served" in out
    assert err == ""


@pytest.mark.parametrize(
    "begun",
    [
        b"",
        b"POST /v1/completions HTTP/1.1\r\nHost: loc",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b'Content-Length: 99\r\n\r\n{"prompt":',
    ],
)
def test_a_request_that_never_ends_is_ended(
    begun: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the server, while a request in work that takes longer goes on."""
    from paretofuse.serving import create_app, server

    monkeypatch.setattr(server, "_SLOWEST", 0.5)
    engine = pf.load(text_store(tmp_path))
    at_work, done = threading.Event(), threading.Event()

    def answer(_: object, given: object) -> str:
        at_work.set()
        done.wait(60)
        return "at last"

    app = create_app(engine, predict=answer)
    urls: Queue[str] = Queue()

    def ask() -> None:
        url = urls.get(timeout=60)
        with ThreadPoolExecutor(1) as pool:
            slow = pool.submit(httpx.post, f"{url}/v1/predict", json={"input": "x"}, timeout=60)
            try:
                assert at_work.wait(60)
                place = urlsplit(url)
                with socket.create_connection((place.hostname, place.port), timeout=60) as connection:
                    connection.sendall(begun)
                    try:
                        while connection.recv(1000):
                            pass  # an answer to what was whole
                    except ConnectionResetError:
                        pass
                    found.append("ended")
            finally:
                done.set()
                found.append(slow.result().json())
                os.kill(os.getpid(), signal.SIGTERM)

    found: list[Any] = []
    asking = threading.Thread(target=ask)
    asking.start()
    server.serve(app, "127.0.0.1", 0, started=urls.put)
    asking.join()
    assert found[0] == "ended"
    assert found[1]["output"] == "at last"


def test_small_packets_are_sent_at_once() -> None:
    from paretofuse.serving.server import listening

    async def option() -> int:
        accepted: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def found(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connection = writer.get_extra_info("socket")
            accepted.set_result(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        with listening("127.0.0.1", 0) as listener:
            async with await asyncio.start_server(found, sock=listener):
                _, writer = await asyncio.open_connection(*listener.getsockname())
                number = await accepted
                writer.close()
        return number

    assert asyncio.run(option()) != 0


def test_what_the_command_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.support.command import call

    store = text_store(tmp_path)
    (tmp_path / "none").write_text("\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for words, message in (
        (["--api-key-file", tmp_path / "none"], "without a key"),
        (["--queue", "0"], "at least 1"),
        (["--timeout", "0"], "--timeout 0.0, expected a finite number above 0"),
        (["--timeout", "inf"], "--timeout inf, expected a finite number above 0"),
        (["--api-key-file", tmp_path / "binary"], "binary, which is no text in UTF-8"),
        (["--model-name", ""], "1 to 200 characters"),
        (["--point", "average"], "expected LABEL:NAME=NUMBER"),
        (["--point", "average:news=1"], "expected no point without a front"),
        (["--front", tmp_path / "nothing.csv"], "No such file"),
        (["--host", "192.0.2.1", "--port", "0"], "assign requested address"),
    ):
        code, _, err = call(capsys, "serve", store, *words)
        assert code in (1, 2), words
        assert message in err
