"""One row of work, and what its request hears of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Key = tuple[float, ...]
"""A preference's shares, in the order of the objectives."""


@dataclass(frozen=True)
class Piece:
    """A part of an answer.

    Attributes:
        value: of a generation the text since the last piece; otherwise the whole result.
        tokens: generated so far.
        finish: why it is over; None while it goes on.
    """

    value: Any
    tokens: int = 0
    finish: str | None = None


@dataclass(eq=False)
class Job:
    """One prompt, text or image, at one preference. Made in an event loop, worked on by the worker's thread.

    Attributes:
        preference: every objective's share.
        payload: what the runner works on.
        deadline: by `time.monotonic()`.
        head: the objective whose head is used.
        events: what the request reads: pieces, the last with a `finish`, or an exception.
        hit: whether its preference was merged already when its work began; None before.
        cancelled: nobody waits for it any more.
        finished: its request has been told all.
        born: when it was made.
    """

    preference: Mapping[str, float]
    payload: Any
    deadline: float
    head: str | None = None
    events: asyncio.Queue[Piece | Exception] = field(default_factory=asyncio.Queue)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    hit: bool | None = None
    cancelled: bool = False
    finished: bool = False
    born: float = field(default_factory=time.monotonic)

    @property
    def key(self) -> Key:
        """Jobs of equal keys may share a replica."""
        return tuple(self.preference.values())

    def tell(self, event: Piece | Exception) -> None:
        """Hand something to the request, from any thread. At most a piece for each token is ever kept."""
        self.finished = isinstance(event, Exception) or event.finish is not None
        try:
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:  # the loop has gone, and with it whoever waited
            self.cancelled = True
