"""Training the routers: sample a preference, merge, take one backward pass for each objective, step.

All that a solver sees is the Jacobian of the M losses with respect to the routing weights, [M, G, E]; the direction
that it returns goes on into the routers. Method: Tang et al., arXiv 2406.09770.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from paretofuse.engine.checkpoint import read_checkpoint, write_checkpoint
from paretofuse.engine.data import Batches, Objective
from paretofuse.engine.engine import Engine
from paretofuse.engine.log import open_log
from paretofuse.engine.sampling import SamplerName, make_sampler
from paretofuse.engine.solvers import Solver, get_solver, solve_each

Record = dict[str, float]
"""One step: "step" (from 1), "lr", "preference/<objective>" and "loss/<objective>" (means over its preferences)."""


def fit(
    engine: Engine,
    objectives: Sequence[Objective] | Mapping[str, tuple[Any, Callable[..., Tensor]]],
    method: str | Solver = "ls",
    *,
    steps: int = 400,
    lr: float = 1e-2,
    lr_end: float = 0.1,
    options: Mapping[str, Any] | None = None,
    sampler: SamplerName = "dirichlet",
    alpha: float = 1.0,
    corner_every: int = 0,
    preferences_per_step: int = 1,
    accumulate: int = 1,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 100,
    log: str | os.PathLike[str] | None = None,
    callback: Callable[[Record], bool | None] | None = None,
    progress: bool = True,
) -> list[Record]:
    """Train an engine's routers; with the same seed, data and machine, bit for bit the same each time.

    Each step draws a preference (or several), merges the live module at it, computes each objective's loss and its
    gradient with respect to the routing weights, and steps Adam along the solver's direction; the learning rate falls
    from `lr` to `lr * lr_end` on a cosine. The module keeps the training mode that it has: call `engine.module.train()`
    first for dropout.

    Args:
        engine: the engine; only its routers change.
        objectives: one `Objective` for each expert, in any order, or {name: (data, loss)}.
        method: a solver by name ("ls" is linear scalarization) or one of your own.
        steps: optimizer steps in all, those before a resumed checkpoint included.
        lr: Adam's learning rate at the start.
        lr_end: its share left at the end, 0 to 1.
        options: the solver's own options, such as {"mu": 0.05}; only with a name.
        sampler: how preferences are drawn: "dirichlet", "antithetic", "stratified" or "low_discrepancy".
        alpha: concentration of the Dirichlet distribution; 1 is uniform over the simplex, below 1 favours corners.
        corner_every: every so manyth preference is all weight on one objective, each in turn; 0 for none.
        preferences_per_step: preferences in one step; each costs as much as a step with one.
        accumulate: batches of each objective for each preference.
        seed: of preferences, data order and dropout. torch's global random state is as before afterwards.
        checkpoint: a file; resumed from if it exists, written every `checkpoint_every` steps and at the end.
        checkpoint_every: steps between checkpoints.
        log: a .csv file or a TensorBoard directory.
        callback: called with each step's record; returning True ends the training after it.
        progress: show a progress bar on stderr.

    Returns:
        The records of the steps taken now (not of those before the checkpoint).

    Raises:
        ValueError: objectives do not match the engine's, an argument is out of range, a loss is not a finite scalar,
            or the checkpoint belongs to a run with other settings.
        StoreError: the checkpoint is damaged.
    """
    ordered = _match(objectives, engine.objectives)
    _check_positive(steps=steps, lr=lr, alpha=alpha, accumulate=accumulate, checkpoint_every=checkpoint_every)
    if not 0 <= lr_end <= 1:
        raise ValueError(f"got lr_end={lr_end}, expected a share of lr from 0 to 1")
    solver = get_solver(method, options)
    if preferences_per_step < 1 or accumulate < 1:
        raise ValueError(
            f"got preferences_per_step={preferences_per_step} and accumulate={accumulate}, expected at least 1"
        )
    draws = make_sampler(sampler, len(ordered), seed, alpha=alpha, corner_every=corner_every)
    settings = {
        "objectives": list(engine.objectives),
        "method": method if isinstance(method, str) else type(method).__qualname__,
        "steps": steps,
        "lr": lr,
        "lr_end": lr_end,
        "options": dict(options or {}),
        "sampler": sampler,
        "alpha": alpha,
        "corner_every": corner_every,
        "preferences_per_step": preferences_per_step,
        "accumulate": accumulate,
        "seed": seed,
    }
    path = Path(checkpoint) if checkpoint is not None else None
    optimizer = torch.optim.Adam(engine.routers.parameters(), lr=lr)
    streams = [Batches(o.data, o.name, seed, index) for index, o in enumerate(ordered)]
    records: list[Record] = []
    with torch.random.fork_rng(enabled=True):
        torch.manual_seed(seed)
        start = 0
        if path is not None and path.exists():
            state = read_checkpoint(path, engine.routers, optimizer)
            _check_settings(path, state["settings"], settings)
            start = int(state["step"])
            draws.restore(state["preferences"])
            for stream, (epoch, taken) in zip(streams, state["streams"], strict=True):
                stream.seek(epoch, taken)
        writer = open_log(log, start) if log is not None else None
        bar = tqdm(total=steps, initial=start, disable=not progress, desc="fit", unit="step")
        try:
            for step in range(start, steps):
                rate = lr * (lr_end + (1 - lr_end) * (1 + math.cos(math.pi * step / steps)) / 2)
                preferences = draws.draw(preferences_per_step)
                losses = _step(engine, ordered, streams, solver, optimizer, preferences, rate, accumulate)
                record = _record(step + 1, rate, engine.objectives, preferences, losses)
                records.append(record)
                bar.update()
                bar.set_postfix({o: f"{record[f'loss/{o}']:.3f}" for o in engine.objectives})
                if writer is not None:
                    writer.write(record)
                stop = callback is not None and bool(callback(record))
                if path is not None and ((step + 1) % checkpoint_every == 0 or step + 1 == steps or stop):
                    state = {
                        "settings": settings,
                        "step": step + 1,
                        "preferences": draws.state(),
                        "streams": [(stream.epoch, stream.taken) for stream in streams],
                    }
                    write_checkpoint(path, engine.routers, optimizer, state)
                if stop:
                    break
        finally:
            bar.close()
            if writer is not None:
                writer.close()
    engine.switch([1 / len(ordered)] * len(ordered))
    return records


def _step(
    engine: Engine,
    objectives: Sequence[Objective],
    streams: Sequence[Batches],
    solver: Solver,
    optimizer: torch.optim.Optimizer,
    preferences: np.ndarray,
    rate: float,
    accumulate: int,
) -> Tensor:
    """One optimizer step at K preferences [K, E]; returns the losses [K, M]."""
    rays = torch.from_numpy(preferences)
    measured = [_measure(engine, objectives, streams, ray, accumulate) for ray in rays]
    losses = torch.stack([losses for losses, _ in measured])
    directions = solve_each(solver, losses, torch.stack([jacobian for _, jacobian in measured]), rays)
    optimizer.zero_grad()
    weights = engine.routers(rays)
    weights.backward((directions / len(rays)).to(device=weights.device, dtype=weights.dtype))
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    return losses


def _measure(
    engine: Engine, objectives: Sequence[Objective], streams: Sequence[Batches], ray: Tensor, accumulate: int
) -> tuple[Tensor, Tensor]:
    """Losses [M] and Jacobian [M, G, E] at one preference, means over `accumulate` batches; float64 on the CPU."""
    engine.train_at(ray)
    losses = torch.zeros(len(objectives), dtype=torch.float64)
    jacobian = torch.zeros(len(objectives), len(engine.groups), len(engine.objectives), dtype=torch.float64)
    for m, (objective, stream) in enumerate(zip(objectives, streams, strict=True)):
        for _ in range(accumulate):
            loss = objective.loss(engine.module, stream.take())
            _check_loss(loss, objective.name)
            jacobian[m] += engine.jacobian([loss / accumulate])[0].cpu()
            losses[m] += loss.item() / accumulate
    return losses, jacobian


def _match(
    objectives: Sequence[Objective] | Mapping[str, tuple[Any, Callable[..., Tensor]]], names: tuple[str, ...]
) -> list[Objective]:
    """The objectives in the engine's order."""
    if isinstance(objectives, Mapping):
        objectives = [Objective(name, data, loss) for name, (data, loss) in objectives.items()]
    given = {objective.name: objective for objective in objectives}
    if set(given) != set(names) or len(given) != len(objectives):
        raise ValueError(
            f"got objectives {[o.name for o in objectives]}, expected one for each of {list(names)}"
        )
    return [given[name] for name in names]


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"got {name}={value}, expected a number above 0")


def _check_loss(loss: Tensor, name: str) -> None:
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"the loss of objective {name!r} gave {got}, expected a scalar tensor")
    if not torch.isfinite(loss):
        raise ValueError(
            f"the loss of objective {name!r} is {loss.item()}; lower lr, or check its data and the static weight"
        )


def _check_settings(path: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    different = [
        f"{key}={theirs.get(key)!r} (now {value!r})"
        for key, value in ours.items()
        if theirs.get(key) != value
    ]
    if different:
        raise ValueError(
            f"{path} belongs to a run with {', '.join(different)}; use the same settings to resume it, or another "
            "checkpoint file"
        )


def _record(step: int, rate: float, names: Sequence[str], preferences: np.ndarray, losses: Tensor) -> Record:
    record: Record = {"step": step, "lr": rate}
    record |= {f"preference/{n}": float(r) for n, r in zip(names, preferences.mean(0), strict=True)}
    return record | {f"loss/{n}": float(loss) for n, loss in zip(names, losses.mean(0), strict=True)}
