"""POST /v1/embeddings, /v1/classify and /v1/predict: one forward pass for each input."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import math
import struct
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request

from paretofuse.serving.errors import ApiError
from paretofuse.serving.routes.answers import resolved, stamped
from paretofuse.serving.schemas import (
    Classification,
    ClassificationList,
    ClassifyRequest,
    Embedding,
    EmbeddingList,
    EmbeddingRequest,
    Prediction,
    PredictRequest,
    Usage,
)
from paretofuse.serving.state import State

_PIXELS = 50_000_000
"""An image's, at most: a small file may unfold into a huge one."""


def vector_routes(state: State) -> APIRouter:
    """POST /v1/embeddings, /v1/classify, /v1/predict."""
    router = APIRouter()

    async def computed(
        body: EmbeddingRequest | ClassifyRequest, request: Request
    ) -> tuple[list[list[float]], Usage, dict[str, float]]:
        preference = resolved(state, body.preference)
        _check_head(state, body.head)
        inputs = _as_list(body.input)
        if len(inputs) > state.limits.inputs:
            raise ApiError(
                400,
                f"got {len(inputs)} inputs, expected at most {state.limits.inputs}; send several requests",
                param="input",
            )
        prepared = await asyncio.to_thread(_prepared, state, inputs)
        jobs = [state.job(preference, own, body.head) for own in prepared]
        found = await state.results(request, jobs)
        tokens = 0 if state.model.takes_images else sum(len(own) for own in prepared)
        usage = Usage(prompt_tokens=tokens, completion_tokens=0, total_tokens=tokens)
        return [piece.value for piece in found], usage, preference

    @router.post("/v1/embeddings")
    async def embeddings(body: EmbeddingRequest, request: Request) -> EmbeddingList:
        """A vector for each text or image."""
        state.check_model(body.model)
        state.check_task("feature-extraction")
        vectors, usage, preference = await computed(body, request)
        if state.model.pooling.normalizes:
            vectors = [_normalized(vector) for vector in vectors]
        encode = _base64 if body.encoding_format == "base64" else list
        data = [Embedding(index=i, embedding=encode(vector)) for i, vector in enumerate(vectors)]
        return EmbeddingList(model=state.model.name, data=data, usage=usage, preference=preference)

    @router.post("/v1/classify")
    async def classify(body: ClassifyRequest, request: Request) -> ClassificationList:
        """The label of each text or image."""
        state.check_model(body.model)
        state.check_task("text-classification", "image-classification")
        rows, usage, preference = await computed(body, request)
        data = [_classified(state, i, logits) for i, logits in enumerate(rows)]
        return ClassificationList(**stamped(state, "classify", preference=preference), data=data, usage=usage)

    @router.post("/v1/predict")
    async def predict(body: PredictRequest, request: Request) -> Prediction:
        """What the server's own function answers."""
        state.check_model(body.model)
        state.check_task("callable")
        preference = resolved(state, body.preference)
        _check_head(state, body.head)
        (piece,) = await state.results(request, [state.job(preference, body.input, body.head)])
        return Prediction(**stamped(state, "predict", preference=preference), output=piece.value)

    return router


def _check_head(state: State, head: str | None) -> None:
    heads = state.model.engine.heads
    if head is not None and head not in heads:
        known = f"one of {sorted(heads)}" if heads else "none, as there are no heads here"
        raise ApiError(400, f"got head {head[:100]!r}, expected {known}", param="head")


def _as_list(given: Any) -> list[Any]:
    return [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)


def _prepared(state: State, inputs: Sequence[Any]) -> list[Any]:
    """Tokens [T] of texts, or pixels [1, C, H, W] of images in base64."""
    if state.model.takes_images:
        return [_pixels(state, own) for own in inputs]
    tokenizer, model = state.model.processor, state.model
    vocabulary = model.skeleton.config.get_text_config().vocab_size
    found = []
    for own in inputs:
        tokens = list(tokenizer(own)["input_ids"]) if isinstance(own, str) else own
        longest = model.context or state.limits.cache_tokens
        if not 1 <= len(tokens) <= longest or max(tokens) >= vocabulary:
            raise ApiError(
                400,
                f"got an input of {len(tokens)} tokens, expected 1 to {longest}, each below {vocabulary}; cut the text",
                param="input",
                code="context_length_exceeded",
            )
        found.append(tokens)
    return found


def _pixels(state: State, given: Any) -> Any:
    """One image, read by Pillow and made ready by the model's own processor."""
    from PIL import Image

    text = given if isinstance(given, str) else ""
    text = text.partition(",")[2] if text.startswith("data:image/") else text
    try:
        image: Any = Image.open(
            io.BytesIO(base64.b64decode(text, validate=True)), formats=("PNG", "JPEG", "WEBP")
        )
        if image.width * image.height > _PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels")
        image = image.convert("RGB")
    except (binascii.Error, OSError, ValueError, SyntaxError) as error:
        raise ApiError(
            400,
            f"got no image ({str(error)[:100]}), expected a PNG, JPEG or WebP file in base64, alone or as a data: URL",
            param="input",
        ) from error
    return state.model.processor(images=image, return_tensors="pt")["pixel_values"]


def _classified(state: State, index: int, logits: Sequence[float]) -> Classification:
    highest = max(logits)
    weights = [math.exp(value - highest) for value in logits]
    probs = [weight / math.fsum(weights) for weight in weights]
    best = probs.index(max(probs))
    label = state.model.labels.get(best, str(best))
    return Classification(index=index, label=label, class_index=best, probs=probs, num_classes=len(probs))


def _normalized(vector: Sequence[float]) -> list[float]:
    length = math.sqrt(math.fsum(value * value for value in vector)) or 1.0
    return [value / length for value in vector]


def _base64(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
