"""Low-rank planes: B A, as LoRA has them (Hu et al., arXiv 2106.09685) or as the SVD of a dense delta gives them.

The factors lie as the tensor does: B has its rows, A its columns (all dimensions but the first, flattened). A scale
(alpha / r) is folded into B. SVD of deltas: SMILE (Tang et al., arXiv 2408.10174).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paretofuse.engine.dtypes import TO_NAME
from paretofuse.engine.planes.memory import Memory
from paretofuse.engine.planes.plane import Plane, Sums, sums_shape


@dataclass(frozen=True, eq=False)
class LowRank:
    """A plane of two factors of one dtype.

    Attributes:
        b: [rows, rank], float32, bfloat16 or float16; contiguous.
        a: [rank, columns], of the same dtype; contiguous.
        shape: the tensor's; rows x columns elements.
        error: see `Plane`.
    """

    b: Tensor
    a: Tensor
    shape: tuple[int, ...]
    error: float | None = None
    format = "lowrank"

    @classmethod
    def of_factors(cls, b: Tensor, a: Tensor, shape: tuple[int, ...]) -> LowRank:
        """B A, in the shortest dtype that holds both factors exactly: an adapter's own, where its scale allows.

        Args:
            b: float32 [rows, rank], with the adapter's scale.
            a: float32 [rank, columns].
            shape: the tensor's.
        """
        exact = (d for d in (torch.bfloat16, torch.float16) if all(_holds(d, factor) for factor in (b, a)))
        dtype = next(exact, torch.float32)
        return cls(b.to(dtype).contiguous(), a.to(dtype).contiguous(), shape)

    @classmethod
    def encode(cls, delta: Tensor, rank: int | None, energy: float = 1.0) -> LowRank:
        """The nearest plane of a rank, by SVD.

        Args:
            delta: float32 [rows, ...].
            rank: how many singular values are kept; None: the fewest that hold `energy`.
            energy: share of the sum of squares, from 0 to 1.

        Returns:
            float32 factors; each takes the square root of the singular values.
        """
        u, sizes, v = torch.linalg.svd(delta.flatten(1), full_matrices=False)
        if rank is None:
            kept = torch.cumsum(sizes.double().square(), 0)
            rank = int((kept < energy * kept[-1]).sum()) + 1
        rank = max(1, min(rank, len(sizes)))
        root = sizes[:rank].sqrt()
        return cls(
            (u[:, :rank] * root).contiguous(), (root[:, None] * v[:rank]).contiguous(), tuple(delta.shape)
        )

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.a.shape[0]

    def tensors(self) -> Mapping[str, Tensor]:
        """Named as PEFT names them."""
        return {".lora_B": self.b, ".lora_A": self.a}

    def like(self, tensors: Mapping[str, Tensor]) -> LowRank:
        """See `Plane`."""
        return LowRank(tensors[".lora_B"], tensors[".lora_A"], self.shape, self.error)

    def decode(self) -> Tensor:
        """Float32 of the tensor's shape: dense, so for tests and for what reads nothing else."""
        return (self.b.float() @ self.a.float()).view(self.shape)

    def part(self, first: int, last: int) -> LowRank:
        """Rows first .. last, as a view."""
        return LowRank(self.b[first:last], self.a, (last - first, *self.shape[1:]))

    def add_to(self, merged: Tensor, weight: Tensor) -> None:
        """See `Plane`; the product is added without being stored, with columns a second one: B (A k)."""
        b, a = self.b.float(), self.a.float()
        rows, columns = by_side(weight, len(b))
        matrix = merged.view(len(b), -1)
        matrix.addmm_(b * rows, a)
        if columns is not None:
            matrix.addmm_(b, a * columns)

    def inner(self, gradient: Tensor) -> Tensor:
        """See `Plane`: sum of B * (G A^T)."""
        return self._products(gradient).sum()

    def inner_rows(self, gradient: Tensor) -> Tensor:
        """See `Plane`."""
        return self._products(gradient).sum(1)

    def inner_columns(self, gradient: Tensor) -> Tensor:
        """See `Plane`: sum over ranks of A * (B^T G)."""
        return (self.a.double() * (self.b.double().T @ gradient.reshape(len(self.b), -1).double())).sum(0)

    def _products(self, gradient: Tensor) -> Tensor:
        """B * (G A^T), float64 [rows, rank]."""
        rows = gradient.reshape(len(self.b), -1)
        return self.b.double() * (rows.double() @ self.a.double().T)

    def memory(self) -> Memory:
        """See `Plane`."""
        return Memory("lowrank", TO_NAME[self.a.dtype], self.a.data_ptr(), self.b.data_ptr(), self.rank)


def _holds(dtype: torch.dtype, numbers: Tensor) -> bool:
    """Whether a dtype holds float32 numbers exactly."""
    return torch.equal(numbers.to(dtype).float(), numbers)


def by_side(weight: Tensor, rows: int) -> tuple[Tensor, Tensor | None]:
    """A weight [], [rows] or [rows + columns] as factors of B and of A: [1 or rows, 1], and [columns] or None."""
    if weight.dim() == 0 or len(weight) == rows:
        return weight.reshape(-1, 1), None
    return weight[:rows].unsqueeze(1), weight[rows:]


def token_sums(planes: Sequence[Plane | None], left: Tensor, right: Tensor, by: Sums) -> Tensor:
    """<left^T right, B A> of every low-rank plane, others counting as zero; left^T right is not made.

    It is the sum over tokens of (left B) * (right A^T), a row of it that of B * (left^T (right A^T)), and a column that
    of A^T * (right^T (left B)). All factors lie side by side, so that each step is one product.

    Args:
        planes: of a matrix [rows, columns].
        left, right: float32 [tokens, rows] and [tokens, columns].
        by: "whole", "row", or "row and column".

    Returns:
        float32 [P], [P, rows] or [P, rows + columns].
    """
    own = [(j, plane) for j, plane in enumerate(planes) if isinstance(plane, LowRank)]
    sums = left.new_zeros(len(planes), *sums_shape(by, left.shape[1], right.shape[1]))
    if own:
        b = torch.cat([plane.b.float() for _, plane in own], 1)  # [rows, sum of ranks]
        a = torch.cat([plane.a.float() for _, plane in own])  # [sum of ranks, columns]
        low = right @ a.T  # [tokens, sum of ranks]
        if by == "whole":
            products = ((left @ b) * low).sum(0)  # [sum of ranks], else [rows or more, sum of ranks]
        else:
            products = b * (left.T @ low)
        if by == "row and column":
            products = torch.cat([products, a.T * (right.T @ (left @ b))])
        for (j, _), part in zip(own, products.split([plane.rank for _, plane in own], -1), strict=True):
            sums[j] = part.sum(-1)
    return sums
