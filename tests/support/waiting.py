"""What Python's and the library's replicas promise to those who wait.

Without a clock: callers are threads of their own, and that somebody waits is known by what others then see.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

PATIENCE = 120.0
"""Seconds until something that must happen counts as never happening."""

Acquire = Callable[[str, float | None], Any]
"""Takes "a", "b", "c" or "d", and the seconds to wait (None: for ever); returns what `Release` takes."""
Release = Callable[[Any], None]


def until(condition: Callable[[], bool]) -> None:
    """Return as soon as a condition that must come true is true."""
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"did not come true within {PATIENCE:g} s")
        time.sleep(0.01)


class Caller:
    """A thread that does one thing after the other, as it is told."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)

    def start(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Tell it to call a function."""
        return self._thread.submit(function, *arguments)

    def do(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Tell it, and wait for what comes of it."""
        return self.start(function, *arguments).result(PATIENCE)


def until_drained(
    caller: Caller, acquire: Acquire, release: Release, keys: str, error: type[Exception]
) -> str:
    """Ask for keys, at once or never, until one is refused, and return it: somebody waits for its replica."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        for key in keys:
            try:
                held = caller.do(acquire, key, 0.0)
            except error:
                return key
            caller.do(release, held)
    raise AssertionError(f"{keys} are handed out again and again while another preference waits")


def check_nobody_starves(acquire: Acquire, release: Release, error: type[Exception]) -> None:
    """With two replicas, held by users that overlap, the third preference is served, and then the fourth.

    Args:
        acquire, release: of a pool with two replicas.
        error: what `acquire` raises when the time is over.
    """
    one, two, third, fourth, late, probe = (Caller() for _ in range(6))
    held = {"a": (one, one.do(acquire, "a", None)), "b": (two, two.do(acquire, "b", None))}
    c = third.start(acquire, "c", None)
    key = until_drained(probe, acquire, release, "ab", error)
    user, first = held.pop(key)
    d = fourth.start(acquire, "d", None)
    overlapping = user.do(acquire, key, 0.0)  # who holds one is not made to wait for itself
    ((other_key, (other_user, second)),) = held.items()
    shared = probe.do(acquire, other_key, 0.0)  # the other replica serves as before
    user.do(release, first)
    assert not c.done()
    user.do(release, overlapping)
    c.result(PATIENCE)
    until_drained(
        late, acquire, release, other_key + "c", error
    )  # for the fourth, and it does not matter which
    again = late.start(acquire, key, None)
    probe.do(release, shared)
    other_user.do(release, second)
    third.do(release, c.result())
    fourth.do(release, d.result(PATIENCE))
    late.do(release, again.result(PATIENCE))


def check_a_waiter_that_gives_up_leaves_no_trace(
    acquire: Acquire, release: Release, error: type[Exception]
) -> None:
    """When a wait is over, what was drained for it is open again."""
    one, two, third = (Caller() for _ in range(3))
    a, b = one.do(acquire, "a", None), two.do(acquire, "b", None)
    try:
        third.do(acquire, "c", 0.05)
    except error:
        pass
    else:
        raise AssertionError("a third preference was served by two replicas that are held")
    for key in ("a", "b"):
        third.do(release, third.do(acquire, key, 0.0))
    one.do(release, a)
    two.do(release, b)


def check_a_holder_that_waits_is_served_by_the_other(
    acquire: Acquire, release: Release, error: type[Exception]
) -> None:
    """A thread that holds the least recently used replica must not wait for that one."""
    one, two, probe = (Caller() for _ in range(3))
    a, b = one.do(acquire, "a", None), two.do(acquire, "b", None)
    c = one.start(acquire, "c", None)
    until_drained(probe, acquire, release, "b", error)
    two.do(release, b)
    one.do(release, c.result(PATIENCE))
    one.do(release, a)
