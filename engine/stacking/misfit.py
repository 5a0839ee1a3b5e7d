"""Experts that may not belong to their base, told by the size of their deltas: |expert - base| against |base|."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

_UNRELATED = 1.0
"""Fine-tuning moves a model by a few hundredths of its size; two unrelated models of one kind differ by about 1.4."""


class Norms:
    """Sums of squares of the base's tensors and of each expert's deltas, gathered while they are read."""

    def __init__(self) -> None:
        self._base: dict[str, float] = {}
        self._deltas: dict[str, dict[str, float]] = {}

    def base(self, name: str, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
        """The same blocks of a base tensor, counted; what is read twice counts once."""
        return _counted(self._base, name, blocks)

    def delta(self, label: str, name: str, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
        """The same blocks of one of an expert's deltas, counted."""
        return _counted(self._deltas.setdefault(label, {}), name, blocks)

    def factors(self, label: str, name: str, left: Tensor, right: Tensor) -> None:
        """Count a delta left @ right, [O, R] @ [R, I], from its factors alone."""
        left, right = left.double(), right.double()
        squares = ((left.T @ left) * (right @ right.T)).sum()  # trace of (BA)^T BA
        self._deltas.setdefault(label, {})[name] = float(squares)

    def notes(self, labels: Iterable[str]) -> tuple[str, ...]:
        """A sentence for each expert that is the base itself, or as far from it as an unrelated model."""
        notes, base = [], sum(self._base.values())
        for label in labels:
            squares = sum(self._deltas.get(label, {}).values())
            if squares == 0:
                notes.append(f"{label} is identical to the base: all of its deltas are zero")
            elif base and (size := math.sqrt(squares / base)) > _UNRELATED:
                notes.append(
                    f"{label} is {size:.3g} times as far from the base as the base is large, as unrelated models are; "
                    "check that it was fine-tuned from this base"
                )
        return tuple(notes)


def _counted(sums: dict[str, float], name: str, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
    sums[name] = 0.0
    for block in blocks:
        sums[name] += float(torch.linalg.vector_norm(block.float())) ** 2
        yield block
