"""A small vision transformer in plain PyTorch, for 28 x 28 grey images: about 200 thousand parameters.

Written the usual pre-norm way, so that a router meets everything a large model has: attention and MLP blocks,
norms, and bare parameters (class token and positional embedding).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Multi-head self-attention.

    Args:
        dim: width of a token.
        heads: number of heads; divides `dim`.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Mix the tokens [B, T, dim] of each image; same shape back."""
        batch, count, dim = tokens.shape
        qkv = self.qkv(tokens).view(batch, count, 3, self.heads, dim // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, T, dim / heads]
        mixed = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, count, dim))
        return out


class Mlp(nn.Module):
    """Two linear layers with a GELU between them, `dim -> hidden -> dim`."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Transform each token of [B, T, dim] on its own; same shape back."""
        out: Tensor = self.fc2(F.gelu(self.fc1(tokens)))
        return out


class Block(nn.Module):
    """One transformer layer: attention, then MLP, each after a norm and added to its input."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Apply the layer to [B, T, dim]; same shape back."""
        tokens = tokens + self.attn(self.norm1(tokens))
        out: Tensor = tokens + self.mlp(self.norm2(tokens))
        return out


class TinyViT(nn.Module):
    """A vision transformer with one 10-way head.

    Args:
        dim: width of a token.
        depth: number of layers.
        heads: attention heads in a layer.
        patch: side of a square patch, in pixels; divides 28.
        classes: number of classes.
    """

    def __init__(
        self, dim: int = 64, depth: int = 4, heads: int = 4, patch: int = 7, classes: int = 10
    ) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(1, dim, kernel_size=patch, stride=patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(torch.empty(1, (28 // patch) ** 2 + 1, dim))
        nn.init.trunc_normal_(self.positions, std=0.02)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Class logits [B, classes] of float images [B, 1, 28, 28]."""
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)  # [B, T - 1, dim]
        tokens = torch.cat([self.class_token.expand(len(images), -1, -1), patches], dim=1) + self.positions
        for block in self.blocks:
            tokens = block(tokens)
        logits: Tensor = self.head(self.norm(tokens[:, 0]))
        return logits


def classify(module: nn.Module, image: list[list[float]]) -> list[float]:
    """The probabilities of the classes, as `paretofuse serve --predict` asks for them.

    Args:
        module: a merged model.
        image: 28 rows of 28 brightnesses from 0 to 255, the ink bright.

    Raises:
        ValueError: not such rows.
    """
    try:
        pixels = torch.tensor(image, dtype=torch.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"got an image that is no table of numbers ({error}), expected 28 rows of 28"
        ) from None
    if pixels.shape != (28, 28):
        raise ValueError(
            f"got an image of shape {list(pixels.shape)}, expected 28 rows of 28 numbers, 0 to 255"
        )
    probabilities: list[float] = module(pixels.view(1, 1, 28, 28) / 127.5 - 1).softmax(1)[0].tolist()
    return probabilities
