"""POST /v1/completions."""

from __future__ import annotations

import asyncio
import time
import uuid

import torch
from fastapi import APIRouter

from paretofuse.serving.errors import ApiError, refused
from paretofuse.serving.routes.about import wanted
from paretofuse.serving.schemas import Completion, CompletionChoice, CompletionRequest, Usage
from paretofuse.serving.state import State


def completion_routes(state: State) -> APIRouter:
    """POST /v1/completions."""
    router = APIRouter()

    @router.post("/v1/completions")
    async def completions(body: CompletionRequest) -> Completion:
        """Text that follows a prompt."""
        state.check_model(body.model)
        state.check_task("text-generation")
        if body.stream:
            raise ApiError(400, "got stream=true, which is not served yet; leave it out", param="stream")
        with refused("preference"):
            preference = state.preferences.resolve(wanted(body.preference))
        tokenizer = state.model.processor
        choices: list[CompletionChoice] = []
        asked = given = 0
        async with state.model.engine.areplica(preference, timeout=state.limits.timeout) as module:
            for prompt in body.prompts():
                ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
                tokens = torch.tensor([ids], device=state.model.engine.device)
                new = await asyncio.to_thread(_generate, module, tokens, body)
                asked, given = asked + len(ids), given + len(new)
                ended = len(new) < (body.max_tokens or 16)
                choices.append(
                    CompletionChoice(
                        index=len(choices),
                        text=tokenizer.decode(new, skip_special_tokens=True),
                        finish_reason="stop" if ended else "length",
                    )
                )
        return Completion(
            id=f"cmpl-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=state.model.name,
            choices=choices,
            usage=Usage(prompt_tokens=asked, completion_tokens=given, total_tokens=asked + given),
            preference=preference,
        )

    return router


@torch.inference_mode()
def _generate(module: torch.nn.Module, tokens: torch.Tensor, body: CompletionRequest) -> list[int]:
    temperature = 1.0 if body.temperature is None else body.temperature
    sampled = {"do_sample": True, "temperature": temperature, "top_p": body.top_p or 1.0}
    found = module.generate(  # type: ignore[operator]
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=body.max_tokens or 16,
        pad_token_id=0,
        **(sampled if temperature > 0 else {"do_sample": False}),
    )
    return found[0, tokens.shape[1] :].tolist()  # type: ignore[no-any-return]
