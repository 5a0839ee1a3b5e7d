"""What the addresses of one app share: the model that is served now, and how a row of work is asked for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from threading import Lock, Thread
from typing import Any

from starlette.requests import Request

from paretofuse.engine.engine import Engine
from paretofuse.engine.modules.slots import renew_after_fork
from paretofuse.serving.errors import ApiError, ClientLeft, shutting_down
from paretofuse.serving.limits import Limits
from paretofuse.serving.metrics import Metrics
from paretofuse.serving.model import ServedModel
from paretofuse.serving.preferences import Preferences
from paretofuse.serving.scheduling.job import Job, Piece
from paretofuse.serving.scheduling.worker import Worker


class State:
    """One app's.

    Args:
        model: what is served first.
        preferences: resolves them.
        limits: of requests.
        metrics: of the app.
        remake: makes another engine's `ServedModel`, for a reload.

    Attributes:
        created: when the app was made, in seconds since 1970.
        ready: whether requests are taken.
        beside: the metrics of single models to show beside the front, such as "base", by label.
    """

    def __init__(
        self,
        model: ServedModel,
        preferences: Preferences,
        limits: Limits,
        metrics: Metrics,
        remake: Callable[[Engine], ServedModel],
    ) -> None:
        self.model, self.preferences, self.limits, self.metrics = model, preferences, limits, metrics
        self.created = int(time.time())
        self.ready = True
        self.beside: dict[str, dict[str, float]] = {}
        self._remake = remake
        self._worker: Worker | None = None
        self._reloading = Lock()
        self._retiring: list[tuple[Worker, Thread]] = []  # each with the thread that waits for its end
        renew_after_fork(self)

    def after_fork(self) -> None:
        """In a forked child no worker goes on: its first request starts one of its own."""
        self._worker, self._reloading, self._retiring = None, Lock(), []

    def start(self) -> None:
        """Begin to work; the first request does so too, where nobody runs the app's lifespan."""
        if self._worker is None:
            self._worker = Worker(self.model, self.limits, self.metrics)
            self._worker.wish(tuple(self.preferences.default.values()))

    def stop(self) -> None:
        """End what was begun, and take no more."""
        self.ready = False
        with self._reloading:
            if self._worker is not None:
                self._worker.stop(self.limits.timeout)
            for _, thread in self._retiring:
                thread.join()

    def hurry(self) -> None:
        """Have `stop` wait for nothing that is in work."""
        for worker in [self._worker, *(worker for worker, _ in self._retiring)]:
            if worker is not None:
                worker.hurry()

    def reload(self, engine: Engine) -> None:
        """Serve another engine from now on; requests that were taken before end on the one that they began with.

        What is popular is merged before the first request comes to the new one. Blocks; requests go on meanwhile.

        Raises:
            ValueError: it has other objectives, or cannot be served; nothing has changed.
        """
        with self._reloading:
            if engine.objectives != self.preferences.objectives:
                raise ValueError(
                    f"got a store of the objectives {list(engine.objectives)}, expected those that are served, "
                    f"{list(self.preferences.objectives)}; start another server for it"
                )
            model = self._remake(engine)
            old = self._worker
            new = Worker(model, self.limits, self.metrics, old.popular() if old is not None else ())
            self.model, self._worker = model, new
            self.metrics.reloads.inc()
            if old is not None:
                self._retiring = [(worker, thread) for worker, thread in self._retiring if thread.is_alive()]
                stopping = Thread(target=old.stop, args=(self.limits.timeout,))
                stopping.start()
                self._retiring.append((old, stopping))

    def set_default(self, preference: dict[str, float]) -> None:
        """The preference of requests that name none; it is merged as soon as there is time."""
        self.preferences.default = preference
        if self._worker is not None:
            self._worker.wish(tuple(preference.values()))

    def job(self, preference: dict[str, float], payload: Any, head: str | None = None) -> Job:
        """A row of work, not yet begun."""
        return Job(preference, payload, time.monotonic() + self.limits.timeout, head)

    def put(self, jobs: Sequence[Job]) -> None:
        """Take the jobs of one request into the queue; `over` must follow.

        Raises:
            ApiError: the queue is full, or the server is shutting down.
        """
        if self.ready:
            self.start()
        if self._worker is None:
            raise shutting_down()
        self._worker.put(jobs)

    def over(self, jobs: Sequence[Job]) -> None:
        """The request has ended: what is not finished is cancelled."""
        for job in jobs:
            job.cancelled = True
        if not all(job.finished for job in jobs):
            self.metrics.cancelled.inc()
        merged = "yes" if all(job.hit for job in jobs) else "no"
        self.metrics.latency.labels(merged).observe(time.monotonic() - jobs[0].born)

    async def results(self, request: Request, jobs: Sequence[Job]) -> list[Piece]:
        """Each job's last piece; cancels all of them when the client leaves.

        Raises:
            ApiError: as `put`, or one of them was refused.
            ClientLeft: nobody waits any more.
        """
        self.put(jobs)

        async def watch() -> None:
            await _left(request)
            for job in jobs:
                job.events.put_nowait(ClientLeft())

        # The only task: each costs an answer a turn of the event loop.
        watching = asyncio.create_task(watch())
        try:
            return [await _finished(job) for job in jobs]
        finally:
            self.over(jobs)
            watching.cancel()

    def check_model(self, name: str | None) -> None:
        """Refuse a request for another model.

        Raises:
            ApiError: 404.
        """
        if name is not None and name != self.model.name:
            raise ApiError(
                404,
                f"got model {name!r}, expected {self.model.name!r}, the only one here",
                param="model",
                code="model_not_found",
            )

    def check_task(self, *tasks: str) -> None:
        """Refuse an address that the model does not serve.

        Raises:
            ApiError: 404.
        """
        if self.model.task not in tasks:
            raise ApiError(
                404,
                f"got a request for {' or '.join(tasks)}, and the model here is for {self.model.task}; /docs lists "
                "what this server answers",
                code="wrong_task",
            )


async def pieces(job: Job) -> AsyncIterator[Piece]:
    """A job's pieces as they come, the last with a `finish`.

    Raises:
        ApiError: it was refused, or failed.
    """
    while True:
        event = await job.events.get()
        if isinstance(event, Exception):
            raise event
        yield event
        if event.finish is not None:
            return


async def _finished(job: Job) -> Piece:
    """A job's last piece."""
    async for piece in pieces(job):
        last = piece
    return last


async def _left(request: Request) -> None:
    """Return when the client has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
