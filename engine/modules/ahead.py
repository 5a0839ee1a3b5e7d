"""Modules for many preferences, one after the other: merged several at once, and while others are in use.

Two banks of K modules take turns: the caller uses one while a thread merges the other. A merge of K reads base and
deltas once, so that it moves (1 + P + K) / K tensors for each preference instead of 2 + P.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from paretofuse.engine.merging.bound import BoundStack
from paretofuse.engine.modules.factory import module_bank
from paretofuse.engine.modules.heads import bind_heads
from paretofuse.engine.modules.replicas import Fence
from paretofuse.engine.stacking.sources import Blueprint


def merged_ahead(
    bound: BoundStack, blueprint: Blueprint, weights: Tensor, at_once: int
) -> Iterator[nn.Module]:
    """A module for each of the routing weights, in their order; each is valid until the next is asked for.

    Args:
        bound: the stack.
        blueprint: builds the modules.
        weights: [K, G, P], or with row coefficients [K, G + R, P].
        at_once: how many are merged in one pass, K.

    Raises:
        ValueError: K is no whole number of at least 1, or the tensors are one process's shards; or later: the caller
            has moved a module, or replaced its tensors.
    """
    bound.check_whole("modules merged ahead")
    if isinstance(at_once, bool) or not isinstance(at_once, int) or at_once < 1:
        raise ValueError(f"got at_once={at_once!r}, expected a whole number of at least 1")
    blocks = list(weights.split(min(at_once, len(weights))))
    return _take_turns(bound, blueprint, blocks)


def _take_turns(bound: BoundStack, blueprint: Blueprint, blocks: list[Tensor]) -> Iterator[nn.Module]:
    banks = [Bank(bound, blueprint, block) for block in blocks[:2]]
    with ThreadPoolExecutor(1, "paretofuse-ahead") as thread:
        merged = thread.submit(banks[0].merge, blocks[0])
        for number, block in enumerate(blocks):
            merged.result()
            if number + 1 < len(blocks):
                merged = thread.submit(banks[(number + 1) % 2].merge, blocks[number + 1])
            bank = banks[number % 2]
            for module in bank.modules[: len(block)]:
                with bank.fence.reading():
                    yield module


class Bank:
    """K modules that are merged in one pass.

    Args:
        bound, blueprint: of the modules.
        weights: [K, G, E], of which the number counts.
    """

    def __init__(self, bound: BoundStack, blueprint: Blueprint, weights: Tensor) -> None:
        self.fence = Fence(weights.device)
        self._lives, self._merge = module_bank(bound, blueprint.make(), weights)
        self._count = len(weights)
        self.modules = [live.module for live in self._lives]
        for module in self.modules:
            bind_heads(module, bound.stack.heads, blueprint)

    def merge(self, weights: Tensor) -> None:
        """Merge at weights of at most K preferences."""
        lacking = self._count - len(weights)
        whole = torch.cat([weights, weights[-1:].expand(lacking, *weights.shape[1:])]).contiguous()
        for live in self._lives:
            live.check()
        with self.fence.writing():
            self._merge(whole)
            for live, own in zip(self._lives, whole.split(1), strict=True):
                live.write(own)
