"""Modules for many preferences, one after the other: merged several at once, and while others are in use.

Two banks of K modules take turns: the caller uses one while a thread merges the other. A merge of K reads base and
deltas once, so that it moves (1 + P + K) / K tensors for each preference instead of 2 + P. With K = 1 the live module
can be one of the two banks: making one takes as long as several merges, for the memory it touches first.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from paretofuse.engine.merging.bound import BoundStack
from paretofuse.engine.modules.factory import module_bank
from paretofuse.engine.modules.heads import bind_heads
from paretofuse.engine.modules.in_place import InPlaceModules
from paretofuse.engine.modules.replicas import Fence
from paretofuse.engine.routing.preference import is_grid
from paretofuse.engine.routing.routers import Routers
from paretofuse.engine.routing.weights import routing_of
from paretofuse.engine.stacking.sources import Blueprint


class Ahead:
    """Makes a module for each of many preferences; both banks are made when first needed, and kept for later calls.

    Args:
        bound: the stack.
        blueprint: builds the modules.
        routers: give the routing weights.
        at_once: how many are merged in one pass, K.
        live: whose live module is one of the two banks, at the last preference in the end; None for both to be new.

    Raises:
        ValueError: K is no whole number of at least 1, or not 1 with the live module, or the tensors are one process's
            shards.
    """

    def __init__(
        self,
        bound: BoundStack,
        blueprint: Blueprint,
        routers: Routers,
        at_once: int,
        live: InPlaceModules | None = None,
    ) -> None:
        bound.check_whole("modules merged ahead")
        if isinstance(at_once, bool) or not isinstance(at_once, int) or at_once < 1:
            raise ValueError(f"got at_once={at_once!r}, expected a whole number of at least 1")
        if live is not None and at_once != 1:
            raise ValueError(
                f"got at_once={at_once} with live=True, expected 1: the live module is one module"
            )
        self._bound = bound
        self._blueprint = blueprint
        self._routers = routers
        self._at_once = at_once
        self._live = live
        self._banks: list[Bank | LiveBank | None] = [None, None]

    def modules(self, preferences: Any) -> Generator[nn.Module, None, None]:
        """A module for each preference [P, M], in their order; each is valid until the next is asked for.

        Let one iterator end, or close it, before the next begins.

        Raises:
            ValueError: a preference is not valid; or later: the caller has moved a module, or replaced its tensors.
        """
        weights = routing_of(self._routers, preferences, None)  # [P, G, planes], or with row coefficients
        blocks = weights.split(self._at_once)
        if self._live is not None:
            last = (len(blocks) - 1) % 2
            several = preferences if is_grid(preferences) else [preferences]
            self._banks[last] = LiveBank(self._live, iter(several[last::2]), weights.device)
        return self._take_turns(blocks)

    def _take_turns(self, blocks: Sequence[Tensor]) -> Generator[nn.Module, None, None]:
        # Making a model of some libraries' classes changes global state: the thread only copies it.
        skeleton = self._blueprint.make()
        with ThreadPoolExecutor(1, "paretofuse-ahead") as thread:
            merged = thread.submit(self._merged, 0, skeleton, blocks[0])
            for number, block in enumerate(blocks):
                bank = merged.result()
                if number + 1 < len(blocks):
                    merged = thread.submit(self._merged, (number + 1) % 2, skeleton, blocks[number + 1])
                for module in bank.modules[: len(block)]:
                    with bank.fence.reading():
                        yield module

    def _merged(self, turn: int, skeleton: nn.Module, weights: Tensor) -> Bank | LiveBank:
        """One of the banks, merged; made for as many modules as it is first asked for, and anew for more."""
        bank = self._banks[turn]
        if bank is None or len(bank.modules) < len(weights):
            bank = Bank(self._bound, self._blueprint, skeleton, weights)
        self._banks[turn] = None  # until it is merged: one whose modules were moved is made anew
        bank.merge(weights)
        self._banks[turn] = bank
        return bank


class Bank:
    """K modules that are merged in one pass.

    Args:
        bound, blueprint: of the modules.
        skeleton: the blueprint's.
        weights: [K, G, E], of which the number counts.
    """

    def __init__(self, bound: BoundStack, blueprint: Blueprint, skeleton: nn.Module, weights: Tensor) -> None:
        self.fence = Fence(weights.device)
        self._lives, self._merge = module_bank(bound, skeleton, weights)
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


class LiveBank:
    """The live module as a bank of one.

    Args:
        live: has the live module, and knows what it is merged for.
        preferences: of its turns.
        device: of the weights.
    """

    def __init__(self, live: InPlaceModules, preferences: Iterator[Any], device: torch.device) -> None:
        self.fence = Fence(device)
        self._live = live
        self._preferences = preferences
        self.modules = [live.live().module]
        with self.fence.reading():  # what the caller has queued on it comes before the first merge
            pass

    def merge(self, weights: Tensor) -> None:
        """Merge at its next preference, whose weights these are."""
        with self.fence.writing():
            self._live.switch(next(self._preferences), None)
