"""A bounded queue that is fair to preferences: they take turns, however many jobs each has waiting."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence

from paretofuse.serving.scheduling.job import Job, Key


class QueueFull(Exception):
    """There is no room for all of the jobs; none of them was taken."""


class FairQueue:
    """Jobs that wait. Not thread-safe by itself: the worker guards it.

    Each preference has a line of its own, first come, first served; `take` goes round the lines. So a job waits for
    the jobs before it in its line, and for at most as many rounds of the others.

    Args:
        bound: how many jobs may wait.
    """

    def __init__(self, bound: int) -> None:
        self._bound = bound
        self._lines: OrderedDict[tuple[Key, str | None], deque[Job]] = OrderedDict()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def put(self, jobs: Sequence[Job]) -> None:
        """Add all of them, or none.

        Raises:
            QueueFull: there is no room.
        """
        if self._size + len(jobs) > self._bound:
            raise QueueFull(f"{self._size} of {self._bound} places are taken")
        for job in jobs:
            self._lines.setdefault((job.key, job.head), deque()).append(job)
        self._size += len(jobs)

    def first(self) -> Job | None:
        """Whose turn it is; jobs that nobody waits for are dropped on the way."""
        while self._lines:
            key, line = next(iter(self._lines.items()))
            while line and line[0].cancelled:
                line.popleft()
                self._size -= 1
            if line:
                return line[0]
            del self._lines[key]
        return None

    def take(self) -> Job | None:
        """Remove the one whose turn it is; its line goes to the end."""
        job = self.first()
        if job is None:
            return None
        key = (job.key, job.head)
        line = self._lines[key]
        line.popleft()
        self._size -= 1
        if line:
            self._lines.move_to_end(key)
        else:
            del self._lines[key]
        return job

    def take_like(self, job: Job, count: int) -> list[Job]:
        """Remove up to `count` more of a job's own line."""
        line = self._lines.get((job.key, job.head), deque())
        found: list[Job] = []
        while line and len(found) < count:
            other = line.popleft()
            self._size -= 1
            if not other.cancelled:
                found.append(other)
        if not line:
            self._lines.pop((job.key, job.head), None)
        return found

    def expired(self, now: float) -> list[Job]:
        """Remove all whose deadline has passed."""
        late = [job for line in self._lines.values() for job in line if job.deadline < now]
        for job in late:
            self._lines[(job.key, job.head)].remove(job)
        self._size -= len(late)
        return late

    def drain(self) -> list[Job]:
        """Remove all."""
        jobs = [job for line in self._lines.values() for job in line]
        self._lines.clear()
        self._size = 0
        return jobs
