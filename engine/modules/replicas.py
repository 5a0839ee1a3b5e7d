"""Replicas: several merged modules over one set of deltas, so that every request has its own preference.

A replica is pinned while anyone uses it and never rewritten then. A preference that is merged already costs no merge;
otherwise the least recently used replica that nobody uses is merged anew, while users of the others go on and callers
with the same preference wait for that one merge. `slots.py` says who is next where all are in use.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Hashable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor, nn

from paretofuse.engine.modules.heads import with_head
from paretofuse.engine.modules.live import LiveModule
from paretofuse.engine.modules.slots import Request, Slot, Slots, renew_after_fork


class Fence:
    """Orders the work on one replica, which its users may queue on different streams of a GPU.

    A merge waits for what earlier users have queued, and users wait for the merge; both wait on the GPU, not here.
    On the CPU a call is over when it returns, and there is nothing to order.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self._written: torch.cuda.Event | None = None
        self._read: dict[int, torch.cuda.Event] = {}

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Around the merge; nobody else uses the replica meanwhile."""
        if self._device is None:
            yield
            return
        stream = torch.cuda.current_stream(self._device)
        for event in self._read.values():
            stream.wait_event(event)
        self._read.clear()
        yield
        self._written = stream.record_event()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Around a use."""
        if self._device is None:
            yield
            return
        if self._written is not None:
            torch.cuda.current_stream(self._device).wait_event(self._written)
        try:
            yield
        finally:
            stream = torch.cuda.current_stream(self._device)
            self._read[stream.cuda_stream] = (
                stream.record_event()
            )  # later work of a stream implies its earlier


@dataclass(frozen=True)
class Merge:
    """What a replica shall hold.

    Attributes:
        key: equal for equal weights.
        weights: gives them, [1, G, P], where they have to be merged.
        build: makes a live module, merged at such weights.
        head: the objective whose head the module shall show.
    """

    key: Hashable
    weights: Callable[[], Tensor]
    build: Callable[[Tensor], LiveModule]
    head: str | None = None


class ReplicaPool:
    """The replicas of an engine; all methods may run in many threads at once.

    Args:
        count: how many replicas there may be, at least 1. Each takes the memory of a merged model from its first use.
        device: where they live.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"got replicas={count!r}, expected a whole number of at least 1")
        self._slots = Slots(count)
        self._building = Lock()
        self._live: list[LiveModule | None] = [None] * count
        self._fences = [Fence(device) for _ in range(count)]
        renew_after_fork(self)

    def after_fork(self) -> None:
        """In a forked child: another thread may have been building when the process forked."""
        self._building = Lock()

    def __len__(self) -> int:
        return len(self._live)

    def holds(self, merge: Merge) -> bool:
        """Whether a replica holds this merge, finished."""
        return self._slots.has(merge.key)

    def merged(self) -> int:
        """How many replicas hold a merge, finished."""
        return self._slots.ready()

    @contextmanager
    def acquire(self, merge: Merge, timeout: float | None) -> Iterator[nn.Module]:
        """The module of a merge, pinned inside the `with` block.

        Raises:
            TimeoutError: on entering, as `Slots.acquire`.
            ValueError: on entering: somebody has moved the module, or replaced its tensors. It is made anew next time.
        """
        request = self._slots.acquire(merge.key, lambda slot: self._fill(slot, merge), timeout)
        with self._using(request, merge.head) as module:
            yield module

    @asynccontextmanager
    async def acquire_async(self, merge: Merge, timeout: float | None) -> AsyncIterator[nn.Module]:
        """As `acquire`, without blocking the event loop: the merge runs in the loop's thread pool."""
        request = self._slots.ask(merge.key)
        try:
            await asyncio.wait([asyncio.wrap_future(request.given)], timeout=timeout)
            if not request.given.done():
                self._slots.give_up(request, timeout)
            if request.fills:
                await asyncio.to_thread(self._slots.fill, request, lambda slot: self._fill(slot, merge))
        except asyncio.CancelledError:
            self._slots.drop(request)
            raise
        with self._using(request, merge.head) as module:
            yield module

    @contextmanager
    def _using(self, request: Request, head: str | None) -> Iterator[nn.Module]:
        number = request.given.result().number
        try:
            live = self._live[number]
            assert live is not None
            try:
                live.check()
            except ValueError:
                self._slots.forget(request)
                self._live[number] = None
                raise
            with self._fences[number].reading():
                yield live.module if head is None else with_head(live.module, head)
        finally:
            self._slots.release(request)

    def _fill(self, slot: Slot, merge: Merge) -> None:
        weights = merge.weights()
        with self._fences[slot.number].writing():
            live = self._live[slot.number]
            if live is None:
                with self._building:  # making a model of some libraries' classes changes global state
                    self._live[slot.number] = merge.build(weights)
                return
            try:
                live.write(weights)
            except ValueError:  # it was moved
                self._live[slot.number] = None
                raise
