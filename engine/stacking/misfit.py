"""Experts that may not belong to their base, told by the size of their deltas: |expert - base| against |base|."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

_UNRELATED = 1.0
"""Fine-tuning moves a model by a few hundredths of its size; two unrelated models of one kind differ by about 1.4."""


class Norms:
    """Sums of squares of the base's tensors and of each expert's deltas, gathered while they are read.

    Attributes:
        base: by name of the tensor.
        deltas: by label of the expert, then by name of the tensor.
    """

    def __init__(self) -> None:
        self.base: dict[str, float] = {}
        self.deltas: defaultdict[str, dict[str, float]] = defaultdict(dict)

    def notes(self, labels: Iterable[str]) -> tuple[str, ...]:
        """A sentence for each expert that is the base itself, or as far from it as an unrelated model."""
        notes, base = [], sum(self.base.values())
        for label in labels:
            squares = sum(self.deltas[label].values())
            if squares == 0:
                notes.append(f"{label} is identical to the base: all of its deltas are zero")
            elif base and (size := math.sqrt(squares / base)) > _UNRELATED:
                notes.append(
                    f"{label} is {size:.3g} times as far from the base as the base is large, as unrelated models are; "
                    "check that it was fine-tuned from this base"
                )
        return tuple(notes)


def norm_of(block: Tensor) -> float:
    """The norm of a block of floats, as float32 computes it: finite only if all of them are.

    Of bfloat16 to three digits: torch adds up in float32 there too, four times as fast, and rounds the result.
    """
    return float(torch.linalg.vector_norm(block if block.dtype == torch.bfloat16 else block.float()))


def squares_of_product(left: Tensor, right: Tensor) -> float:
    """The sum of squares of left @ right, [O, R] @ [R, I], from the factors alone."""
    left, right = left.double(), right.double()
    return float(((left.T @ left) * (right @ right.T)).sum())  # trace of (BA)^T BA
