"""The ASGI app of one engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

import paretofuse
from paretofuse.engine.engine import Engine
from paretofuse.engine.layout import ITEM_SIZE
from paretofuse.fronts.arguments import single_models
from paretofuse.fronts.front import Front
from paretofuse.serving import errors
from paretofuse.serving.guard import Guard
from paretofuse.serving.limits import Limits
from paretofuse.serving.metrics import Metrics
from paretofuse.serving.model import Predict, ServedModel, served_model
from paretofuse.serving.page.routes import OPEN, page_routes
from paretofuse.serving.preferences import Preferences
from paretofuse.serving.routes.about import about_routes
from paretofuse.serving.routes.chat import chat_routes
from paretofuse.serving.routes.completions import completion_routes
from paretofuse.serving.routes.docs import docs_routes
from paretofuse.serving.routes.files import file_routes
from paretofuse.serving.routes.vectors import vector_routes
from paretofuse.serving.state import State


def create_app(
    engine: Engine,
    *,
    model_name: str = "paretofuse",
    front: Front | None = None,
    base: Mapping[str, float] | None = None,
    points: Mapping[str, Mapping[str, float]] | None = None,
    processor: Any = None,
    predict: Predict | None = None,
    grid: int | None = None,
    limits: Limits | None = None,
    api_keys: Sequence[str] = (),
    hosts: Collection[str] | None = None,
) -> FastAPI:
    """An ASGI app that serves an engine over HTTP; see docs/serving.md for its addresses.

    Args:
        engine: from `pf.load` or `pf.stack`; its `replicas` say how many merged models are kept.
        model_name: what clients call it.
        front: what was measured at which preference, such as `pf.Front.from_csv("front.csv")` of what
            `paretofuse sweep` wrote; for requests that name a preference by bounds, and for GET /v1/front.
        base: the base model's metrics by name, shown beside the front.
        points: likewise of other single models by label, such as plain averages of the experts.
        processor: a tokenizer or an image processor; by default of the files that the store keeps of its model.
        predict: serves any model by a function of (merged module, the request's input).
        grid: move preferences to multiples of 1 / grid, so that nearby ones share a replica; None leaves them.
        limits: see `Limits`.
        api_keys: one of them must come with every request; none lets everybody in.
        hosts: names that a request may call this server by; None takes any.

    Raises:
        ValueError: nothing is known to serve this model, or an argument is out of range.
        TypeError: an argument is of another type.
    """
    if isinstance(api_keys, str) or not all(isinstance(key, str) and key for key in api_keys):
        raise TypeError(
            "got api_keys that are no list of texts, expected one text for each key, none of them empty"
        )
    limits = limits or Limits()

    def remake(other: Engine) -> ServedModel:
        return served_model(other, model_name, processor, predict)

    metrics = Metrics(*_sizes(engine))
    state = State(remake(engine), Preferences(engine.objectives, front, grid), limits, metrics, remake)
    if base is not None:
        state.beside["base"] = _beside(front, base, "a base")
    for label, values in (points or {}).items():
        state.beside[label] = _beside(front, values, f"a point {label!r}")

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        state.start()
        yield
        await asyncio.to_thread(state.stop)

    app = FastAPI(
        title="ParetoFuse",
        version=paretofuse.__version__,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        responses={"4XX": {"model": errors.ErrorDocument}, "5XX": {"model": errors.ErrorDocument}},
    )
    errors.install(app)
    for router in (about_routes, completion_routes, chat_routes, vector_routes, file_routes):
        app.include_router(router(state))
    app.include_router(docs_routes(app))
    app.include_router(page_routes())
    app.add_middleware(
        Guard,
        metrics=metrics,
        body_bytes=limits.body_bytes,
        keys=tuple(api_keys),
        open_paths=OPEN,
        hosts=hosts,
    )
    app.state.serving = state
    return app


def reload(app: FastAPI, engine: Engine) -> None:
    """Have an app serve another engine; requests that it has taken end on the old one, and none is dropped.

    It takes the time of some merges. In asyncio: `await asyncio.to_thread(reload, app, engine)`.

    Args:
        app: from `create_app`, running.
        engine: of the same objectives, such as a new version of the store.

    Raises:
        ValueError: it has other objectives, or cannot be served; nothing has changed.
    """
    app.state.serving.reload(engine)


def _beside(front: Front | None, values: Mapping[str, float], what: str) -> dict[str, float]:
    """A single model's metrics in the front's order.

    Raises:
        ValueError: they are not those of the front, or one is not finite.
    """
    if front is None or set(values) != set(front.metrics):
        expected = (
            f"no {what.split()[1]} without a front" if front is None else f"exactly {list(front.metrics)}"
        )
        raise ValueError(f"got {what} with the metrics {list(values)}, expected {expected}")
    row = single_models(front, {what: [values[name] for name in front.metrics]})[what]
    return dict(zip(front.metrics, row.tolist(), strict=True))


def _sizes(engine: Engine) -> tuple[int, int]:
    """Bytes of a merged model, and those that a merge reads and writes."""
    model = sum(spec.numel * ITEM_SIZE[spec.dtype] for spec in engine.layout.tensors)
    planes = sum(plane.nbytes for own in engine.planes.values() for plane in own.values())
    return model, 2 * model + planes
