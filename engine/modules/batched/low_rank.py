"""Low-rank planes of one weight under many preferences: two thin products for all planes, side by side.

    y[b] = sum_e w[b, e] x[b] A_e^T B_e^T = ((x[b] A^T) * w[b, e of each rank]) B^T

A [R, I] and B [O, R] hold the factors of all planes, R their ranks in sum. No plane is ever dense, so that beside the
product with the base [O, I] they cost R / O + R / I of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from paretofuse.engine.planes.lowrank import LowRank


@dataclass(frozen=True)
class SideBySide:
    """The low-rank planes of a weight [O, I].

    Attributes:
        a: [R, I].
        b: [O, R].
        ranks: of each plane; R in sum.
        planes: which planes they are.
    """

    a: Tensor
    b: Tensor
    ranks: tuple[int, ...]
    planes: tuple[int, ...]

    @classmethod
    def of(cls, planes: Mapping[int, LowRank], transposed: bool) -> SideBySide:
        """Factors of W, or of a stored W^T: B A is then A^T B^T."""
        pairs = [(p.b.T, p.a.T) if transposed else (p.a, p.b) for p in planes.values()]
        a, b = (torch.cat([pair[i].float() for pair in pairs], i) for i in (0, 1))
        return cls(a.contiguous(), b.contiguous(), tuple(p.rank for p in planes.values()), tuple(planes))

    def product(self, x: Tensor, weights: Tensor, transposed: bool) -> Tensor:
        """[B, P, I] -> [B, P, O], float32; the products are in x's dtype.

        Args:
            x: the inputs.
            weights: [B, E], or of row coefficients [B, E, O], transposed [B, E, I].
            transposed: whether row coefficients are the inputs'.
        """
        weights = weights[:, list(self.planes)]
        a, b = self.a.to(x.dtype), self.b.to(x.dtype)
        if weights.dim() == 2:
            ranks = torch.tensor(self.ranks, device=weights.device)
            own = weights.repeat_interleave(ranks, 1, output_size=len(a)).unsqueeze(1)
            return (((x @ a.T).float() * own).to(x.dtype) @ b.T).float()
        own = weights.unsqueeze(2)  # [B, E, 1, rows]
        y = x.new_zeros((), dtype=torch.float32)
        for e, (left, right) in enumerate(zip(a.split(self.ranks), b.split(self.ranks, 1), strict=True)):
            if transposed:
                y = y + (((own[:, e] * x.float()).to(x.dtype) @ left.T) @ right.T).float()
            else:
                y = y + own[:, e] * ((x @ left.T) @ right.T).float()
        return y

    def part(self, first: int, last: int) -> SideBySide:
        """Of outputs first .. last."""
        return SideBySide(self.a, self.b[first:last], self.ranks, self.planes)
