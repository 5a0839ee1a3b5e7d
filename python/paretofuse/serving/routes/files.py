"""GET /v1/models/{preference}/weights and /adapter: a preference to take home. Nothing of a client's becomes a path."""

from __future__ import annotations

import asyncio
import io
import json
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from fastapi import APIRouter
from starlette.responses import Response, StreamingResponse
from torch import Tensor

from paretofuse.engine.dtypes import TO_NAME
from paretofuse.serving.errors import ApiError, refused
from paretofuse.serving.preferences import from_words
from paretofuse.serving.state import State

_AT_ONCE = 2
"""Downloads; each holds a merged model in memory until it is sent."""
_CHUNK = 1 << 20


def file_routes(state: State) -> APIRouter:
    """GET /v1/models/{preference}/weights, /v1/models/{preference}/adapter."""
    router = APIRouter()
    places = asyncio.Semaphore(_AT_ONCE)

    def take() -> None:
        if places.locked():
            raise ApiError(
                429, f"got a download while {_AT_ONCE} others run; try again in 10 s", code="queue_full",
                headers={"Retry-After": "10"},
            )  # fmt: skip

    @router.get("/v1/models/{preference}/weights", response_class=StreamingResponse)
    async def weights(preference: str) -> Response:
        """The merged model's tensors as a safetensors file; the preference as in news=0.7,poems=0.3."""
        shares = _resolved(state, preference)
        take()
        await places.acquire()
        try:
            tensors = await asyncio.to_thread(state.model.engine.merge_state_dict, shares)
        except BaseException:
            places.release()
            raise
        return _Download(tensors, places)

    @router.get("/v1/models/{preference}/adapter", response_class=Response)
    async def adapter(preference: str) -> Response:
        """The preference as a LoRA adapter of PEFT, in a ZIP file; where experts are adapters."""
        shares = _resolved(state, preference)
        take()
        async with places:
            try:
                content = await asyncio.to_thread(_adapter, state, shares)
            except ValueError as error:
                raise ApiError(
                    404,
                    f"{str(error).partition('; ')[0]}; take the merged model, GET "
                    "/v1/models/{preference}/weights, or have `paretofuse adapter --rank` cut an adapter of the store",
                    code="no_adapter",
                ) from error
        return Response(content, media_type="application/zip", headers=_named("adapter.zip"))

    return router


class _Download(StreamingResponse):
    """Sends tensors one after the other, each forgotten as soon as it is sent."""

    def __init__(self, tensors: dict[str, Tensor], places: asyncio.Semaphore) -> None:
        own = _without_ties(tensors)
        size = sum(_nbytes(tensor) for tensor in own.values())
        header = _header(own)
        headers = _named("model.safetensors") | {"Content-Length": str(len(header) + size)}
        super().__init__(_chunks(header, own), media_type="application/octet-stream", headers=headers)
        self._places = places

    async def __call__(self, *ends: object) -> None:
        """Send all."""
        try:
            await super().__call__(*ends)  # type: ignore[arg-type]
        finally:
            self._places.release()


def _resolved(state: State, text: str) -> dict[str, float]:
    with refused("preference"):
        return state.preferences.resolve(from_words(text))


def _named(name: str) -> dict[str, str]:
    return {"Content-Disposition": f'attachment; filename="{name}"'}


def _without_ties(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor once, under the first of its names, as save_pretrained writes them."""
    names = {id(tensor): name for name, tensor in reversed(tensors.items())}
    return {name: t.detach().contiguous() for name, t in tensors.items() if names[id(t)] == name}


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _header(tensors: dict[str, Tensor]) -> bytes:
    """The head of a safetensors file: its length in 8 bytes, then JSON, padded to 8 bytes."""
    document: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + _nbytes(tensor)
        document[name] = {
            "dtype": TO_NAME[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _chunks(header: bytes, tensors: dict[str, Tensor]) -> Iterator[bytes]:
    yield header
    for name in list(tensors):
        data = tensors.pop(name).cpu().view(-1).view(torch.uint8)
        for part in data.split(_CHUNK):
            yield part.numpy().tobytes()


def _adapter(state: State, preference: dict[str, float]) -> bytes:
    """A ZIP file of adapter_config.json and adapter_model.safetensors."""
    with tempfile.TemporaryDirectory(prefix="paretofuse-") as name:
        folder = Path(name, "adapter")
        state.model.engine.export_adapter(preference, folder)
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            for file in sorted(folder.iterdir()):
                archive.write(file, file.name)
        return packed.getvalue()
