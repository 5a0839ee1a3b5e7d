"""The queue is bounded and fair, the plan is the cheapest, pieces of text are whole."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the server comes with the extra `serve`")

from paretofuse.serving.scheduling.costs import Plan, make_plan
from paretofuse.serving.scheduling.job import Job
from paretofuse.serving.scheduling.queue import FairQueue, QueueFull
from paretofuse.serving.scheduling.text import TextStream

POPULAR, RARE, OTHER = (1.0, 0.0), (0.0, 1.0), (0.5, 0.5)


def jobs(key: tuple[float, float], count: int, deadline: float = 1e9) -> list[Job]:
    async def make() -> list[Job]:
        return [Job({"a": key[0], "b": key[1]}, i, deadline) for i in range(count)]

    return asyncio.run(make())


def test_a_rare_preference_waits_for_one_round_only() -> None:
    queue = FairQueue(1000)
    queue.put(jobs(POPULAR, 900))
    queue.put(jobs(OTHER, 50))
    queue.put(jobs(RARE, 1))
    first = [job.key for job in (queue.take() for _ in range(3)) if job is not None]
    assert sorted(first) == sorted([POPULAR, OTHER, RARE])
    # And so it stays, however many of the others come in between.
    for _ in range(20):
        queue.put(jobs(POPULAR, 2))
        queue.put(jobs(RARE, 1))
        taken = [job.key for job in (queue.take() for _ in range(3)) if job is not None]
        assert RARE in taken
    assert len(queue) == 951 - 3 + 60 - 60


def test_one_preferences_jobs_come_in_order_and_a_full_queue_takes_none() -> None:
    queue = FairQueue(5)
    queue.put(jobs(POPULAR, 4))
    with pytest.raises(QueueFull, match="4 of 5"):
        queue.put(jobs(RARE, 2))
    assert len(queue) == 4
    assert [job.payload for job in (queue.take() for _ in range(4)) if job is not None] == [0, 1, 2, 3]
    assert queue.take() is None


def test_the_cancelled_and_the_late_are_dropped() -> None:
    queue = FairQueue(10)
    own = jobs(POPULAR, 3)
    queue.put(own)
    queue.put(jobs(RARE, 1, deadline=5.0))
    own[0].cancelled = True
    assert queue.first() is own[1]
    assert [job.key for job in queue.expired(6.0)] == [RARE]
    assert queue.take() is own[1]
    own[2].cancelled = True
    assert queue.first() is None
    assert len(queue) == 0


def plan(rows: dict[Any, int], **options: Any) -> Plan:
    settings: dict[str, Any] = {
        "steps": dict.fromkeys(rows, 50),
        "ready": (),
        "replicas": 16,
        "planes": 2.0,
        "each": 0.07,
        "can_mix": True,
        **options,
    }
    return make_plan(rows, **settings)


KEYS = [(i / 16, 1 - i / 16) for i in range(17)]


def cost(chosen: Plan, rows: dict[Any, int], planes: float, steps: int) -> float:
    """By the formulas of costs.py, nothing being merged yet."""
    own = sum(0.93 + 0.07 * rows[key] + (2 + planes) / 2 / steps for key in chosen.merged)
    mixed = sum(rows[key] for key in chosen.mixed)
    return own + ((1 + planes) * (0.93 + 0.07 * mixed) if mixed else 0.0)


def test_plans() -> None:
    assert plan({KEYS[0]: 16}) == Plan((KEYS[0],), ())  # one preference: its replica
    many = dict.fromkeys(KEYS, 1)
    assert plan(many).merged == ()  # many dense ones: all mixed
    assert set(plan(many).mixed) == set(KEYS)
    # Three dense ones are cheaper merged; four are not, and with low-rank planes two are not.
    few = dict.fromkeys(KEYS[:3], 1)
    assert set(plan(dict.fromkeys(KEYS[:4], 1)).mixed) == set(KEYS[:4])
    assert set(plan(dict.fromkeys(KEYS[:2], 1), planes=0.02).mixed) == set(KEYS[:2])
    assert set(plan(few).merged) == set(few)
    assert set(plan(few, planes=0.02).mixed) == set(few)
    # One token is not worth a merge.
    assert plan(few, steps=dict.fromkeys(few, 1)).merged == ()
    assert set(plan(few, steps=dict.fromkeys(few, 1), ready=KEYS[:3]).merged) == set(few)
    # What cannot be mixed is merged.
    assert set(plan(many, can_mix=False).merged) == set(many)
    # Never more than there are replicas.
    assert len(plan(dict.fromkeys(KEYS, 3), planes=30.0, replicas=2).merged) <= 2


def test_no_plan_of_another_number_of_merges_is_cheaper() -> None:
    draw = random.Random(0)
    for _ in range(50):
        rows = {key: draw.randrange(1, 4) for key in draw.sample(KEYS, draw.randrange(1, 12))}
        planes, steps = draw.choice([0.05, 1.0, 2.0, 8.0]), draw.choice([1, 4, 100])
        found = plan(rows, planes=planes, steps=dict.fromkeys(rows, steps))
        assert sorted(found.merged + found.mixed) == sorted(rows)
        best = min(
            cost(Plan(tuple(order[:count]), tuple(order[count:])), rows, planes, steps)
            for order in [sorted(rows, key=lambda key: -rows[key])]
            for count in range(len(order) + 1)
        )
        assert cost(found, rows, planes, steps) <= best + 1e-9


class Letters:
    """Decodes bytes."""

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")


def streamed(text: str, stops: tuple[str, ...] = ()) -> list[str]:
    stream, found = TextStream(Letters(), stops, streams=True), []
    content = list(text.encode())
    for end in range(1, len(content) + 1):
        found.append(stream.piece(content[:end], last=end == len(content)))
        if stream.stopped:
            break
    return found


def test_pieces_are_whole_characters() -> None:
    found = streamed("aß€𝄞!")
    assert "".join(found) == "aß€𝄞!"
    assert "\ufffd" not in "".join(found)
    assert found[0] == "a"


@pytest.mark.parametrize("stop", ["end", "n", "nd e", "n end"])
def test_nothing_of_a_stop_is_sent(stop: str) -> None:
    text = "the bend even end, no more"
    assert "".join(streamed(text, (stop,))) == text[: text.find(stop)]
    assert "".join(streamed(text, ("never",))) == text
    assert "".join(streamed("an en", ("end",))) == "an en"  # begun, and not finished
