"""What does a server cost, and what does it gain? `paretofuse serve` on loopback, beside the module and a plain server.

A GPT-2-sized store (124 million parameters, weights drawn at random from a seed, float32), two experts, once fully
fine-tuned and once LoRAs of rank 8. Server and clients are processes of their own on the same cores; prompts are
tokens, so that no tokenizer's time is in it, and answers are greedy.

- the first answer: from the start of the process, beside one that only imports torch and the model's class
- a request at a preference that is merged, for one token, beside a forward pass of the module in this process; also of
  a model of two layers, whose passes take so little that nothing else is in the difference, beside `generate` too
- a request at a preference that is not, beside that forward pass and a switch
- 16 clients, each with its own preference, beside a server that takes a lock, switches and generates one by one
- 16 clients at one preference, beside transformers' `generate` on a batch of their 16 prompts

Answers are compared first: each is what the server that switches and generates says, token by token.
"""

from __future__ import annotations

import http.client
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import paretofuse as pf
from benchmarks.harness.record import ROOT, BenchmarkError, Options, Row, check, milliseconds, paired_ratio

CLIENTS = 16
PROMPT = 16


@dataclass(frozen=True)
class Sizes:
    """How much is asked for."""

    vocabulary: int
    tokens: int


SMALL = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 101, "n_positions": 64}


def run(options: Options) -> list[Row]:
    """Measure all of it."""
    torch.set_num_threads(options.threads)
    sizes, small = Sizes(50257, 16), Sizes(SMALL["vocab_size"], 4)
    if options.quick:
        sizes = small
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="paretofuse-") as name:
        rows += _overhead(_store(Path(name, "small"), "dense", True), options, small)
        for kind in ("dense", "LoRA"):
            store = _store(Path(name), kind, options.quick)
            if kind == "dense":
                rows += _first(store, options, sizes)
                rows += _alone(store, options, sizes)
            rows += _together(store, kind, options, sizes)
    return rows


def _overhead(store: Path, options: Options, sizes: Sizes) -> list[Row]:
    """What a request costs beside the module, where the module costs nearly nothing."""
    times = _one_client(store, options, sizes, options.repeat(300), ("hit", "module", "generate"))
    return [
        Row(
            "a request where it is merged, 2 layers", "ours less module", "time", "ms",
            milliseconds([a - b for a, b in zip(times["hit"], times["module"], strict=True)]), target="<= 1",
        ),
        Row(
            "a request where it is merged, 2 layers", "ours less generate", "time", "ms",
            milliseconds([a - b for a, b in zip(times["hit"], times["generate"], strict=True)]),
        ),
        Row("a forward pass, 2 layers", "module", "time", "ms", milliseconds(times["module"])),
    ]  # fmt: skip


def _first(store: Path, options: Options, sizes: Sizes) -> list[Row]:
    """From the start of a process to its first answer."""
    least = [sys.executable, "-c", "import torch; from transformers import GPT2LMHeadModel"]
    first: list[float] = []
    imports: list[float] = []
    for _ in range(options.repeat(3)):
        imports.append(_timed(lambda: subprocess.run(least, check=True, stderr=subprocess.DEVNULL)))
        started = time.perf_counter()
        with _ours(store, options) as port:
            _ask(port, _prompts(sizes)[0], 1, _shares(0.5))
            first.append(time.perf_counter() - started)
    return [
        Row("first answer of a new process", "paretofuse serve", "time", "s", first, target="<= 5"),
        Row("the imports of a new process", "torch and GPT2LMHeadModel", "time", "s", imports),
    ]


def _alone(store: Path, options: Options, sizes: Sizes) -> list[Row]:
    """One client: hits and misses."""
    times = _one_client(store, options, sizes, options.repeat(25), ("miss", "hit", "switch", "module"))
    missed = [miss - hit for miss, hit in zip(times["miss"], times["hit"], strict=True)]
    return [
        Row(
            "a request where it is merged", "ours less module", "time", "ms",
            milliseconds([a - b for a, b in zip(times["hit"], times["module"], strict=True)]), target="<= 1",
        ),
        Row("a forward pass", "module", "time", "ms", milliseconds(times["module"])),
        Row(
            "a switch within a request", "ours", "time", "ms", milliseconds(missed),
            comparison="ours / switch", ratio=paired_ratio(missed, times["switch"]), target="<= 1.5",
        ),
        Row("a switch", "engine.switch", "time", "ms", milliseconds(times["switch"])),
    ]  # fmt: skip


