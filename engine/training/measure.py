"""What a router step measures: each objective's loss, and its gradient in all that is trained."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from paretofuse.engine.distributed import rank_and_size, sum_over_ranks
from paretofuse.engine.engine import Engine
from paretofuse.engine.evaluation.objective import Objective
from paretofuse.engine.modules.heads import with_head
from paretofuse.engine.planes.trained import trained_planes
from paretofuse.engine.training.batches import Batches
from paretofuse.engine.training.captured import CapturedMeasure


class Trained:
    """The module that a run trains through, as a sweep wants to see it.

    Args:
        engine: the engine.
        materialize: whether that is the live module, or the one that stores no merged weights.
    """

    def __init__(self, engine: Engine, materialize: bool) -> None:
        self.engine = engine
        self._materialize = materialize
        self.objectives = engine.objectives

    @property
    def module(self) -> nn.Module:
        """The module."""
        return self.engine.module if self._materialize else self.engine.fused_module

    def train_at(self, preference: Tensor) -> None:
        """Merge at a preference, for training."""
        self.engine.train_at(preference, materialize=self._materialize)

    def switch(self, preference: Sequence[float], /) -> None:
        """Merge at a preference, for evaluation."""
        if self._materialize:
            self.engine.switch(preference)
        else:
            self.engine.train_at(preference, materialize=False)


class Measuring:
    """Measures at preferences, on batches that it draws.

    Args:
        trained: the module.
        objectives: in the engine's order.
        streams: their batches.
        count: batches of each objective for each preference (`accumulate`).
        capture: whether all measurements but the first are replays of a CUDA graph.
    """

    def __init__(
        self,
        trained: Trained,
        objectives: Sequence[Objective],
        streams: Sequence[Batches],
        count: int,
        *,
        capture: bool,
    ) -> None:
        self._trained, self._engine = trained, trained.engine
        self._objectives, self._streams, self._count = objectives, streams, count
        self._planes = trained_planes(self._engine.routers)
        self._replays = False
        self._capture = capture
        self._captured: CapturedMeasure | None = None

    def at(self, ray: Tensor) -> tuple[Tensor, Tensor]:
        """Losses [M] and Jacobian at one preference: means over `count` batches, float64 on the CPU.

        The Jacobian is [M, *L.shape]; with trained planes [M, 1, D], all of L first and then all factors.

        Several processes take the batches in turn, and sum; the result does not depend on how many they are.
        """
        sums = self._replayed(ray) if self._replays else self._computed(ray)
        self._replays = self._capture
        sums = sum_over_ranks(sums, "training")
        shape = self._engine.routers.width, len(self._engine.layout.members)
        return sums[:, 0], sums[:, 1:].reshape(
            -1, *(shape if self._planes is None else (1, sums.shape[1] - 1))
        )

    def _computed(self, ray: Tensor) -> Tensor:
        """[M, 1 + D], this process's share."""
        module = self._trained.module
        self._trained.train_at(ray)
        length = self._engine.routers.width * len(self._engine.layout.members)
        length += 0 if self._planes is None else self._planes.size
        sums = torch.zeros(len(self._objectives), 1 + length, dtype=torch.float64)
        for row, objective, stream in zip(sums, self._objectives, self._streams, strict=True):
            for batch in self._own(stream):
                loss = objective.loss(with_head(module, objective.name), batch)
                _check_loss(loss, objective.name)
                row[0] += loss.item() / self._count
                row[1:] += self._jacobian(loss / self._count, objective.name)
        return sums

    def _replayed(self, ray: Tensor) -> Tensor:
        """What `_computed` says, from a CUDA graph that is captured when first asked for."""
        sums = []
        for batches in zip(*map(self._own, self._streams), strict=True):
            if self._captured is None:
                self._captured = CapturedMeasure(self._engine, self._objectives, batches, self._count)
            sums.append(self._captured.measure(ray.numpy(), batches))
            for loss, objective in zip(sums[-1][:, 0].tolist(), self._objectives, strict=True):
                _check_finite(loss, objective.name)
        return torch.stack(sums).sum(0)

    def _own(self, stream: Batches) -> Iterator[Any]:
        """This process's batches of a measurement; every process draws all, so that streams stand at the same place."""
        rank, size = rank_and_size()
        for index in range(self._count):
            batch = stream.take()
            if index % size == rank:
                yield batch

    def _jacobian(self, loss: Tensor, name: str) -> Tensor:
        """One loss's gradient in L and the trained planes, [D] on the CPU; what is wrong is told with its name."""
        try:
            return self._engine.jacobian([loss], flat=True)[0].cpu()
        except ValueError as error:
            raise ValueError(f"the loss of objective {name!r}: {error}") from error


def _check_loss(loss: Tensor, name: str) -> None:
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"the loss of objective {name!r} gave {got}, expected a scalar tensor")
    _check_finite(loss.item(), name)
    if not loss.requires_grad:
        raise ValueError(
            f"the loss of objective {name!r} needs no gradient, expected one computed from the module that it is "
            "given, outside torch.no_grad()"
        )


def _check_finite(loss: float, name: str) -> None:
    if not math.isfinite(loss):
        raise ValueError(
            f"the loss of objective {name!r} is {loss}; lower lr, or check its data and the static weight"
        )
