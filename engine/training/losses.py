"""Losses that need no labels."""

from __future__ import annotations

import torch
from torch import Tensor


def entropy_loss(logits: Tensor) -> Tensor:
    """How unsure predictions are: the mean entropy of softmax(logits), in nats; needs no labels.

    AdaMerging (Yang et al., arXiv 2310.02575) minimizes it on unlabelled inputs to choose merging coefficients. A class
    that is ruled out may have -inf.

    Args:
        logits: [..., C], of C classes or tokens, floating point.

    Returns:
        A scalar of their dtype, from 0 (sure) to log(C).

    Raises:
        ValueError: there are no logits.
        TypeError: they are no tensor.
    """
    if not isinstance(logits, Tensor):
        raise TypeError(f"got {type(logits).__name__}, expected a tensor such as module(batch).logits")
    if logits.ndim == 0 or logits.numel() == 0:
        raise ValueError(
            f"got logits of shape {list(logits.shape)}, expected [..., classes] with at least one row"
        )
    mean: Tensor = torch.distributions.Categorical(logits=logits, validate_args=False).entropy().mean()
    return mean
