"""Routers: one tiny MLP for each group, all groups evaluated at once.

    L(r) = init(r) + W2 relu(W1 r + b1) + b2        W1 [G, H, E], b1 [G, H], W2 [G, E, H], b2 [G, E], H = 2 E

"identity" starts at L = r, so that a one-hot preference starts as exactly that expert; "sqrt" at L = sqrt(r). Both
keep the MLP's last layer at zero. "constant" is PWEMoE's own start (Tang et al., arXiv 2406.09770): no residual, all
weights drawn with standard deviation 0.01 and the last bias at the task-arithmetic coefficient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from paretofuse.engine.routing.preference import as_preference, is_grid

INITS = ("identity", "sqrt", "constant")
"""What the MLP's output is added to: the preference r, its square root, or nothing."""


def check_init(init: str) -> None:
    """ValueError unless it is one of INITS."""
    if init not in INITS:
        raise ValueError(f"got init={init!r}, expected one of {', '.join(INITS)}")


class GroupedLinear(nn.Module):
    """A linear map for each group: weight [G, out, in], bias [G, out]."""

    def __init__(self, groups: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(groups, outputs, inputs, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(groups, outputs, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """[..., G or 1, in] -> [..., G, out], computed in the dtype of x."""
        product: Tensor = self.weight.to(x.dtype) @ x.unsqueeze(-1)
        return product.squeeze(-1) + self.bias.to(x.dtype)


class Routers(nn.Module):
    """All routers of an engine; the only trained parameters, a few hundred numbers.

    Args:
        groups: names of the routing groups, G of them.
        objectives: names of the objectives, E of them.
        init: "identity", "sqrt" or "constant".
        constant: start value of every weight for init "constant".
        seed: seed of the initial values; they do not touch torch's global random state.
    """

    def __init__(
        self,
        groups: Sequence[str],
        objectives: Sequence[str],
        init: str = "identity",
        *,
        constant: float = 0.3,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_init(init)
        self.groups = tuple(groups)
        self.objectives = tuple(objectives)
        self.init = init
        self.constant = constant
        count, hidden = len(self.objectives), 2 * len(self.objectives)
        self.hidden = GroupedLinear(len(self.groups), count, hidden)
        self.output = GroupedLinear(len(self.groups), hidden, count)
        self.reset(seed)

    @torch.no_grad()
    def reset(self, seed: int = 0) -> None:
        """Draw the initial values anew."""
        generator = torch.Generator().manual_seed(seed)
        if self.init == "constant":
            for layer in (self.hidden, self.output):
                draw = torch.randn(layer.weight.shape, generator=generator, dtype=torch.float32)
                layer.weight.copy_(0.01 * draw)
            self.hidden.bias.zero_()
            self.output.bias.fill_(self.constant)
            return
        bound = 1 / math.sqrt(len(self.objectives))
        for tensor in (self.hidden.weight, self.hidden.bias):
            draw = torch.rand(tensor.shape, generator=generator, dtype=torch.float32)
            tensor.copy_((2 * draw - 1) * bound)
        self.output.weight.zero_()
        self.output.bias.zero_()

    def forward(self, preference: Tensor | np.ndarray | Sequence[float] | Mapping[str, float]) -> Tensor:
        """Routing weights of one preference or of several.

        Computed in float64 and rounded once. The torch-free implementation and C++ give the same bits as each other;
        PyTorch may sum in another order, so a number of this one may differ from theirs in its last bit.

        Args:
            preference: [E], or a tensor or array [K, E], or a dict by objective name; non-negative, each row summing
                to 1.

        Returns:
            float32 [G, E] or [K, G, E].

        Raises:
            ValueError: a preference is not valid.
        """
        if is_grid(preference):
            if len(preference) == 0:
                raise ValueError("got no preferences [0, E], expected at least one")
            several: Any = preference
            rows = np.stack([as_preference(row, self.objectives) for row in several])
        else:
            rows = as_preference(preference, self.objectives)
        r = torch.from_numpy(rows).to(self.output.bias.device).unsqueeze(-2)
        weights: Tensor = self.output(torch.relu(self.hidden(r)))
        if self.init == "identity":
            weights = weights + r
        elif self.init == "sqrt":
            weights = weights + r.sqrt()
        return weights.to(torch.float32)

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"groups={len(self.groups)}, objectives={list(self.objectives)}, init={self.init!r}"
