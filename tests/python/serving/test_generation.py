"""Rows that join, leave and share steps get what their merged model generates alone."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import pytest
import torch
from torch import nn

import paretofuse as pf
from tests.support.models import perturbed, tiny_gpt2
from tests.support.served import character_tokenizer
from tests.support.waiting import until

pytest.importorskip("fastapi", reason="the server comes with the extra `serve`")

from paretofuse.kernels import few_rows
from paretofuse.serving.errors import ApiError
from paretofuse.serving.limits import Limits
from paretofuse.serving.metrics import Metrics
from paretofuse.serving.model import ServedModel, served_model
from paretofuse.serving.preferences import Preferences
from paretofuse.serving.scheduling.costs import size_of_planes
from paretofuse.serving.scheduling.generation import Prompt
from paretofuse.serving.scheduling.job import Job
from paretofuse.serving.scheduling.sampling import Sampling
from paretofuse.serving.scheduling.worker import Worker
from paretofuse.serving.state import pieces

GREEDY = Sampling(temperature=0)
NAMES = ("news", "poems")


def llama(**settings: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=1, eos_token_id=0, **settings)).eval()


def mistral() -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(
        MistralConfig(
            vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, sliding_window=6, max_position_embeddings=64, bos_token_id=1, eos_token_id=0,
        )
    ).eval()  # fmt: skip


def opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    return OPTForCausalLM(
        OPTConfig(
            vocab_size=101, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, word_embed_proj_dim=32, bos_token_id=1, eos_token_id=0,
        )
    ).eval()  # fmt: skip


def bloom() -> nn.Module:
    from transformers import BloomConfig, BloomForCausalLM

    return BloomForCausalLM(
        BloomConfig(vocab_size=101, hidden_size=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=0)
    ).eval()


def engine_of(base: nn.Module, planes: str = "dense", replicas: int = 2) -> pf.Engine:
    torch.manual_seed(0)
    experts = {name: perturbed(base, seed, 0.15) for seed, name in enumerate(NAMES, start=1)}
    return pf.stack(base, experts, planes=planes, replicas=replicas)


def served(engine: pf.Engine) -> ServedModel:
    return served_model(engine, "tiny", character_tokenizer())


def alone(engine: pf.Engine, preference: dict[str, float], tokens: list[int], count: int) -> str:
    """What the merged model generates by itself."""
    ids = torch.tensor([tokens])
    found = engine.merge(preference).generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return str(character_tokenizer().decode(found[0, len(tokens) :], skip_special_tokens=True))


def job(shares: float, tokens: list[int], count: int, **options: Any) -> Job:
    preference = {"news": shares, "poems": 1 - shares}
    seconds = options.pop("seconds", 600.0)
    prompt = Prompt(tokens, count, options.pop("sampling", GREEDY), **options)
    return Job(preference, prompt, time.monotonic() + seconds)


async def answer(worker: Worker, own: Job, patience: float | None = None) -> str | None:
    """A job's text; None if it was cancelled after `patience` pieces of the loop's time."""
    worker.put([own])
    text = ""

    async def read() -> None:
        nonlocal text
        async for piece in pieces(own):
            text += piece.value

    try:
        await asyncio.wait_for(read(), patience)
    except asyncio.TimeoutError:
        own.cancelled = True
        return None
    return text


def one(worker: Worker, *own: Any, **options: Any) -> str | None:
    """The text of a job that is asked for alone."""

    async def ask() -> str | None:
        return await answer(worker, job(*own, **options))

    return asyncio.run(ask())


def random_jobs(count: int, seed: int, shares: list[float]) -> list[tuple[float, list[int], int]]:
    draw = random.Random(seed)
    return [
        (
            draw.choice(shares),
            [draw.randrange(2, 101) for _ in range(draw.randrange(1, 9))],
            draw.randrange(1, 8),
        )
        for _ in range(count)
    ]


def check_all(engine: pf.Engine, limits: Limits, wanted: list[tuple[float, list[int], int]]) -> Worker:
    """Every answer is the merged model's, all being asked for at once."""

    async def ask() -> list[str | None]:
        return await asyncio.gather(*(answer(worker, job(*own)) for own in wanted))

    worker = Worker(served(engine), limits, Metrics(1, 1))
    try:
        found = asyncio.run(ask())
    finally:
        worker.stop(60)
    for (share, tokens, count), text in zip(wanted, found, strict=True):
        assert text == alone(engine, {"news": share, "poems": 1 - share}, tokens, count), (
            share,
            tokens,
            count,
        )
    return worker


@pytest.mark.parametrize("make", [tiny_gpt2, llama, mistral, opt, bloom])
def test_every_answer_is_the_merged_models(make: Any) -> None:
    torch.manual_seed(1)
    check_all(engine_of(make()), Limits(max_batch=5), random_jobs(12, 0, [0.0, 0.3, 0.7, 1.0]))


