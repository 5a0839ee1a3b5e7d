"""One training run: its settings, its state, and a step."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from paretofuse.engine.distributed import rank_and_size, sum_over_ranks
from paretofuse.engine.engine import Engine
from paretofuse.engine.evaluation.objective import Objective
from paretofuse.engine.routing.sampling import SamplerName, make_sampler
from paretofuse.engine.solvers import Solver, solve_each
from paretofuse.engine.training.batches import Batches
from paretofuse.engine.training.checkpoint import read_checkpoint, read_state, write_checkpoint
from paretofuse.engine.training.validation import Validation, Watch

Record = dict[str, float]
"""One step: "step" (from 1), "lr", "preference/<objective>" and "loss/<objective>" (means over its preferences), and
with a validation "validation", the latest hypervolume."""


@dataclass(frozen=True)
class Settings:
    """What a run's result depends on besides the engine and the data; the arguments of `pf.fit`."""

    method: str
    steps: int
    lr: float
    lr_end: float
    sampler: SamplerName
    alpha: float
    corner_every: int
    preferences_per_step: int
    accumulate: int
    seed: int
    regularization: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raise ValueError unless every number is in its range."""
        for name in ("steps", "lr", "alpha", "preferences_per_step", "accumulate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"got {name}={getattr(self, name)}, expected a number above 0")
        if not 0 <= self.lr_end <= 1:
            raise ValueError(f"got lr_end={self.lr_end}, expected a share of lr from 0 to 1")
        if not 0 <= self.regularization < math.inf:
            raise ValueError(f"got regularization={self.regularization}, expected a number of at least 0")
        size = rank_and_size()[1]
        if self.accumulate < size:
            raise ValueError(
                f"got accumulate={self.accumulate} with {size} processes, which share out a step's batches: each "
                f"needs one; pass accumulate={size} or more"
            )

    def rate(self, step: int) -> float:
        """The learning rate of a step (from 0): a cosine from lr down to lr * lr_end."""
        return self.lr * (self.lr_end + (1 - self.lr_end) * (1 + math.cos(math.pi * step / self.steps)) / 2)


class Trained:
    """The module that a run trains through, as a sweep wants to see it.

    Args:
        engine: the engine.
        materialize: whether that is the live module, or the one that stores no merged weights.
    """

    def __init__(self, engine: Engine, materialize: bool) -> None:
        self._engine = engine
        self._materialize = materialize
        self.objectives = engine.objectives

    @property
    def module(self) -> nn.Module:
        """The module."""
        return self._engine.module if self._materialize else self._engine.fused_module

    def train_at(self, preference: Tensor) -> None:
        """Merge at a preference, for training."""
        self._engine.train_at(preference, materialize=self._materialize)

    def switch(self, preference: Sequence[float], /) -> None:
        """Merge at a preference, for evaluation."""
        if self._materialize:
            self._engine.switch(preference)
        else:
            self._engine.train_at(preference, materialize=False)


class Run:
    """A run's state: routers, optimizer, preference sampler and data streams.

    Args:
        engine: the engine; only its routers change.
        objectives: in the engine's order.
        solver: losses, Jacobian, preference -> direction.
        settings: everything else that the result depends on.
        validation: when to stop early, or None.
        materialize: whether the live module is trained through, or `engine.fused_module`.
    """

    def __init__(
        self,
        engine: Engine,
        objectives: Sequence[Objective],
        solver: Solver,
        settings: Settings,
        validation: Validation | None = None,
        materialize: bool = True,
    ) -> None:
        self.engine = engine
        self.trained = Trained(engine, materialize)
        self.objectives = objectives
        self.solver = solver
        self.settings = settings
        self.optimizer = torch.optim.Adam(engine.routers.parameters(), lr=settings.lr)
        self.sampler = make_sampler(
            settings.sampler,
            len(objectives),
            settings.seed,
            alpha=settings.alpha,
            corner_every=settings.corner_every,
        )
        self.start = copy.deepcopy(engine.routers).requires_grad_(False)
        self.watch = (
            None if validation is None else Watch(validation, self.trained, engine.routers, settings.seed)
        )
        self.streams = [Batches(o.data, o.name, settings.seed, i) for i, o in enumerate(objectives)]

    def step(self, step: int) -> Record:
        """Take a step (counted from 0): sample, measure, solve, update the routers."""
        preferences = self.sampler.draw(self.settings.preferences_per_step)
        rays = torch.from_numpy(preferences)
        measured = [self._measure(ray) for ray in rays]
        losses = torch.stack([losses for losses, _ in measured])
        jacobians = torch.stack([jacobian for _, jacobian in measured])
        directions = solve_each(self.solver, losses, jacobians, rays)
        self.optimizer.zero_grad()
        weights = self.engine.routers(rays)
        directions = directions / len(rays) + self._pull(weights.detach(), rays)
        weights.backward(directions.to(device=weights.device, dtype=weights.dtype))
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate(step)
        self.optimizer.step()
        if self.watch is not None:
            self.watch.judge(step + 1)
        return self._record(step, preferences, losses)

    def save(self, path: Path, step: int) -> None:
        """Write a checkpoint after `step` steps; with several processes, the first one does."""
        if rank_and_size()[0] == 0:
            state = {
                "settings": self._identity(),
                "step": step,
                "preferences": self.sampler.state(),
                "streams": [(stream.epoch, stream.taken) for stream in self.streams],
            }
            copies = {"start": self.start.state_dict()} if self.settings.regularization else {}
            if self.watch is not None:
                state["validation"], copies["best"] = self.watch.state(), self.watch.best
            write_checkpoint(path, self.engine.routers, self.optimizer, state, copies)

    def restore(self, path: Path) -> int:
        """Continue from a checkpoint; returns its number of steps.

        Raises:
            ValueError: it belongs to a run with other settings.
            StoreError: it is damaged.
        """
        _check_same(path, read_state(path)["settings"], self._identity())
        state, copies = read_checkpoint(path, self.engine.routers, self.optimizer)
        if self.settings.regularization:
            self.start.load_state_dict(copies["start"])
        if self.watch is not None:
            self.watch.restore(state["validation"], copies["best"])
        self.sampler.restore(state["preferences"])
        for stream, (epoch, taken) in zip(self.streams, state["streams"], strict=True):
            stream.seek(epoch, taken)
        return int(state["step"])

    def _measure(self, ray: Tensor) -> tuple[Tensor, Tensor]:
        """Losses [M] and Jacobian [M, G, E] at one preference: means over `accumulate` batches, float64 on the CPU.

        Several processes take the batches in turn, and sum; the result does not depend on how many they are.
        """
        engine, count = self.engine, self.settings.accumulate
        rank, size = rank_and_size()
        module = self.trained.module
        self.trained.train_at(ray)
        sums = torch.zeros(len(self.objectives), 1 + len(engine.groups) * len(ray), dtype=torch.float64)
        for row, objective, stream in zip(sums, self.objectives, self.streams, strict=True):
            for index in range(count):
                batch = stream.take()
                if index % size != rank:
                    continue
                loss = objective.loss(module, batch)
                _check_loss(loss, objective.name)
                row[0] += loss.item() / count
                row[1:] += engine.jacobian([loss / count]).flatten().cpu()
        sums = sum_over_ranks(sums, "training")
        return sums[:, 0], sums[:, 1:].reshape(-1, len(engine.groups), len(ray))

    def _pull(self, weights: Tensor, rays: Tensor) -> Tensor:
        """Gradient of regularization * mean over preferences and groups of |L(r) - L_start(r)|^2; [K, G, E] or 0.

        A mean over groups, because each group's share of a loss's gradient falls with their number.
        """
        strength = self.settings.regularization
        if not strength:
            return torch.zeros(())
        with torch.no_grad():
            moved: Tensor = (weights - self.start(rays)).cpu().double()
        return 2 * strength * moved / (len(rays) * len(self.engine.groups))

    def _record(self, step: int, preferences: np.ndarray, losses: Tensor) -> Record:
        names = self.engine.objectives
        record: Record = {"step": step + 1, "lr": self.settings.rate(step)}
        record |= {f"preference/{n}": float(r) for n, r in zip(names, preferences.mean(0), strict=True)}
        record |= {f"loss/{n}": float(loss) for n, loss in zip(names, losses.mean(0), strict=True)}
        return record if self.watch is None else record | {"validation": self.watch.score}

    @cached_property
    def _fingerprint(self) -> str:
        """Tells one base and its experts from others, by the first numbers of each tensor."""
        digest = hashlib.sha256()
        for tensors in (self.engine._stack.base, *self.engine._stack.deltas):
            for name, tensor in tensors.items():
                first = tensor.detach().flatten()[:64].contiguous().cpu()
                digest.update(name.encode() + first.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to belong to this run, as JSON gives it back."""
        watch = None if self.watch is None else self.watch.identity()
        identity = {
            "objectives": list(self.engine.objectives),
            "groups": list(self.engine.groups),
            "init": self.engine.routers.init,
            "weights": self._fingerprint,
            "validation": watch,
            **asdict(self.settings),
        }
        plain: dict[str, Any] = json.loads(json.dumps(identity, default=_plain))
        return plain


def _plain(value: Any) -> Any:
    """What JSON does not know, such as a solver's options: arrays as lists, functions and objects by name."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return getattr(value, "__qualname__", type(value).__qualname__)


def _check_loss(loss: Tensor, name: str) -> None:
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"the loss of objective {name!r} gave {got}, expected a scalar tensor")
    if not torch.isfinite(loss):
        raise ValueError(
            f"the loss of objective {name!r} is {loss.item()}; lower lr, or check its data and the static weight"
        )


def _check_same(path: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    different = [
        f"{k}={theirs.get(k)!r} (now {value!r})" for k, value in ours.items() if theirs.get(k) != value
    ]
    if different:
        raise ValueError(
            f"{path} belongs to a run with {', '.join(different)}; use the same settings to resume it, or another "
            "checkpoint file"
        )
