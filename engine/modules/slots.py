"""Slots that many users read while others are refilled: who holds which, and who is next; without their content.

A slot is empty, being filled by one user, or ready; a ready one is pinned by its users and never refilled while it is.
Users that find nothing are served in the order in which they came. While the first of them finds every slot pinned,
the least recently used one is drained: who asks for its key from then on waits too, unless he holds a slot already, as
the drain may be waiting for that very one. The C++ library's slots go by the same rules.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import Counter
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError  # not the built-in one before Python 3.11
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Protocol
from weakref import WeakSet


class Forked(Protocol):
    """What holds locks that other threads may have taken while a process forks."""

    def after_fork(self) -> None:
        """Called in the child, whose only thread is the one that forked."""


_LIVING: WeakSet[Any] = WeakSet()


def renew_after_fork(owner: Forked) -> None:
    """Have `owner.after_fork` called in every process that is forked from this one, as long as it lives."""
    _LIVING.add(owner)


def _renew_all() -> None:
    for owner in list(_LIVING):
        owner.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)


@dataclass(eq=False)
class Slot:
    """One slot; all of it is guarded by the lock of its `Slots`.

    Attributes:
        number: from 0.
        key: of its content; None where there is none.
        filling: whether somebody writes it now.
        used: when it was last pinned.
        pins: how often each user has pinned it.
    """

    number: int
    key: Hashable | None = None
    filling: bool = False
    used: int = 0
    pins: Counter[Hashable] = field(default_factory=Counter)


@dataclass(eq=False)
class Request:
    """A user's wish for the slot of a key.

    Attributes:
        key: of what is wanted.
        user: the thread or asyncio task that asks.
        given: the slot, as soon as it is his: pinned, or
        fills: claimed for him to fill.
        pinned: whether it is pinned for this request.
        dropped: he has gone while he filled it.
    """

    key: Hashable
    user: Hashable
    given: Future[Slot] = field(default_factory=Future)
    fills: bool = False
    pinned: bool = False
    dropped: bool = False


def as_timeout(timeout: Any) -> float | None:
    """Check seconds to wait; None stands for ever.

    Raises:
        TypeError: not a number.
        ValueError: NaN, or below 0.
    """
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, Real):
        raise TypeError(f"got timeout={timeout!r}, expected a number of seconds, or None to wait for ever")
    seconds: Any = timeout
    if not seconds >= 0:
        raise ValueError(f"got timeout={timeout!r}, expected at least 0 seconds, or None to wait for ever")
    return float(seconds) if seconds <= threading.TIMEOUT_MAX else None


def current_user() -> Hashable:
    """Who is calling: an asyncio task, or a thread."""
    try:
        task = asyncio.current_task()
    except RuntimeError:
        task = None
    return task or threading.get_ident()


class Slots:
    """A cache from keys to `count` slots; methods may run in many threads at once, and none blocks but `acquire`."""

    def __init__(self, count: int) -> None:
        self._slots = [Slot(number) for number in range(count)]
        self._waiting: list[Request] = []  # in the order in which they came
        self._draining: Slot | None = None
        self._clock = 0
        self._lock = threading.Lock()
        renew_after_fork(self)

    def acquire(self, key: Hashable, fill: Callable[[Slot], None], timeout: float | None = None) -> Request:
        """Pin the slot of a key.

        Args:
            key: anything but None.
            fill: called without any lock where no slot has the key, to write the content. What it raises leaves the
                slot empty.
            timeout: seconds to wait for a slot; None waits for ever.

        Returns:
            What `release` takes.

        Raises:
            TimeoutError: all slots stayed pinned, or being filled, for so long.
        """
        request = self.ask(key)
        try:
            request.given.result(timeout)
        except FutureTimeoutError:
            self.give_up(request, timeout)
        except BaseException:  # KeyboardInterrupt
            self.drop(request)
            raise
        self.fill(request, fill)
        return request

    def ask(self, key: Hashable) -> Request:
        """Ask for the slot of a key; `given` says when it is there, and `fills` whether `fill` must follow."""
        request = Request(key, current_user())
        with self._lock:
            self._waiting.append(request)
            self._serve()
        return request

    def has(self, key: Hashable) -> bool:
        """Whether a slot has this content now."""
        with self._lock:
            return any(slot.key == key and not slot.filling for slot in self._slots)

    def ready(self) -> int:
        """How many slots have a content now."""
        with self._lock:
            return sum(slot.key is not None and not slot.filling for slot in self._slots)

    def give_up(self, request: Request, timeout: float | None) -> None:
        """Raise TimeoutError, unless the slot was given in the last moment."""
        with self._lock:
            if request not in self._waiting:
                return
            self._waiting.remove(request)
            self._serve()  # what was drained for it is open again
        raise TimeoutError(
            f"no replica became free within {timeout:g} s, {len(self._slots)} in all; open the engine with more of "
            "them (replicas=), or hold them for a shorter time"
        )

    def fill(self, request: Request, fill: Callable[[Slot], None]) -> None:
        """Write a slot that was given to be filled, in any thread, and pin it."""
        slot = request.given.result()
        if not request.fills:
            return
        done = False
        try:
            fill(slot)
            done = True
        finally:
            with self._lock:
                slot.filling = False
                if not done:
                    slot.key, slot.used = None, 0
                elif not request.dropped:
                    self._pin(slot, request)
                self._serve()

    def release(self, request: Request) -> None:
        """Take its pin away, if it has one."""
        with self._lock:
            if request.pinned:
                request.pinned = False
                pins = request.given.result().pins
                pins[request.user] -= 1
                if not pins[request.user]:
                    del pins[request.user]
                self._serve()

    def drop(self, request: Request) -> None:
        """Have nothing to do with a request any more, whatever has come of it."""
        with self._lock:
            if request in self._waiting:
                self._waiting.remove(request)
                self._serve()
                return
            if request.fills and request.given.result().filling:
                request.dropped = True
                return
        self.release(request)

    def forget(self, request: Request) -> None:
        """The content is not what the key says: the next one who asks for it fills a slot anew."""
        with self._lock:
            slot = request.given.result()
            slot.key, slot.used = None, 0

    def _serve(self) -> None:
        """Give those who wait what there is, the first first."""
        first: Request | None = None  # that found every slot pinned
        for request in list(self._waiting):
            slot = next((s for s in self._slots if s.key == request.key), None)
            if slot is not None and slot.filling:
                continue
            if slot is not None and (
                slot is not self._draining or first is None or self._holds(request.user)
            ):
                self._pin(slot, request)
            elif first is None:
                slot = self._oldest([s for s in self._slots if not s.pins and not s.filling])
                if slot is None:
                    first = request
                    continue
                slot.key, slot.filling, request.fills = request.key, True, True
            else:
                continue
            self._waiting.remove(request)
            request.given.set_result(slot)
        self._drain(first)

    def _drain(self, first: Request | None) -> None:
        """Choose the slot to drain for a request that found every slot pinned, if there is one."""
        if first is None:
            self._draining = None
            return
        able = [s for s in self._slots if s.pins and not s.filling and not s.pins[first.user]]
        if self._draining not in able:  # one that is draining goes on, whoever passes it meanwhile
            self._draining = self._oldest(able)

    def _pin(self, slot: Slot, request: Request) -> None:
        self._clock += 1
        slot.used = self._clock
        slot.pins[request.user] += 1
        request.pinned = True

    def _holds(self, user: Hashable) -> bool:
        return any(slot.pins[user] for slot in self._slots)

    def _oldest(self, slots: list[Slot]) -> Slot | None:
        return min(slots, key=lambda slot: slot.used) if slots else None

    def after_fork(self) -> None:
        """In a forked child: of all threads only the one that forked goes on there."""
        me = threading.get_ident()
        self._lock = threading.Lock()  # the old one may have been taken
        self._waiting, self._draining = [], None
        for slot in self._slots:
            slot.pins = Counter({user: n for user, n in slot.pins.items() if user == me})
            if slot.filling:
                slot.key, slot.filling, slot.used = None, False, 0
