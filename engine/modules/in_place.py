"""The modules that an engine merges in place: the live one, and the fused one that trains layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paretofuse.engine.merging.bound import BoundStack
from paretofuse.engine.modules.captured import CapturedSwitch, one_gpu
from paretofuse.engine.modules.factory import live_module, routed_names
from paretofuse.engine.modules.heads import bind_heads
from paretofuse.engine.modules.live import LiveModule
from paretofuse.engine.modules.replicas import Merge
from paretofuse.engine.modules.routed.fuse import fused_layers
from paretofuse.engine.modules.sketched import nothing_to_sketch, sketch_layers
from paretofuse.engine.planes.trained import trained_planes
from paretofuse.engine.routing.preference import Preference, as_preference, is_grid
from paretofuse.engine.routing.routers import Routers
from paretofuse.engine.routing.weights import check_one, routing_at, routing_of
from paretofuse.engine.stacking.sources import Blueprint


class InPlaceModules:
    """Both modules, each built when first asked for, and what the live one is merged for.

    Attributes:
        at_weights: whether the live module was merged for given weights.
    """

    def __init__(self, bound: BoundStack, blueprint: Blueprint, routers: Routers) -> None:
        self._bound = bound
        self._blueprint = blueprint
        self._routers = routers
        self._live: LiveModule | None = None
        self._fused: LiveModule | None = None
        self._sketch_rank: int | None = None  # that the fused one is to have
        self._fused_for: tuple[int, int | None] | None = None
        self._trained: LiveModule | None = None
        self._merged_for: np.ndarray | None = None
        self.at_weights = False

    @property
    def preference(self) -> dict[str, float] | None:
        """Of the live module, by objective; None before a switch, and after given weights."""
        if self._merged_for is None:
            return None
        return dict(zip(self._routers.objectives, self._merged_for.tolist(), strict=True))

    @property
    def built(self) -> bool:
        """Whether anybody asked for the live module."""
        return self._live is not None

    def live(self) -> LiveModule:
        """The live module, at equal preferences when it is built."""
        if self._live is None:
            self._live = self.build()
        return self._live

    def fused(self) -> LiveModule:
        """The fused one; built anew, in the same training mode, where routers or sketches are others since."""
        wanted = self._routers.width, self._sketch_rank
        if self._fused is None or self._fused_for != wanted:
            before = [] if self._fused is None else [part.training for part in self._fused.module.modules()]
            self._fused, self._fused_for = self.build(fused=True), wanted
            for part, training in zip(self._fused.module.modules(), before, strict=False):
                part.training = training
        return self._fused

    @contextmanager
    def sketched(self, rank: int, *, materialize: bool) -> Iterator[None]:
        """While it lasts, sketches stand in for planes where linear layers of the live module, or the fused one, learn.

        Raises:
            ValueError: there are no such layers, or the fused ones have no sketches.
        """
        routed = routed_names(self._bound)
        if materialize:
            live = self.live()
            handles = sketch_layers(live.module, routed, self._bound, live.collector, rank)
        elif not fused_layers(self._blueprint.make(), routed):
            raise nothing_to_sketch(rank)
        else:
            handles, self._sketch_rank = [], rank
        try:
            yield
        finally:
            self._sketch_rank = None
            for handle in handles:
                handle.remove()

    def switch(self, preference: Preference | None, weights: Tensor | None) -> None:
        """Rewrite the live module for a preference, or for given routing weights.

        Raises:
            ValueError: neither or both are given, they are not valid, or are several.
        """
        if preference is None or weights is not None or is_grid(preference):
            self.live().switch(check_one(routing_of(self._routers, preference, weights)))
            one: Any = preference
            self.note(as_preference(one[0], self._routers.objectives) if is_grid(one) else None)
            return
        numbers = as_preference(preference, self._routers.objectives)
        self.live().switch(routing_at(self._routers, numbers).unsqueeze(0))
        self.note(numbers)

    def warmup(self) -> None:
        """Do all that a switch does, but merge the live module as it is."""
        routing_at(self._routers, as_preference(self._equal(), self._routers.objectives))
        self.live().merge_again(self._routers.width)

    def capture(self, in_use: Callable[[], bool]) -> CapturedSwitch:
        """A switch of the live module as a CUDA graph; the module stays merged for what it is.

        Args:
            in_use: whether these modules still are the engine's.

        Raises:
            ValueError: the model is not merged by the kernels of one GPU.
        """
        device = one_gpu(self._bound.backends)
        return CapturedSwitch(self.live(), self._routers, device, in_use, self.note)

    def train_at(self, preference: Preference, *, materialize: bool) -> Tensor:
        """Merge one of them and let gradients flow from it into the routers; the weights, part of their graph.

        Raises:
            ValueError: the preference is not valid.
        """
        if torch.is_inference_mode_enabled():
            raise ValueError(
                "got train_at inside torch.inference_mode(), which records no gradients; leave it first"
            )
        module = self.live() if materialize else self.fused()
        weights: Tensor = self._routers(preference)
        if weights.dim() != 2:
            raise ValueError(
                f"got preferences of shape {list(weights.shape[:-2])} x M, expected one of shape [M]"
            )
        module.write(weights.detach().unsqueeze(0))
        module.collector.arm(weights, trained_planes(self._routers))
        if materialize:
            self.note(as_preference(preference, self._routers.objectives))
        self._trained = module
        return weights

    def jacobian(self, losses: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Gradients [M, G, P] (or G + R, G + R + C) of losses of the module trained last, and [M, F] of all factors.

        Raises:
            ValueError: a loss is not a scalar, or nothing was trained.
        """
        return (self._trained or self.live()).collector.jacobian(losses)

    def replica_of(self, preference: Preference, head: str | None) -> Merge:
        """What a replica holds for a preference, as the routers are now.

        Raises:
            ValueError: the preference is not valid, or the objective has no head.
        """
        self._bound.stack.head(head)
        numbers = as_preference(preference, self._routers.objectives)
        versions = tuple((p.data_ptr(), p._version) for p in self._routers.parameters())
        return Merge(
            (numbers.tobytes(), versions),
            lambda: routing_at(self._routers, numbers).unsqueeze(0),
            lambda weights: self.build(weights=weights),
            head,
        )

    def build(self, *, fused: bool = False, weights: Tensor | None = None) -> LiveModule:
        """A module with its heads, apart from those kept here; at equal preferences unless weights are given."""
        if weights is None:
            weights = routing_of(self._routers, self._equal(), None)
        live = live_module(
            self._bound, self._blueprint.make(), weights, fused=fused, sketch_rank=self._sketch_rank
        )
        bind_heads(live.module, self._bound.stack.heads, self._blueprint)
        return live

    def _equal(self) -> list[float]:
        return [1 / len(self._routers.objectives)] * len(self._routers.objectives)

    def note(self, preference: np.ndarray | None) -> None:
        """Take down what the live module is merged for, a checked preference or given weights."""
        self.at_weights, self._merged_for = preference is None, preference