@pytest.mark.parametrize("planes", ["dense", "lowrank:4", "int8"])
def test_formats_of_planes_and_one_replica(planes: str) -> None:
    engine = engine_of(tiny_gpt2(), planes, replicas=1)
    check_all(engine, Limits(max_batch=8), random_jobs(12, 1, [0.1, 0.5, 0.6, 0.8, 0.9]))


@pytest.mark.parametrize(("make", "changed"), [(tiny_gpt2, "c_attn.weight"), (llama, "q_proj.weight")])
def test_preferences_over_lora_experts_share_a_step(make: Any, changed: str) -> None:
    """Experts that leave norms, embeddings and the head alone; four preferences of four rows, and two replicas."""
    torch.manual_seed(1)
    base = make()
    experts = {name: perturbed(base, seed, 0.15) for seed, name in enumerate(NAMES, start=1)}
    start = base.state_dict()
    for expert in experts.values():
        expert.load_state_dict({n: t if changed in n else start[n] for n, t in expert.state_dict().items()})
    engine = pf.stack(base, experts, planes="lowrank:4", replicas=2)
    assert size_of_planes(engine) < 0.5
    worker = check_all(engine, Limits(max_batch=8), random_jobs(12, 3, [0.1, 0.5, 0.6, 0.9]))
    assert worker._modules.can_mix


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> set[tuple[int, ...]]:
    """The shapes [O, I] of the weights that layers multiply by `few_rows.product`, however small."""
    shapes: set[tuple[int, ...]] = set()

    def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        shapes.add(tuple(weight.shape))
        return true(x, weight, bias)

    true = few_rows.product
    monkeypatch.setattr(few_rows, "_SMALL", 0)
    monkeypatch.setattr(few_rows, "product", product)
    return shapes


def test_replicas_multiply_by_onednn(products: set[tuple[int, ...]]) -> None:
    """Answers are the merged model's all the same."""
    model = tiny_gpt2()
    check_all(engine_of(model, replicas=1), Limits(max_batch=8), random_jobs(8, 2, [0.25]))
    layers = [layer for layer in model.modules() if type(layer).__name__ in ("Conv1D", "Linear")]
    own = {tuple(m.weight.shape[:: -1 if type(m).__name__ == "Conv1D" else 1]) for m in layers}
    assert own
    assert own <= products


def test_what_no_preference_changes_is_multiplied_by_onednn_in_mixed_steps(
    products: set[tuple[int, ...]],
) -> None:
    base = llama()
    experts = {name: perturbed(base, i) for i, name in enumerate(NAMES, 1)}
    for expert in experts.values():
        expert.lm_head.load_state_dict(base.lm_head.state_dict())
    worker = check_all(
        pf.stack(base, experts, replicas=1), Limits(max_batch=8), random_jobs(8, 2, [0.2, 0.4, 0.7])
    )
    assert worker._modules.can_mix
    assert tuple(base.lm_head.weight.shape) in products


def test_what_is_popular_is_merged_again_while_there_is_nothing_to_do() -> None:
    """The only replica was taken by a preference that came once: the one that came twice gets it back unasked."""
    merges: list[float] = []

    class Counting(Metrics):
        def merged(self, seconds: float) -> None:
            merges.append(seconds)

    engine = engine_of(tiny_gpt2(), replicas=1)
    worker = Worker(served(engine), Limits(max_batch=8), Counting(1, 1))
    try:
        for share in (0.25, 0.25, 0.5):
            one(worker, share, [3, 4], 5)
        until(lambda: len(merges) == 3)
        until(lambda: engine.is_merged({"news": 0.25, "poems": 0.75}))
    finally:
        worker.stop(60)


def test_a_model_that_cannot_be_mixed_takes_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("got a layer that engine.batched does not know")

    engine = engine_of(tiny_gpt2())
    monkeypatch.setattr(engine, "batched", refuse)
    check_all(engine, Limits(max_batch=8), random_jobs(12, 2, [0.1, 0.5, 0.6, 0.8, 0.9]))