def _one_client(
    store: Path, options: Options, sizes: Sizes, rounds: int, wanted: Sequence[str]
) -> dict[str, list[float]]:
    """Seconds of each thing that is wanted, in turn: requests for one token, and what the module here takes."""
    engine, prompt = pf.load(store), _prompts(sizes)[0]
    tokens = torch.tensor([prompt])
    times: dict[str, list[float]] = {word: [] for word in wanted}
    with _ours(store, options) as port, torch.inference_mode():
        client = http.client.HTTPConnection("127.0.0.1", port)
        for number in range(rounds + 1):
            shares = _shares((number + 1) / (rounds + 2) if "miss" in wanted else 0.3)
            things: dict[str, Callable[[], object]] = {
                "miss": lambda at=shares: _ask(port, prompt, 1, at, client),  # type: ignore[misc]
                "hit": lambda at=shares: _ask(port, prompt, 1, at, client),  # type: ignore[misc]
                "switch": lambda at=shares: engine.switch(at),  # type: ignore[misc]
                "module": lambda: engine.module(tokens),
                "generate": lambda: _generated(engine.module, [prompt], Sizes(sizes.vocabulary, 1)),
            }
            for word in wanted:
                seconds = _timed(things[word])
                if number:
                    times[word].append(seconds)
    return times


def _together(store: Path, kind: str, options: Options, sizes: Sizes) -> list[Row]:
    """Sixteen clients, one request each, in every round."""
    prompts = _prompts(sizes)
    different = [_shares((number + 0.5) / CLIENTS) for number in range(CLIENTS)]
    same = [different[0]] * CLIENTS
    ours: dict[str, list[float]] = {"different": [], "same": [], "p99 / p50": []}
    rival: list[float] = []
    plain: list[float] = []
    module = pf.load(store).merge(different[0])
    with _ours(store, options) as port, _rival(store, options) as other:
        for number in range(options.repeat(3) + 1):
            alone = _load(other, prompts, different, sizes)
            found = _load(port, prompts, different, sizes)
            at_one = _load(port, prompts, same, sizes)
            if number == 0:  # which warms up
                _check(found, [answer["tokens"] for answer in alone.answers])
                _check(at_one, _generated(module, prompts, sizes))
                continue
            rival.append(alone.seconds)
            ours["different"].append(found.seconds)
            ours["same"].append(at_one.seconds)
            ranked = sorted(found.latencies)
            ours["p99 / p50"].append(ranked[int(0.99 * (len(ranked) - 1))] / statistics.median(ranked))
            plain.append(_timed(lambda: _generated(module, prompts, sizes)))

    def rates(seconds: list[float]) -> list[float]:
        return [CLIENTS / value for value in seconds]

    return [
        Row(
            f"16 clients, 16 preferences, {kind}", "paretofuse serve", "requests", "1/s", rates(ours["different"]),
            comparison="ours / one by one", ratio=paired_ratio(rival, ours["different"]), target=">= 3",
        ),
        Row(
            f"16 clients, 16 preferences, {kind}", "paretofuse serve", "p99 / p50", "", ours["p99 / p50"],
            target="<= 3",
        ),
        Row(f"16 clients, 16 preferences, {kind}", "one by one", "requests", "1/s", rates(rival)),
        Row(
            f"16 clients, one preference, {kind}", "paretofuse serve", "requests", "1/s", rates(ours["same"]),
            comparison="ours / generate", ratio=paired_ratio(plain, ours["same"]), target=">= 0.9",
        ),
        Row(f"16 clients, one preference, {kind}", "generate on a batch", "requests", "1/s", rates(plain)),
    ]  # fmt: skip


@dataclass(frozen=True)
class Load:
    """All clients' requests at once: the seconds in all, those of each, and the answers."""

    seconds: float
    latencies: list[float]
    answers: list[Any]


def _load(port: int, prompts: Any, shares: Any, sizes: Sizes) -> Load:
    """A request of each client."""

    def client(number: int) -> tuple[float, Any]:
        began = time.perf_counter()
        answer = _ask(port, prompts[number], sizes.tokens, shares[number])
        return time.perf_counter() - began, answer

    with ThreadPoolExecutor(CLIENTS) as pool:
        started = time.perf_counter()
        found = list(pool.map(client, range(CLIENTS)))
        seconds = time.perf_counter() - started
    return Load(seconds, [own for own, _ in found], [answer for _, answer in found])


