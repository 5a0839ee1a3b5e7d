"""POST /v1/completions."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from paretofuse.serving.routes.answers import (
    USUAL_TOKENS,
    answered,
    aside,
    prompt_jobs,
    stamped,
    streamed,
    usage_of,
)
from paretofuse.serving.routes.streams import EVENTS, EventStream
from paretofuse.serving.schemas import Completion, CompletionChoice, CompletionRequest
from paretofuse.serving.state import State


def completion_routes(state: State) -> APIRouter:
    """POST /v1/completions."""
    router = APIRouter()

    @router.post("/v1/completions", response_model=Completion, responses=EVENTS)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Text that follows a prompt; with "stream" as server-sent events."""
        state.check_model(body.model)
        state.check_task("text-generation")
        prompts = await aside(_tokens, state, body.prompts(), size=body.characters())
        jobs = prompt_jobs(state, body, prompts, body.max_tokens or USUAL_TOKENS, "prompt")
        frame = stamped(state, "cmpl", object="text_completion", preference=dict(jobs[0].preference))
        if body.stream:
            return EventStream(state, jobs, streamed(jobs, body, _chunk, frame))
        found = await state.results(request, jobs)
        choices = [
            CompletionChoice(index=i, text=piece.value, finish_reason=piece.finish)  # type: ignore[arg-type]
            for i, piece in enumerate(found)
        ]
        usage = usage_of(jobs, sum(piece.tokens for piece in found), body.n or 1)
        return answered(Completion(**frame, choices=choices, usage=usage))

    return router


def _tokens(state: State, prompts: list[str | list[int]]) -> list[list[int]]:
    """Texts become tokens; tokens stay."""
    tokenizer = state.model.processor
    return [list(tokenizer(p)["input_ids"]) if isinstance(p, str) else p for p in prompts]


def _chunk(index: int, text: str, finish: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish}
