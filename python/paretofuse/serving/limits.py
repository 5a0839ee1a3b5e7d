"""How much one client, and all of them together, may ask for."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Limits:
    """The bounds of a server; each is a number above 0.

    Attributes:
        max_batch: rows (prompts, images) that are computed together, at most.
        max_wait_ms: how long the first of a batch waits for others; 0 takes what is there.
        queue: rows that may wait for their turn; more are refused with 429.
        max_tokens: tokens that an answer may have, at most.
        cache_tokens: rows in work times the tokens that the longest may come to have; others wait for their turn.
        inputs: prompts, texts or images in one request, times the answers to each.
        body_bytes: of a request's body.
        timeout: seconds that a request may take in all.
    """

    max_batch: int = 16
    max_wait_ms: float = 0.0
    queue: int = 256
    max_tokens: int = 4096
    cache_tokens: int = 32768
    inputs: int = 64
    body_bytes: int = 8 << 20
    timeout: float = 300.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            whole = field.type == "int"
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                raise TypeError(f"got {field.name}={value!r}, expected a {'whole ' if whole else ''}number")
            if field.name == "max_wait_ms" and value == 0:
                continue
            if not 0 < value < math.inf:
                raise ValueError(f"got {field.name}={value!r}, expected a finite number above 0")
