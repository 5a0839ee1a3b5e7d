"""Server-sent events whose rows of work end with the connection."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from paretofuse.serving.scheduling.job import Job
from paretofuse.serving.state import State

EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {"text/event-stream": {}},
        "description": "With `stream`: events",
    }
}
"""What the API's description says of them."""


class EventStream(StreamingResponse):
    """Takes the jobs into the queue at once, so that a full queue is still a 429; sends events as they come.

    A client that leaves cancels the jobs; one that reads slowly makes nothing else wait, as at most a piece for each
    token is kept for it.

    Raises:
        ApiError: on being made, as `State.put`.
    """

    def __init__(self, state: State, jobs: Sequence[Job], events: AsyncIterator[bytes]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
        self._state, self._jobs = state, jobs
        state.put(jobs)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._state.over(self._jobs)
