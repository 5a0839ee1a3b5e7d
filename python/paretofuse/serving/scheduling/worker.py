"""The thread that computes: it takes jobs from the queue and runs the runner, a step at a time."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from threading import Condition, Thread
from time import monotonic
from typing import Protocol

from paretofuse.serving.errors import ApiError, shutting_down, too_late
from paretofuse.serving.limits import Limits
from paretofuse.serving.metrics import Metrics
from paretofuse.serving.model import ServedModel
from paretofuse.serving.scheduling.forward import ForwardRunner
from paretofuse.serving.scheduling.generation import GenerationRunner
from paretofuse.serving.scheduling.job import Job, Key
from paretofuse.serving.scheduling.modules import Modules
from paretofuse.serving.scheduling.queue import FairQueue, QueueFull

_LOG = logging.getLogger("paretofuse.serving")
_POPULAR = 1000
"""Requests over which the popularity of a preference is halved."""


class Runner(Protocol):
    """What computes the rows that it is given."""

    @property
    def active(self) -> int:
        """Rows in work."""

    def room(self, job: Job) -> bool:
        """Whether a job may be added now."""

    def add(self, job: Job) -> None:
        """Take it."""

    def try_to_mix(self, job: Job) -> None:
        """Find out whether rows of different preferences may share a batch."""

    def step(self) -> None:
        """Compute a part, and tell the requests."""

    def fail(self, error: Exception) -> None:
        """Tell all that they failed, and forget them."""


class Worker:
    """Serves one engine from one thread, which alone uses its modules.

    Args:
        model: what is served.
        limits: batch, wait and queue.
        metrics: of the app.
        popular: preferences to merge before the first job, the most popular first.
    """

    def __init__(
        self, model: ServedModel, limits: Limits, metrics: Metrics, popular: Sequence[Key] = ()
    ) -> None:
        self._limits, self._metrics = limits, metrics
        self._replicas = len(model.engine.pool)
        self._modules = Modules(model.engine, metrics, limits.timeout)
        self._runner = _runner(model, self._modules, limits, metrics, self._replicas)
        self._queue = FairQueue(limits.queue)
        self._changed = Condition()
        self._stopping = self._hurried = self._ended = False
        self._popularity: Counter[Key] = Counter({key: len(popular) + 1 - i for i, key in enumerate(popular)})
        self._counted = 0
        self._asked: set[Key] = set()  # the first two
        self._prefetched: tuple[Key, ...] = ()
        self._seconds = 1.0  # that a row takes, on average
        self._prefetch(popular)
        self._thread = Thread(target=self._run, name="paretofuse-worker", daemon=True)
        self._thread.start()

    def put(self, jobs: Sequence[Job]) -> None:
        """Add the jobs of one request.

        Raises:
            ApiError: 429, the queue is full; 503, the worker is shutting down.
        """
        with self._changed:
            if self._stopping:
                raise shutting_down()
            try:
                self._queue.put(jobs)
            except QueueFull as error:
                self._metrics.refused.inc()
                wait = max(1, round(self._seconds * len(self._queue) / self._limits.max_batch))
                raise ApiError(
                    429,
                    f"got a request for {len(jobs)} rows while {error} in the queue; try again in {wait} s",
                    code="queue_full",
                    headers={"Retry-After": str(wait)},
                ) from None
            for job in jobs:
                self._count(job.key)
            self._metrics.queue.set(len(self._queue))
            self._changed.notify_all()

    def wish(self, key: Key) -> None:
        """Merge a preference when there is time, as if many asked for it."""
        with self._changed:
            self._popularity[key] = max([*self._popularity.values(), 1]) + 1
            self._changed.notify_all()

    def popular(self) -> list[Key]:
        """The preferences that are asked for most, as many as there are replicas."""
        with self._changed:
            return [key for key, _ in self._popularity.most_common(self._replicas)]

    def stop(self, seconds: float) -> None:
        """Take no more jobs, end those that there are, and end the thread.

        Whatever is left after `seconds`, or as soon as `hurry` is called, fails; a step in work goes on by itself.
        """
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._ended or self._hurried, seconds)
            left = self._queue.drain()
        for job in left:
            job.tell(shutting_down())

    def hurry(self) -> None:
        """Have `stop` wait no longer, the one that waits now and any other."""
        with self._changed:
            self._hurried = True
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            self._work()
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _work(self) -> None:
        while True:
            wanted: list[Key] = []
            with self._changed:
                while not len(self._queue) and not self._runner.active:
                    if self._stopping:
                        self._modules.close()
                        return
                    if wanted := self._wanted():
                        break
                    self._changed.wait()
                if self._limits.max_wait_ms and not self._runner.active and len(self._queue):
                    end = monotonic() + self._limits.max_wait_ms / 1000
                    self._changed.wait_for(
                        lambda: len(self._queue) >= self._limits.max_batch, end - monotonic()
                    )
                trial = self._queue.first() if self._mixes_unknown() else None
                if trial is None:
                    self._admit()
            if trial is not None:
                self._runner.try_to_mix(trial)
            elif wanted:
                self._prefetch(wanted)
            else:
                self._step()

    def _mixes_unknown(self) -> bool:
        """Whether it is time to find out if preferences can share a batch: when a second one is asked for."""
        return self._modules.can_mix is None and len(self._asked) > 1

    def _admit(self) -> None:
        """Give the runner what it has room for, in the queue's order."""
        for job in self._queue.expired(monotonic()):
            job.tell(too_late())
        while (own := self._queue.first()) is not None and self._runner.room(own):
            self._queue.take()
            self._runner.add(own)
        self._metrics.queue.set(len(self._queue))
        self._metrics.active.set(self._runner.active)

    def _step(self) -> None:
        started, rows = monotonic(), self._runner.active
        try:
            self._runner.step()
        except TimeoutError as error:  # others hold all replicas
            self._runner.fail(ApiError(503, str(error), code="no_replica"))
        except Exception as error:
            _LOG.exception("a step failed")
            self._runner.fail(error)
        self._metrics.active.set(self._runner.active)
        ended = rows - self._runner.active
        if ended > 0:
            self._seconds += 0.1 * ((monotonic() - started) * self._limits.max_batch / ended - self._seconds)

    def _count(self, key: Key) -> None:
        if len(self._asked) < 2:
            self._asked.add(key)
        self._popularity[key] += 1
        self._counted += 1
        if self._counted >= _POPULAR:
            self._counted = 0
            self._popularity = Counter({k: n // 2 for k, n in self._popularity.items() if n > 1})

    def _wanted(self) -> list[Key]:
        """The popular preferences, where one of them is not merged yet and they are not those of the last call."""
        popular = tuple(key for key, n in self._popularity.most_common(self._replicas) if n > 1)
        if popular == self._prefetched or all(self._modules.is_merged(key) for key in popular):
            return []
        self._prefetched = popular
        return sorted(popular, key=lambda key: not self._modules.is_merged(key))

    def _prefetch(self, keys: Sequence[Key]) -> None:
        """Merge popular preferences while there is nothing else to do; those that are merged stay."""
        try:
            for key in keys:
                with self._changed:
                    if len(self._queue) or self._stopping:
                        self._prefetched = ()
                        return
                self._modules.merged(key)
                self._modules.keep(())
        except Exception:
            _LOG.exception("a merge ahead of requests failed")


def _runner(model: ServedModel, modules: Modules, limits: Limits, metrics: Metrics, replicas: int) -> Runner:
    if model.task == "text-generation":
        return GenerationRunner(
            model,
            modules,
            metrics,
            max_batch=limits.max_batch,
            replicas=replicas,
            cache_columns=limits.cache_tokens,
        )
    return ForwardRunner(model, modules, metrics, max_batch=limits.max_batch, replicas=replicas)
