"""Replicas that all are held: waits are fair, in threads and in an event loop, and end when they should."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import paretofuse as pf
from paretofuse.engine.extension import _C
from paretofuse.engine.modules.slots import Request, Slot, Slots
from tests.support import waiting
from tests.support.models import net_and_experts, same

FIRST, SECOND, THIRD = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.2, 0.3, 0.5]


def nothing(slot: Slot) -> None:
    """Fills a slot with nothing."""


class Users:
    """Users of slots, one after the other in one thread: nothing here waits, and nothing depends on time."""

    def __init__(self, slots: Slots, monkeypatch: pytest.MonkeyPatch) -> None:
        self.slots, self.user = slots, ""
        monkeypatch.setattr("paretofuse.engine.modules.slots.current_user", lambda: self.user)

    def ask(self, user: str, key: str) -> Request:
        """Ask, and fill at once what is to be filled."""
        self.user = user
        request = self.slots.ask(key)
        self.fill(request)
        return request

    def fill(self, request: Request) -> None:
        if request.fills and not request.pinned:
            self.slots.fill(request, nothing)


def test_those_who_wait_are_served_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    users = Users(Slots(2), monkeypatch)
    a, b = users.ask("one", "a"), users.ask("two", "b")
    c, d = users.ask("three", "c"), users.ask("four", "d")
    assert not c.given.done()
    assert not users.ask("five", "a").given.done()  # the least recently used drains
    other = users.ask("five", "b")
    assert other.given.result() is b.given.result()  # the other does not
    assert users.ask("one", "a").given.result() is a.given.result()  # who holds one passes
    users.slots.release(a)
    assert not c.given.done()  # "one" has pinned it twice
    users.slots.release(b)
    assert not c.given.done()
    users.slots.release(other)  # the slot that is free first goes to whoever came first
    assert c.given.result() is b.given.result()
    assert not d.given.done()
    users.fill(c)
    users.slots.release(c)
    assert d.given.result() is c.given.result()


def test_a_drain_ends_with_the_wait_that_it_was_for(monkeypatch: pytest.MonkeyPatch) -> None:
    users = Users(Slots(1), monkeypatch)
    a = users.ask("one", "a")
    b = users.ask("two", "b")
    late = users.ask("three", "a")
    assert not late.given.done()
    with pytest.raises(TimeoutError, match=r"within 3 s, 1 in all"):
        users.slots.give_up(b, 3.0)
    assert late.given.result() is a.given.result()
    c = users.ask("two", "c")
    assert not users.ask("four", "a").given.done()
    users.slots.drop(c)
    assert users.ask("five", "a").given.done()


def test_a_user_that_holds_the_oldest_slot_waits_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    users = Users(Slots(2), monkeypatch)
    users.ask("one", "a")
    b = users.ask("two", "b")
    c = users.ask("one", "c")
    assert not users.ask("three", "b").given.done()
    assert users.ask("three", "a").given.done()
    users.slots.release(b)
    assert c.given.done()


def test_a_request_that_is_dropped_while_it_fills_leaves_a_ready_slot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    users = Users(Slots(1), monkeypatch)
    users.user = "one"
    a = users.slots.ask("a")
    users.slots.drop(a)
    assert not users.ask("two", "b").given.done()  # it is being filled still
    users.slots.fill(a, nothing)
    assert not a.pinned
    assert not users.ask("three", "a").given.done()  # "two" came first


def test_in_a_forked_process_the_one_who_forked_keeps_its_pins_alone() -> None:
    slots = Slots(3)
    own = slots.acquire("own", nothing)
    other = threading.Thread(target=slots.acquire, args=("other", nothing))
    other.start()
    other.join()
    halfway = slots.ask("halfway")  # somebody was filling it
    assert halfway.fills
    slots.after_fork()
    assert [slots.acquire(key, nothing, 0).given.result().number for key in ("halfway", "new")] == [2, 1]
    with pytest.raises(TimeoutError):
        slots.acquire("one more", nothing, 0)
    slots.release(own)
    assert slots.acquire("one more", nothing, 0).given.result() is own.given.result()


@pytest.mark.parametrize(
    "check",
    [
        waiting.check_nobody_starves,
        waiting.check_a_waiter_that_gives_up_leaves_no_trace,
        waiting.check_a_holder_that_waits_is_served_by_the_other,
    ],
)
def test_waiting_for_replicas(check: Callable[..., None]) -> None:
    base, experts = net_and_experts(count=4)
    engine = pf.stack(base, experts, replicas=2)

    def acquire(key: str, timeout: float | None) -> AbstractContextManager[nn.Module]:
        entered = engine.replica({key: 1.0}, timeout=timeout)
        entered.__enter__()
        return entered

    check(acquire, lambda entered: entered.__exit__(None, None, None), TimeoutError)


@pytest.mark.parametrize(
    ("timeout", "error"),
    [
        (float("nan"), ValueError),
        (-0.1, ValueError),
        (float("-inf"), ValueError),
        (-(10**400), ValueError),
        ("1", TypeError),
        (True, TypeError),
        ([1], TypeError),
        (torch.tensor(1.0), TypeError),
    ],
)
def test_timeouts_that_are_none(timeout: Any, error: type[Exception]) -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts)
    for ask in (engine.replica, engine.areplica):
        with pytest.raises(error, match="got timeout="):
            ask(FIRST, timeout=timeout)


@pytest.mark.parametrize(
    "timeout", [None, 0, 1, 0.5, float("inf"), 1e300, 10**400, Fraction(1, 3), np.float32(2.0), np.int64(3)]
)
def test_timeouts(timeout: Any) -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts)
    with engine.replica(FIRST, timeout=timeout) as module:
        assert same(module, engine.merge(FIRST))


def test_replicas_in_an_event_loop() -> None:
    """Two replicas, a hundred tasks, four preferences; the loop goes on while they wait."""
    base, experts = net_and_experts()
    engine = pf.stack(base, experts, replicas=2)
    preferences = [FIRST, SECOND, THIRD, [0.5, 0.0, 0.5]]
    truths = [engine.merge(preference) for preference in preferences]

    async def serve(number: int) -> bool:
        async with engine.areplica(preferences[number % 4], timeout=100) as module:
            before = same(module, truths[number % 4])
            await asyncio.sleep(0)
            return before and same(module, truths[number % 4])

    async def main() -> list[bool]:
        return await asyncio.gather(*(serve(number) for number in range(100)))

    assert asyncio.run(main()) == [True] * 100


def test_a_task_waits_while_the_loop_goes_on() -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts, replicas=1)

    async def main() -> None:
        entered, done = asyncio.Event(), asyncio.Event()

        async def hold() -> None:
            async with engine.areplica(FIRST):
                entered.set()
                await done.wait()

        async def ask() -> bool:
            async with engine.areplica(SECOND) as module:
                return same(module, engine.merge(SECOND))

        holder = asyncio.create_task(hold())
        await entered.wait()
        with pytest.raises(TimeoutError, match="1 in all"):
            async with engine.areplica(SECOND, timeout=0.01):
                pass
        cancelled, waiter = asyncio.create_task(ask()), asyncio.create_task(ask())
        await asyncio.sleep(0)
        cancelled.cancel()  # while it waits
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        done.set()
        await holder
        assert await waiter

    asyncio.run(main())
    with engine.replica(THIRD, timeout=0):  # nothing was left behind
        pass


def test_a_task_that_is_cancelled_while_it_merges_leaves_nothing_behind() -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts, replicas=1)
    merging, go = threading.Event(), threading.Event()
    on_host = engine.routers.on_host

    def slow() -> _C.Routers:
        merging.set()
        assert go.wait(100)
        return on_host()

    async def main() -> None:
        engine.routers.on_host = slow  # type: ignore[method-assign]
        task = asyncio.create_task(engine.areplica(FIRST).__aenter__())
        await asyncio.to_thread(merging.wait, 100)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go.set()

    asyncio.run(main())
    engine.routers.on_host = on_host  # type: ignore[method-assign]
    with engine.replica(FIRST, timeout=100) as module:
        assert same(module, engine.merge(FIRST))
    with engine.replica(SECOND, timeout=0):
        pass
