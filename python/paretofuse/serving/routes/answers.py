"""What the two ways of asking for text share: from a request to rows of work, and from their pieces to answers."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from pydantic import BaseModel
from starlette.responses import Response

from paretofuse.serving import schemas
from paretofuse.serving.errors import ApiError, refused
from paretofuse.serving.scheduling.generation import Prompt
from paretofuse.serving.scheduling.job import Job
from paretofuse.serving.scheduling.sampling import Sampling
from paretofuse.serving.state import State, pieces

USUAL_TOKENS = 16
"""OpenAI's `max_tokens` for completions that do not say."""
_SHORT = 2000
"""Characters that are made tokens of within the event loop: another thread would cost as much again."""


async def aside(work: Callable[[State, Any], list[Any]], state: State, given: Any, *, size: int) -> list[Any]:
    """Tokens of texts, in another thread where the texts are long.

    Args:
        work: makes them.
        state: the app's.
        given: the texts.
        size: their characters.
    """
    return work(state, given) if size <= _SHORT else await asyncio.to_thread(work, state, given)


def answered(document: BaseModel) -> Response:
    """A finished answer, sent as it is: FastAPI would check again what was made here."""
    return Response(document.model_dump_json(), media_type="application/json")


def resolved(state: State, preference: Any) -> dict[str, float]:
    """The preference that a request gets.

    Raises:
        ApiError: 400, it is none.
    """
    with refused("preference"):
        if isinstance(preference, schemas.Bounds):
            preference = preference.model_dump(exclude_none=True)
        return state.preferences.resolve(preference)


def prompt_jobs(
    state: State,
    body: schemas.Sampling,
    prompts: Sequence[list[int]],
    max_tokens: int | None,
    param: str,
) -> list[Job]:
    """A row for each prompt and answer to it, prompt by prompt.

    Args:
        state: the app's.
        body: the request.
        prompts: their tokens.
        max_tokens: for each answer, at most; None: as many as there is room for.
        param: the request's field that the prompts are of.

    Raises:
        ApiError: too many rows, too long a prompt, a token that the model does not have, or a wrong preference.
    """
    preference, model, limits = resolved(state, body.preference), state.model, state.limits
    answers = body.n or 1
    if len(prompts) * answers > limits.inputs:
        raise ApiError(
            400,
            f"got {len(prompts)} prompts with n={answers}, expected at most {limits.inputs} answers in all; send "
            "several requests",
            param="n",
        )
    vocabulary = model.skeleton.config.get_text_config().vocab_size
    context = min(model.context or limits.cache_tokens, limits.cache_tokens)
    jobs = []
    for tokens in prompts:
        if not tokens:
            raise ApiError(
                400, "got a prompt without tokens, expected at least one; write something", param=param
            )
        if max(tokens) >= vocabulary:
            raise ApiError(
                400, f"got the token {max(tokens)}, expected tokens below {vocabulary}", param=param
            )
        room = context - len(tokens)
        wanted = min(room, limits.max_tokens) if max_tokens is None else max_tokens
        if room < 1 or wanted > min(room, limits.max_tokens):
            raise ApiError(
                400,
                f"got {len(tokens)} tokens and max_tokens={max_tokens}, expected at most {context} in all and "
                f"{limits.max_tokens} new ones; shorten the prompt, or ask for fewer",
                param=param if room < 1 else "max_tokens",
                code="context_length_exceeded",
            )
        for answer in range(answers):
            sampling = Sampling(
                1.0 if body.temperature is None else body.temperature,
                1.0 if body.top_p is None else body.top_p,
                None if body.seed is None else (body.seed + answer) % 2**63,
            )
            jobs.append(
                state.job(preference, Prompt(tokens, wanted, sampling, body.stops(), bool(body.stream)))
            )
    return jobs


def usage_of(jobs: Sequence[Job], given: int, answers: int) -> schemas.Usage:
    """The tokens of a request: each prompt counts once, whatever the number of answers to it."""
    asked = sum(len(job.payload.tokens) for job in jobs[::answers])
    return schemas.Usage(prompt_tokens=asked, completion_tokens=given, total_tokens=asked + given)


def stamped(state: State, kind: str, **fields: Any) -> dict[str, Any]:
    """What every answer begins with."""
    return {
        "id": f"{kind}-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": state.model.name,
        **fields,
    }


async def streamed(
    jobs: Sequence[Job],
    body: schemas.Sampling,
    chunk: Callable[[int, str, str | None], dict[str, Any]],
    frame: dict[str, Any],
) -> AsyncIterator[bytes]:
    """Server-sent events, a chunk for each piece, the usage if asked for, and [DONE].

    Args:
        jobs: already in the queue.
        body: the request.
        chunk: (index, text, why it ended) -> what stands in "choices".
        frame: what all chunks share.
    """
    wants_usage = bool(body.stream_options and body.stream_options.include_usage)
    extra = {"usage": None} if wants_usage else {}
    given = 0
    async for index, event in _merged(jobs):
        if isinstance(event, ApiError):
            yield _event(event.document())
            return
        given += event.tokens if event.finish else 0
        yield _event({**frame, "choices": [chunk(index, event.value, event.finish)], **extra})
    if wants_usage:
        usage = usage_of(jobs, given, body.n or 1).model_dump()
        yield _event({**frame, "choices": [], "usage": usage})
    yield b"data: [DONE]\n\n"


async def _merged(jobs: Sequence[Job]) -> AsyncIterator[tuple[int, Any]]:
    """(number of the job, its piece) as they come; an ApiError is the last."""
    found: asyncio.Queue[tuple[int, Any]] = asyncio.Queue(maxsize=len(jobs))

    async def read(index: int, job: Job) -> None:
        try:
            async for piece in pieces(job):
                await found.put((index, piece))
        except Exception as error:
            failed = (
                error if isinstance(error, ApiError) else ApiError(500, "the server failed at this request")
            )
            await found.put((index, failed))

    readers = [asyncio.create_task(read(i, job)) for i, job in enumerate(jobs)]
    try:
        left = len(jobs)
        while left:
            index, event = await found.get()
            yield index, event
            if isinstance(event, ApiError):
                return
            left -= event.finish is not None
    finally:
        for reader in readers:
            reader.cancel()


def _event(document: dict[str, Any] | BaseModel) -> bytes:
    return b"data: " + json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
