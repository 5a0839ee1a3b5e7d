"""Small models for the tests, with everything that makes merging hard."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """Bare parameter, BatchNorm, tied weights, an integer buffer, a scalar buffer, and one that is not stored."""

    steps: Tensor
    scale: Tensor
    offset: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 8))
        self.first = nn.Linear(8, 16)
        self.norm = nn.BatchNorm1d(16)
        self.second = nn.Linear(16, 8)
        self.tied = nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 8, bias=False)
        self.head.weight = self.tied.weight
        self.register_buffer("steps", torch.tensor([3, 4]))
        self.register_buffer("scale", torch.tensor(2.0))
        self.register_buffer("offset", torch.ones(8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.norm(self.first(x + self.token)))
        return self.head(self.tied(self.second(hidden)) + self.offset)


def perturbed(model: nn.Module, seed: int, size: float = 0.1) -> nn.Module:
    """A copy with every parameter and float buffer moved."""
    generator = torch.Generator().manual_seed(seed)
    expert = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in {id(t): t for t in [*expert.parameters(), *expert.buffers()]}.values():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.add_((size * noise.abs() if tensor.dim() == 1 else size * noise).to(tensor.dtype))
    return expert


def net_and_experts(seed: int = 0, count: int = 3) -> tuple[Net, dict[str, nn.Module]]:
    """A base and its experts a, b, c, ..."""
    torch.manual_seed(seed)
    base = Net().eval()
    return base, {"abcdefghijklmnopqrstuvwxyz"[i]: perturbed(base, seed * 100 + i + 1) for i in range(count)}


def tiny_gpt2(seed: int = 0, positions: int = 16) -> nn.Module:
    """A GPT-2 of 30 k parameters with tied embeddings."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        n_layer=2, n_embd=32, n_head=2, vocab_size=101, n_positions=positions, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config).eval()


def same(a: nn.Module, b: nn.Module) -> bool:
    """Whether two modules' state dicts are equal bit for bit."""
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)