@pytest.mark.parametrize("mixes", [True, False])
def test_a_rare_preference_is_not_starved(mixes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One request behind thirty of another preference ends among the first, whether they share steps or take turns."""
    engine = engine_of(tiny_gpt2(), replicas=1)
    if not mixes:
        monkeypatch.setattr(engine, "batched", None)
    ended: list[int] = []

    async def ask() -> None:
        jobs = [*(job(0.2, [3], 5) for _ in range(30)), job(0.9, [3], 5)]
        worker.put(jobs)

        async def read(number: int) -> None:
            async for _ in pieces(jobs[number]):
                pass
            ended.append(number)

        await asyncio.gather(*map(read, range(31)))

    worker = Worker(served(engine), Limits(max_batch=4), Metrics(1, 1))
    try:
        asyncio.run(ask())
    finally:
        worker.stop(60)
    assert ended.index(30) < 8
    assert worker._modules.can_mix is mixes


def test_cancellations_leave_the_others_alone() -> None:
    engine = engine_of(tiny_gpt2())
    wanted = random_jobs(30, 3, [0.0, 0.2, 0.5, 1.0])
    draw = random.Random(4)

    async def ask() -> list[str | None]:
        tasks = []
        for own in wanted:
            patience = draw.choice([None, None, 0.0, 0.002])
            tasks.append(asyncio.create_task(answer(worker, job(*own, streams=True), patience)))
            await asyncio.sleep(draw.choice([0, 0.001]))
        return list(await asyncio.gather(*tasks))

    worker = Worker(served(engine), Limits(max_batch=4), Metrics(1, 1))
    try:
        found = asyncio.run(ask())
    finally:
        worker.stop(60)
    assert any(text is not None for text in found)
    for (share, tokens, count), text in zip(wanted, found, strict=True):
        if text is not None:
            assert text == alone(engine, {"news": share, "poems": 1 - share}, tokens, count)


def test_a_seed_gives_the_same_answer_in_any_company() -> None:
    engine = engine_of(tiny_gpt2())
    sampling = Sampling(temperature=1.3, top_p=0.9, seed=7)
    own = (0.4, [5, 6, 7], 8)

    async def ask(company: int) -> str | None:
        others = [job(*other) for other in random_jobs(company, 5, [0.4, 0.9])]
        first, *_ = await asyncio.gather(
            answer(worker, job(*own, sampling=sampling)), *(answer(worker, other) for other in others)
        )
        return first

    worker = Worker(served(engine), Limits(max_batch=6), Metrics(1, 1))
    try:
        texts = {asyncio.run(ask(company)) for company in (0, 3, 5)}
        greedy = one(worker, *own)
    finally:
        worker.stop(60)
    assert len(texts) == 1
    assert texts != {greedy}


def test_the_models_own_processors_count() -> None:
    base = tiny_gpt2()
    base.generation_config.repetition_penalty = 1.8  # type: ignore[union-attr]
    base.generation_config.no_repeat_ngram_size = 2  # type: ignore[union-attr]
    check_all(engine_of(base), Limits(), random_jobs(6, 6, [0.2, 0.8]))


def test_a_deadline_ends_a_row_and_a_queue_has_a_bound() -> None:
    engine = engine_of(tiny_gpt2())

    async def ask() -> None:
        late = job(0.5, [3], 12, seconds=-1.0)
        with pytest.raises(ApiError, match="longer than this server allows"):
            await answer(worker, late)
        rows = [job(0.5, [3], 12) for _ in range(5)]
        with pytest.raises(ApiError) as refused:
            worker.put(rows)
        assert refused.value.status_code == 429
        assert int(refused.value.headers["Retry-After"]) >= 1

    worker = Worker(served(engine), Limits(queue=4), Metrics(1, 1))
    try:
        asyncio.run(ask())
    finally:
        worker.stop(60)
    with pytest.raises(ApiError, match="shutting down"):
        asyncio.run(_put(worker))


async def _put(worker: Worker) -> None:
    worker.put([job(0.5, [3], 1)])


def test_stops_and_pieces() -> None:
    engine = engine_of(tiny_gpt2())
    preference = Preferences(NAMES).resolve({"news": 0.5, "poems": 0.5})
    whole = alone(engine, preference, [9, 10], 12)
    stop = whole[4:6]

    worker = Worker(served(engine), Limits(), Metrics(1, 1))
    try:
        assert one(worker, 0.5, [9, 10], 12, streams=True) == whole
        cut = whole[: whole.find(stop)]
        assert one(worker, 0.5, [9, 10], 12, stops=(stop,)) == cut
        assert one(worker, 0.5, [9, 10], 12, stops=("never", stop), streams=True) == cut
    finally:
        worker.stop(60)


def test_a_step_that_fails_fails_its_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(tiny_gpt2())
    worker = Worker(served(engine), Limits(), Metrics(1, 1))
    wrong = [True]
    original = engine.replica

    def replica(*args: Any, **kwargs: Any) -> Any:
        if wrong.pop() if wrong else False:
            raise RuntimeError("out of memory")
        return original(*args, **kwargs)

    monkeypatch.setattr(engine, "replica", replica)
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            one(worker, 0.5, [3], 4)
        text = one(worker, 0.5, [3], 4)
        assert text == alone(engine, {"news": 0.5, "poems": 0.5}, [3], 4)
    finally:
        worker.stop(60)
