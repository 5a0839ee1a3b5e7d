"""RegMean: a merge of linear layers that gives nearly what each expert gives on its own inputs (arXiv 2212.09849).

    delta = (sum_k D_k G_k) (sum_k G_k)^-1      D_k [O, I] what expert k adds,
                                                G_k [I, I] the mean of x x^T over the inputs x of the layer in expert k,
                                                its elements off the diagonal times `scale`

It is the least-squares solution of delta x = D_k x over all experts' inputs, exactly so with scale=1; a smaller scale
keeps it from leaning on correlations that a few batches show by chance. The paper's formula is of the weights W0 + D_k;
W0 falls out of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

RIDGE = 1e-6
"""Times the mean diagonal of sum G_k, weight of the experts' mean: it decides where no input was ever active."""


class Inputs:
    """Sums over the inputs of one layer.

    Attributes:
        products: sum of x x^T, float32 [I, I]; None before the first input.
        count: how many x.
    """

    def __init__(self) -> None:
        self.products: Tensor | None = None
        self.count = 0

    def take(self, x: Tensor) -> None:
        """Inputs [..., I]."""
        rows = torch.atleast_2d(x.detach()).flatten(0, -2).to(torch.float32)
        if self.products is None:
            self.products = rows.new_zeros(rows.shape[1], rows.shape[1])
        self.products.addmm_(rows.T, rows)
        self.count += len(rows)

    def gram(self, scale: float) -> Tensor | None:
        """G of the head of this file, float32 on the CPU; None where the layer never ran."""
        if self.products is None or self.count == 0:
            return None
        gram = self.products.cpu() / self.count
        return torch.where(torch.eye(len(gram), dtype=torch.bool), gram, scale * gram)


@contextmanager
def inputs_of(layers: Iterable[nn.Module]) -> Iterator[dict[nn.Module, Inputs]]:
    """While it lasts, what these layers are given is summed up."""
    found = {layer: Inputs() for layer in layers}

    def watch(layer: nn.Module, args: Any, named: dict[str, Any]) -> None:
        found[layer].take(args[0] if args else next(iter(named.values())))

    handles = [layer.register_forward_pre_hook(watch, with_kwargs=True) for layer in found]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class RegMean:
    """The formula at the head of this file for one weight, expert by expert.

    Attributes:
        total: sum of G_k so far, float32 [I, I].
        weighted: sum of D_k G_k, float32 [O, I].
    """

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        self.weighted: Tensor | float = 0.0

    def add(self, delta: Tensor, gram: Tensor) -> None:
        """One expert's D [O, I] and G [I, I]."""
        self.total = self.total + gram
        self.weighted = self.weighted + delta @ gram

    def solve(self, mean: Tensor) -> Tensor:
        """The merged difference, float64 [O, I]; where no input was active, the experts' mean [O, I]."""
        mean = mean.double()
        if isinstance(self.total, float) or isinstance(self.weighted, float):
            return mean
        total, weighted = self.total.double(), self.weighted.double()
        size = float(total.diagonal().mean())
        if not size > 0:
            return mean
        total.diagonal().add_(RIDGE * size)
        solved: Tensor = torch.linalg.solve(total, weighted + RIDGE * size * mean, left=False)
        return solved
