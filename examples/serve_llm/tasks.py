"""What `paretofuse fit` and `paretofuse sweep` ask for: batches and losses to learn from, and held-out perplexities."""

from __future__ import annotations

import math
from functools import cache

from torch import Tensor, nn
from transformers import AutoTokenizer

import paretofuse as pf
from examples.serve_llm.texts import NAMES, rows

BASE = "build/serve_llm/base"
BATCH = 2
LEARN, HELD_OUT = 16, 4
"""Batches of each text."""


def loss(module: nn.Module, batch: Tensor) -> Tensor:
    """Cross-entropy of the next token."""
    found: Tensor = module(input_ids=batch, labels=batch).loss
    return found


@cache
def batches(name: str, held_out: bool) -> list[Tensor]:
    """int64 [BATCH, LENGTH] each."""
    count = BATCH * (HELD_OUT if held_out else LEARN)
    return list(rows(name, AutoTokenizer.from_pretrained(BASE), count, held_out=held_out).split(BATCH))


def objectives() -> dict[str, tuple[list[Tensor], object]]:
    """For `fit`."""
    return {name: (batches(name, False), loss) for name in NAMES}


def perplexities(module: nn.Module) -> dict[str, float]:
    """For `sweep`: exp of the mean loss on held-out text; smaller is better."""
    held_out = {name: (batches(name, True), loss) for name in NAMES}
    return {name: math.exp(value) for name, value in pf.evaluate(module, held_out).items()}
