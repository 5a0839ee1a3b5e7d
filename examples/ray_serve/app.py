"""A Ray Serve application of one store. At the repository's root:

serve run examples.ray_serve.app:build store=gpt2.pareto front=front.csv replicas=2
"""

from __future__ import annotations

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict
from ray import serve

import paretofuse as pf
from paretofuse.serving import Limits, create_app


class Arguments(BaseModel):
    """What to serve, and how; each field can be given to `serve run` as NAME=VALUE.

    Attributes:
        store: its directory, at the same path on every machine.
        front: the CSV file of its front, likewise.
        model_name: as clients call it.
        replicas: processes, each with an app of its own.
        merged_models: that each process keeps.
        cpus, gpus: for each process; without a GPU it computes on the CPU.
    """

    model_config = ConfigDict(extra="forbid")

    store: str
    front: str | None = None
    model_name: str = "paretofuse"
    replicas: int = 2
    merged_models: int = 2
    cpus: float = 1
    gpus: float = 0


def make_app(arguments: Arguments) -> FastAPI:
    """The app of one replica, which opens the store itself: replicas of one machine share its pages."""
    engine = pf.load(
        arguments.store, device="cuda" if arguments.gpus else "cpu", replicas=arguments.merged_models
    )
    front = pf.Front.from_csv(arguments.front) if arguments.front else None
    return create_app(engine, model_name=arguments.model_name, front=front)


def build(arguments: Arguments) -> serve.Application:
    """The application that `serve run` and `serve.run` take."""

    def app() -> FastAPI:
        return make_app(arguments)

    deployment = serve.deployment(
        serve.ingress(app)(),
        name="paretofuse",
        num_replicas=arguments.replicas,
        max_ongoing_requests=Limits().queue,  # the app's own queue makes batches, and refuses what is too much
        ray_actor_options={"num_cpus": arguments.cpus, "num_gpus": arguments.gpus},
    )
    return deployment.bind()
