"""POST /v1/chat/completions, where the tokenizer has a chat template."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from jinja2.exceptions import TemplateError
from starlette.responses import Response

from paretofuse.serving.errors import ApiError
from paretofuse.serving.routes.answers import answered, aside, prompt_jobs, stamped, streamed, usage_of
from paretofuse.serving.routes.streams import EVENTS, EventStream
from paretofuse.serving.schemas import ChatAnswer, ChatChoice, ChatCompletion, ChatRequest
from paretofuse.serving.state import State


def chat_routes(state: State) -> APIRouter:
    """POST /v1/chat/completions."""
    router = APIRouter()

    @router.post("/v1/chat/completions", response_model=ChatCompletion, responses=EVENTS)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """The assistant's next turn; with "stream" as server-sent events."""
        state.check_model(body.model)
        state.check_task("text-generation")
        tokens = await aside(_tokens, state, body, size=body.characters())
        jobs = prompt_jobs(state, body, [tokens], body.max_completion_tokens or body.max_tokens, "messages")
        preference = dict(jobs[0].preference)
        if body.stream:
            frame = stamped(state, "chatcmpl", object="chat.completion.chunk", preference=preference)
            return EventStream(state, jobs, streamed(jobs, body, _Chunks(), frame))
        found = await state.results(request, jobs)
        choices = [
            ChatChoice(
                index=i,
                message=ChatAnswer(content=piece.value),
                finish_reason=piece.finish,  # type: ignore[arg-type]
            )
            for i, piece in enumerate(found)
        ]
        usage = usage_of(jobs, sum(piece.tokens for piece in found), body.n or 1)
        frame = stamped(state, "chatcmpl", preference=preference)
        return answered(ChatCompletion(**frame, choices=choices, usage=usage))

    return router


class _Chunks:
    """The deltas of a stream: the first of each answer says who speaks."""

    def __init__(self) -> None:
        self._begun: set[int] = set()

    def __call__(self, index: int, text: str, finish: str | None) -> dict[str, Any]:
        delta: dict[str, Any] = {} if index in self._begun else {"role": "assistant"}
        self._begun.add(index)
        if text:
            delta["content"] = text
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}


def _tokens(state: State, body: ChatRequest) -> list[int]:
    """The template's tokens up to where the assistant speaks.

    Raises:
        ApiError: there is no template, or it refuses the messages.
    """
    if not state.model.chats:
        raise ApiError(
            404,
            "got a chat, and this model's tokenizer has no chat template; ask /v1/completions",
            code="no_chat_template",
        )
    messages = [{"role": message.role, "content": message.text()} for message in body.messages]
    try:
        found = state.model.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
    except TemplateError as error:
        raise ApiError(
            400, f"got messages that the model's chat template refuses: {error}", param="messages"
        ) from error
    return list(state.model.processor(found, add_special_tokens=False)["input_ids"])
