"""Low-rank updates of one weight: scale * B A, kept as their factors and multiplied out block by block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """The update scale * B A of one weight W; several adapters of one weight add up.

    Attributes:
        rank: R.
        scale: alpha / R or whatever the adapter says.
        transposed: W is stored as [I, O] (Conv1D, embeddings): its update is (B A)^T.
        read: gives A [R, I] and B [O, R] in float32; or [X, R, I] and [X, O, R] where W is a stack of X weights.
            A kernel's dimensions (convolutions) are part of I.
    """

    rank: int
    scale: float
    transposed: bool
    read: Callable[[], tuple[Tensor, Tensor]]

    def block(self, start: int, stop: int) -> Tensor:
        """The update's flat elements start..stop in W's own order, float32 [stop - start].

        Only the rows of W that the block touches are multiplied out.
        """
        left, right = self.sides()  # [X, N, R], [X, R, M]; W is [X, N, M]
        if left.dim() == 2:
            left, right = left.unsqueeze(0), right.unsqueeze(0)
        rows, columns = left.shape[1], right.shape[2]
        first, last = start // columns, -(-stop // columns)  # rows of the whole stack, [X * N]
        parts = [
            left[x, max(first - x * rows, 0) : min(last - x * rows, rows)] @ right[x]
            for x in range(first // rows, -(-last // rows))
        ]
        flat = torch.cat(parts).reshape(-1)[start - first * columns : stop - first * columns]
        return flat

    def sides(self) -> tuple[Tensor, Tensor]:
        """The update as a product in W's own order, the scale in the left side: [N, R], [R, M], or stacks of them."""
        a, b = self.read()
        return (self.scale * a.mT, b.mT) if self.transposed else (self.scale * b, a)
