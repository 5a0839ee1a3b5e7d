"""Replicas: several merged modules over one set of deltas, so that every request has its own preference.

A replica is pinned while anyone uses it and never rewritten then. A preference that is merged already costs no merge;
otherwise the least recently used replica that nobody uses is merged anew, while users of the others go on and callers
with the same preference wait for that one merge. The C++ library keeps its replicas by the same rules.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Condition, Lock

import torch
from torch import Tensor, nn

from paretofuse.engine.modules.live import LiveModule


@dataclass(eq=False)
class _Slot:
    key: Hashable | None = None
    pins: int = 0
    filling: bool = False
    used: int = 0


class Slots:
    """A cache from keys to `count` slots that many threads read while others are refilled; without their content."""

    def __init__(self, count: int) -> None:
        self._slots = [_Slot() for _ in range(count)]
        self._changed = Condition()
        self._clock = 0

    def acquire(self, key: Hashable, fill: Callable[[int], None], timeout: float | None = None) -> int:
        """Pin the slot of a key and return its number.

        Args:
            key: anything but None.
            fill: called without any lock where no slot has the key, to write the content of the slot of that number.
                What it raises leaves the slot empty.
            timeout: seconds to wait for a slot; None waits for ever.

        Raises:
            TimeoutError: all slots stayed pinned, or being filled, for so long.
        """
        start = time.monotonic()
        with self._changed:
            while True:
                held = next((s for s in self._slots if s.key == key), None)
                if held is not None and not held.filling:
                    return self._pin(held)
                slot = None if held is not None else self._oldest()
                if slot is not None:
                    break
                left = None if timeout is None else timeout - (time.monotonic() - start)
                if left is not None and left <= 0:
                    raise TimeoutError(
                        f"no replica became free within {timeout:g} s, {len(self._slots)} in all; open the engine "
                        "with more of them (replicas=), or hold them for a shorter time"
                    )
                self._changed.wait(left)
            slot.key, slot.filling = key, True
        try:
            fill(self._slots.index(slot))
        except BaseException:
            with self._changed:
                slot.key, slot.filling, slot.used = None, False, 0
                self._changed.notify_all()
            raise
        with self._changed:
            slot.filling = False
            self._changed.notify_all()
            return self._pin(slot)

    def release(self, number: int) -> None:
        """Take a pin away."""
        with self._changed:
            slot = self._slots[number]
            slot.pins -= 1
            if slot.pins == 0:
                self._changed.notify_all()

    def _pin(self, slot: _Slot) -> int:
        self._clock += 1
        slot.used = self._clock
        slot.pins += 1
        return self._slots.index(slot)

    def _oldest(self) -> _Slot | None:
        free = [slot for slot in self._slots if not slot.pins and not slot.filling]
        return min(free, key=lambda slot: slot.used) if free else None


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

    def __len__(self) -> int:
        return len(self._live)

    @contextmanager
    def acquire(
        self,
        key: Hashable,
        weights: Callable[[], Tensor],
        build: Callable[[Tensor], LiveModule],
        timeout: float | None,
    ) -> Iterator[nn.Module]:
        """The module of a key, pinned inside the `with` block.

        Args:
            key: equal for equal weights.
            weights: gives them, [1, G + 1, E], where they have to be merged.
            build: makes a live module, merged at such weights.
            timeout: as in `Slots.acquire`.
        """

        def fill(number: int) -> None:
            merged = weights()
            with self._fences[number].writing():
                live = self._live[number]
                if live is None:
                    with self._building:  # making a model of some libraries' classes changes global state
                        self._live[number] = build(merged)
                else:
                    live.write(merged)

        number = self._slots.acquire(key, fill, timeout)
        try:
            live = self._live[number]
            assert live is not None
            with self._fences[number].reading():
                yield live.module
        finally:
            self._slots.release(number)
