"""A model for the tests of `paretofuse export`, and example inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Small(nn.Module):
    """All that a compiler likes to write into its code: short vectors, a scalar, ones, a buffer that is not stored."""

    steps: Tensor
    offset: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.norm = nn.LayerNorm(16)
        self.last = nn.Linear(16, 4)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("steps", torch.tensor([3, 4]))
        self.register_buffer("offset", torch.arange(16.0) / 16, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(torch.relu(self.first(x))) + self.offset
        return self.scale * self.last(hidden) + self.steps[0]


def example() -> tuple[Tensor]:
    return (torch.zeros(2, 8),)
