"""Whether the server lives, what it serves, the front, and the default preference."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import PlainTextResponse, Response

from paretofuse.serving.errors import shutting_down
from paretofuse.serving.facts import facts_of
from paretofuse.serving.routes.answers import resolved
from paretofuse.serving.schemas import (
    FrontDocument,
    FrontPoint,
    Metric,
    Model,
    ModelList,
    PreferenceDocument,
    SetPreference,
    Status,
)
from paretofuse.serving.state import State


def about_routes(state: State) -> APIRouter:
    """GET /healthz, /readyz, /metrics, /v1/models, /v1/front; PUT /v1/preference."""
    router = APIRouter()

    @router.get("/healthz")
    async def healthz() -> Status:
        """The process answers."""
        return Status()

    @router.get("/readyz")
    async def readyz() -> Status:
        """Requests are taken; 503 while the server shuts down."""
        if not state.ready:
            raise shutting_down()
        return Status()

    @router.get("/v1/models")
    async def models() -> ModelList:
        """The one model that there is, at any preference."""
        return ModelList(data=[Model(id=state.model.name, created=state.created)])

    @router.get("/v1/models/{model}")
    async def model(model: str) -> Model:
        """The one model."""
        state.check_model(model)
        return Model(id=state.model.name, created=state.created)

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """What Prometheus reads."""
        return Response(state.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.get("/v1/front")
    async def front() -> FrontDocument:
        """What was measured at which preference, and the default preference."""
        return FrontDocument(
            model=state.model.name,
            task=state.model.task,
            objectives=list(state.preferences.objectives),
            default=state.preferences.default,
            **_measured(state),
            models=state.beside,
            **facts_of(state.model),
        )

    @router.put("/v1/preference")
    async def set_preference(body: SetPreference) -> PreferenceDocument:
        """The preference of requests that name none, from now on."""
        state.set_default(resolved(state, body.preference))
        return PreferenceDocument(preference=state.preferences.default)

    return router


def _measured(state: State) -> dict[str, Any]:
    """The front's metrics and points."""
    front = state.preferences.front
    if front is None:
        return {"metrics": {}, "points": []}
    metrics = {
        name: Metric(maximize=larger) for name, larger in zip(front.metrics, front.directions, strict=True)
    }
    points = [
        FrontPoint(
            preference=dict(zip(front.objectives, shares, strict=True)),
            values=dict(zip(front.metrics, values, strict=True)),
        )
        for shares, values in zip(front.preferences.tolist(), front.values.tolist(), strict=True)
    ]
    return {"metrics": metrics, "points": points}
