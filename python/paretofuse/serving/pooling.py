"""How an encoder's states become embeddings: as sentence-transformers' files say, where the store has them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MODES = ("mean", "cls", "max", "lasttoken")


@dataclass(frozen=True)
class Pooling:
    """What follows an encoder.

    Attributes:
        mode: of `MODES`: the mean over tokens, the first token's state, the largest of each, or the last token's.
        normalizes: whether embeddings have length 1.
    """

    mode: str = "mean"
    normalizes: bool = False

    def __call__(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """Embeddings [B, D] of states [B, T, D], or of the [B, D, H, W] of convolutional encoders.

        Args:
            states: the encoder's.
            mask: which tokens are there, [B, T], padded on the right; None where all are.
        """
        if states.dim() == 4:
            return states.flatten(2).mean(2)
        if self.mode == "cls":
            return states[:, 0]
        there = torch.ones(states.shape[:2], device=states.device) if mask is None else mask
        if self.mode == "lasttoken":
            last = there.sum(1).long().clamp(min=1) - 1
            return states[torch.arange(len(states), device=states.device), last]
        if self.mode == "max":
            return states.masked_fill(there.unsqueeze(-1) == 0, -torch.inf).amax(1)
        weights = there.unsqueeze(-1).to(states.dtype)
        return (states * weights).sum(1) / weights.sum(1).clamp(min=1)


def pooling_of(files: Mapping[str, bytes]) -> Pooling:
    """What a directory's modules.json and its pooling's config.json say; the mean where there are none.

    Raises:
        ValueError: a module or a way of pooling is not known here.
    """
    modules = [_Module.of(own) for own in json.loads(files.get("modules.json", b"[]"))]
    for module in modules:
        if module.kind not in ("Transformer", "Pooling", "Normalize"):
            raise ValueError(
                f"got modules.json with a {module.kind} ({module.path}), expected a Transformer, a Pooling and a "
                "Normalize at most: embeddings would be without it; give a function that computes them, predict="
            )
    folder = next((module.path for module in modules if module.kind == "Pooling"), "1_Pooling")
    config = json.loads(files.get(f"{folder}/config.json", b"{}"))
    normalizes = any(module.kind == "Normalize" for module in modules)
    return Pooling(_mode(config, folder), normalizes)


@dataclass(frozen=True)
class _Module:
    kind: str
    path: str

    @staticmethod
    def of(entry: Mapping[str, Any]) -> _Module:
        return _Module(str(entry["type"]).rpartition(".")[2], str(entry["path"]))


def _mode(config: Mapping[str, Any], folder: str) -> str:
    """The one way of pooling; files before sentence-transformers 6 say true or false of each."""
    old = {"lasttoken": "lasttoken", "cls_token": "cls", "max_tokens": "max", "mean_tokens": "mean"}
    chosen = [
        old.get(key.removeprefix("pooling_mode_"), key.removeprefix("pooling_mode_"))
        for key, value in config.items()
        if key.startswith("pooling_mode_") and value is True
    ]
    found = config.get("pooling_mode", chosen or ["mean"])
    modes = [found] if isinstance(found, str) else list(found)
    if len(modes) != 1 or modes[0] not in MODES:
        raise ValueError(
            f"got {folder}/config.json with the pooling {', '.join(map(str, modes))}, expected one of "
            f"{', '.join(MODES)}; give a function that computes embeddings, predict="
        )
    return str(modes[0])
