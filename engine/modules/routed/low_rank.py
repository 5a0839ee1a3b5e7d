"""Low-rank planes of one weight, under one preference or many: two thin products for all planes, side by side.

    y[b] = sum_e w[b, e] x[b] A_e^T B_e^T = ((x[b] A^T) * w[b, e of each rank]) B^T

A [R, I] and B [O, R] hold the factors of all planes, R their ranks in sum. No plane is ever dense, so that beside the
product with the base [O, I] they cost R / O + R / I of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from paretofuse.engine.layout import Spans
from paretofuse.engine.planes.lowrank import LowRank
from paretofuse.engine.routing.weights import coefficients
from paretofuse.kernels.few_rows import product


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
            weights: [B, E], [B, E, rows] or [B, E, rows + columns], as `coefficients` gives them.
            transposed: whether rows are the inputs and columns the outputs.
        """
        weights = weights[:, list(self.planes)]
        a, b = self.a.to(x.dtype), self.b.to(x.dtype)
        if weights.dim() == 2:
            ranks = torch.tensor(self.ranks, device=weights.device)
            own = weights.repeat_interleave(ranks, 1, output_size=len(a)).unsqueeze(1)
            return (((x @ a.T).float() * own).to(x.dtype) @ b.T).float()
        rows = a.shape[1] if transposed else len(b)
        y = x.new_zeros((), dtype=torch.float32)
        for e, factors in enumerate(zip(a.split(self.ranks), b.split(self.ranks, 1), strict=True)):
            y = y + weighted(x, weights[:, e], rows, transposed, factors)
        return y

    def part(self, first: int, last: int) -> SideBySide:
        """Of outputs first .. last."""
        return SideBySide(self.a, self.b[first:last], self.ranks, self.planes)


def weighted(x: Tensor, weight: Tensor, rows: int, transposed: bool, factors: Sequence[Tensor]) -> Tensor:
    """One plane's share of a layer's output, float32 [B, P, O]: coefficients of outputs weigh them, of inputs those.

    Args:
        x: the inputs [B, P, I].
        weight: the plane's [B], [B, rows] or [B, rows + columns].
        rows: of the weight as it is stored.
        transposed: whether rows are the inputs and columns the outputs.
        factors: the matrices that x is multiplied by, transposed, one after the other: [O, I], or those of a plane of
            low rank [R, I] and [O, R].
    """

    def products(x: Tensor) -> Tensor:
        return reduce(product, factors, x)

    if weight.dim() == 1:
        return weight.view(-1, 1, 1) * products(x).float()
    sides = [
        part.unsqueeze(1) for part in weight.tensor_split([rows], 1)
    ]  # [B, 1, rows], [B, 1, columns or 0]
    ins, outs = sides if transposed else sides[::-1]
    y = x.new_zeros((), dtype=torch.float32)
    if outs.shape[2]:
        y = y + outs * products(x).float()
    if ins.shape[2]:
        y = y + products((ins * x.float()).to(x.dtype)).float()
    return y


class LowRankWeight:
    """One weight for the whole batch whose planes are all of low rank; a `MixedWeight` that mixes nothing.

    The base is multiplied where it lies. The gradient of the routing weights needs none of the weight's, as autograd
    finds by itself: <dLoss/dW, B A> is the sum over tokens of (g B) . (x A^T).

    Args:
        base: [O, I], or [I, O] if transposed.
        planes: the low-rank ones, by their number.
        mix, spans, transposed: as `RoutedWeight` takes them.
    """

    def __init__(
        self,
        base: Tensor,
        planes: SideBySide,
        mix: Tensor,
        spans: Spans,
        transposed: bool,
    ) -> None:
        self.base, self.planes, self.mix, self.spans = base, planes, mix, spans
        self.transposed = transposed

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """[..., I] -> [..., O], differentiable in x, the routing weights and the bias.

        Products are computed in x's dtype and added in float32.
        """
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        base = (self.base.T if self.transposed else self.base).to(x.dtype)  # [O, I]
        weights = coefficients(self.mix, self.spans).unsqueeze(0)  # [1, P], or with those of rows and columns
        with torch.autocast(x.device.type, enabled=False):
            rows = x.reshape(1, -1, x.shape[-1])
            y = (rows @ base.T).float() + self.planes.product(rows, weights, self.transposed)
            y = y if bias is None else y + bias.float()
        return y.to(x.dtype).view(*x.shape[:-1], len(base))

    def part(self, first: int, last: int) -> LowRankWeight:
        """The weight of outputs first .. last, as a view; not of a transposed weight."""
        planes, spans = self.planes.part(first, last), self.spans.part(first, last)
        return LowRankWeight(self.base[first:last], planes, self.mix, spans, False)

    def dense(self) -> Tensor:
        """[O, I], mixed anew each time, differentiable in the routing weights."""
        eye = torch.eye(self.base.shape[0 if self.transposed else 1], device=self.base.device)
        weights = coefficients(self.mix, self.spans).unsqueeze(0)
        base = self.base.T if self.transposed else self.base
        added = self.planes.product(eye.unsqueeze(0), weights, self.transposed)[0].T  # [O, I]
        return (base.float() + added).to(self.base.dtype)
