"""The ASGI app of one engine."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

import paretofuse
from paretofuse.engine.engine import Engine
from paretofuse.fronts.front import Front
from paretofuse.serving import errors
from paretofuse.serving.limits import Limits
from paretofuse.serving.model import Answer, served_model
from paretofuse.serving.preferences import Preferences
from paretofuse.serving.routes.about import about_routes
from paretofuse.serving.routes.completions import completion_routes
from paretofuse.serving.state import State


def create_app(
    engine: Engine,
    *,
    model_name: str = "paretofuse",
    front: Front | None = None,
    processor: Any = None,
    predict: Answer | None = None,
    grid: int | None = None,
    limits: Limits | None = None,
) -> FastAPI:
    """An ASGI app that serves an engine over HTTP; see docs/serving.md for its addresses.

    Args:
        engine: from `pf.load` or `pf.stack`; its `replicas` say how many merged models are kept.
        model_name: what clients call it.
        front: what was measured at which preference, such as `pf.Front.from_csv("front.csv")` of what
            `paretofuse sweep` wrote; for requests that name a preference by bounds, and for GET /v1/front.
        processor: a tokenizer or an image processor; by default of the files that the store keeps of its model.
        predict: serves any model by a function of (merged module, the request's input).
        grid: move preferences to multiples of 1 / grid, so that nearby ones share a replica; None leaves them.
        limits: see `Limits`.

    Raises:
        ValueError: nothing is known to serve this model, or an argument is out of range.
        TypeError: an argument is of another type.
    """
    state = State(
        served_model(engine, model_name, processor, predict),
        Preferences(engine.objectives, front, grid),
        limits or Limits(),
    )
    app = FastAPI(
        title="ParetoFuse",
        version=paretofuse.__version__,
        docs_url=None,
        redoc_url=None,
        responses={400: {"model": errors.ErrorDocument}},
    )
    errors.install(app)
    app.include_router(about_routes(state))
    app.include_router(completion_routes(state))
    app.state.serving = state
    return app
