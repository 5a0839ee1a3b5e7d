"""What the study learns from and measures: batches and losses, and perplexities of held-out text."""

from __future__ import annotations

import math

from lora_texts import NAMES, rows
from torch import Tensor, nn

import paretofuse as pf

BATCH = 16
LEARN, HELD_OUT = 24, 8
"""Batches of each text."""


def loss(module: nn.Module, batch: Tensor) -> Tensor:
    """Cross-entropy of the next byte."""
    found: Tensor = module(input_ids=batch, labels=batch).loss
    return found


def batches(name: str, *, held_out: bool) -> list[Tensor]:
    """int64 [BATCH, LENGTH] each."""
    count = HELD_OUT if held_out else LEARN
    return list(rows(name, held_out=held_out)[: count * BATCH].split(BATCH))


def objectives() -> dict[str, tuple[list[Tensor], object]]:
    """For [fit]."""
    return {name: (batches(name, held_out=False), loss) for name in NAMES}


def perplexities(module: nn.Module) -> dict[str, float]:
    """For [sweep]: exp of the mean loss on held-out text; smaller is better."""
    held_out = {name: (batches(name, held_out=True), loss) for name in NAMES}
    return {name: math.exp(value) for name, value in pf.evaluate(module, held_out).items()}