def _check(load: Load, truth: list[list[int]]) -> None:
    """Every answer is the merged model's."""
    answers = [answer["choices"][0]["text"] for answer in load.answers]
    expected = ["".join(f"{token} " for token in own) for own in truth]
    wrong = sum(a != b for a, b in zip(answers, expected, strict=True))
    check(wrong == 0, f"{wrong} of {CLIENTS} answers are not the merged model's")


def _generated(module: Any, prompts: list[list[int]], sizes: Sizes) -> list[list[int]]:
    """What a batch of prompts is followed by."""
    tokens = torch.tensor(prompts)
    found = module.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=sizes.tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return found[:, tokens.shape[1] :].tolist()  # type: ignore[no-any-return]


def _ask(
    port: int,
    prompt: list[int],
    tokens: int,
    shares: dict[str, float],
    connection: http.client.HTTPConnection | None = None,
) -> Any:
    connection = connection or http.client.HTTPConnection("127.0.0.1", port)
    body = {"prompt": prompt, "max_tokens": tokens, "preference": shares, "temperature": 0}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    content = answer.read()
    check(answer.status == 200, f"status {answer.status}: {content[:500]!r}")
    return json.loads(content)


def _timed(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def _shares(news: float) -> dict[str, float]:
    return {"news": news, "poems": 1 - news}


def _prompts(sizes: Sizes) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, sizes.vocabulary, (CLIENTS, PROMPT), generator=generator).tolist()  # type: ignore[no-any-return]


def _store(folder: Path, kind: str, quick: bool) -> Path:
    """A store of a base with a tokenizer whose words are the tokens' numbers, and two experts."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    config = GPT2Config(eos_token_id=None)
    if quick:
        config = GPT2Config(**SMALL, bos_token_id=0, eos_token_id=None)
    torch.manual_seed(0)
    base = GPT2LMHeadModel(config).eval()
    words = {f"{number} ": number for number in range(config.vocab_size)}
    tokenizer: Any = Tokenizer(WordLevel(words, unk_token="0 "))
    tokenizer.decoder = _fuse()
    base.save_pretrained(folder / "base")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / "base")
    experts: dict[str, Any] = {}
    for seed, name in enumerate(("news", "poems"), start=1):
        experts[name] = _expert(base, folder / f"{name}-{kind}", kind, seed)
    store = folder / f"store-{kind}"
    pf.stack(folder / "base", experts, planes="auto" if kind == "LoRA" else "dense").save(store)
    return store


def _fuse() -> Any:
    from tokenizers.decoders import Fuse

    return Fuse()


def _expert(base: nn.Module, path: Path, kind: str, seed: int) -> Path:
    torch.manual_seed(seed)
    if kind == "LoRA":
        import copy

        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(
            r=8, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, init_lora_weights=False
        )
        get_peft_model(copy.deepcopy(base), lora).save_pretrained(path)  # type: ignore[arg-type]
        return path
    model = GPT2LMHeadModel(base.config)
    with torch.no_grad():
        for own, tensor in zip(model.parameters(), base.parameters(), strict=True):
            own.copy_(tensor + 0.01 * torch.randn(tensor.shape))
    model.save_pretrained(path)
    return path


@contextmanager
def _ours(store: Path, options: Options) -> Iterator[int]:
    words = ["-m", "paretofuse", "serve", str(store), "--threads", str(options.threads), "--replicas", "4"]
    with _served(words, lambda port: ["--port", str(port)]) as port:
        yield port


@contextmanager
def _rival(store: Path, options: Options) -> Iterator[int]:
    words = ["-m", "benchmarks.speed.serving_rival", str(store)]
    with _served(words, lambda port: [str(port), str(options.threads)]) as port:
        yield port


@contextmanager
def _served(words: list[str], more: Callable[[int], list[str]]) -> Iterator[int]:
    """A server in a process of its own, from when it listens."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, *words, *more(port)], cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    try:
        while True:
            if process.poll() is not None:
                assert process.stderr is not None
                raise BenchmarkError(process.stderr.read().decode()[-2000:])
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.01)
        yield port
    finally:
        process.terminate()
        process.wait()
