"""Training the routers: sample a preference, merge, take one backward pass for each objective, step.

All that a solver sees is the Jacobian of the M losses with respect to the routing weights, [M, G, E]; the direction
that it returns goes on into the routers. Method: Tang et al., arXiv 2406.09770.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from paretofuse.engine.distributed import rank_and_size
from paretofuse.engine.engine import Engine
from paretofuse.engine.evaluation.objective import Objective
from paretofuse.engine.routing.sampling import SamplerName
from paretofuse.engine.solvers import Solver, get_solver
from paretofuse.engine.training.log import open_log
from paretofuse.engine.training.run import Record, Run, Settings
from paretofuse.engine.training.validation import Validation


def fit(
    engine: Engine,
    objectives: Sequence[Objective] | Mapping[str, tuple[Any, Callable[..., Tensor]]],
    method: str | Solver = "ls",
    *,
    steps: int = 400,
    lr: float = 6e-2,
    lr_end: float = 0.1,
    options: Mapping[str, Any] | None = None,
    sampler: SamplerName | None = None,
    alpha: float = 1.0,
    corner_every: int = 0,
    preferences_per_step: int = 1,
    accumulate: int = 1,
    regularization: float = 0.0,
    validation: Validation | None = None,
    materialize: bool = True,
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
    (with materialize=False, `engine.fused_module.train()`) first for dropout. docs/training.md says more.

    Under torchrun (torch.distributed initialized, an engine in each process) the processes share out each step's
    `accumulate` batches and sum the small Jacobian; the result does not depend on their number, but for dropout.

    Args:
        engine: the engine; only its routers change.
        objectives: one `Objective` for each expert, in any order, or {name: (data, loss)}.
        method: a solver by name ("ls" is linear scalarization; docs/solvers.md has all) or one of your own.
        steps: optimizer steps in all, those before a resumed checkpoint included.
        lr: Adam's learning rate at the start.
        lr_end: its share left at the end, 0 to 1.
        options: the solver's own options, by name; only with a solver's name.
        sampler: how preferences are drawn: "low_discrepancy", "dirichlet", "antithetic" or "stratified"; by default
            "low_discrepancy", or "dirichlet" where alpha is given.
        alpha: concentration of the Dirichlet distribution; 1 is uniform over the simplex, below 1 favours corners, with
            "dirichlet" or "antithetic".
        corner_every: every so manyth preference is all weight on one objective, each in turn; 0 for none.
        preferences_per_step: preferences in one step; each costs as much as a step with one.
        accumulate: batches of each objective for each preference.
        regularization: adds this times the mean over groups of |L(r) - L_start(r)|^2, L_start being the routing
            weights at the start; 0 for none. It keeps what the initial weights give where the losses do not object.
        validation: judge the routers by a sweep of held-out data now and then, keep the best, and stop early.
        materialize: False to train through `engine.fused_module`, which stores no merged weights of linear layers:
            less memory, more time, the same gradients. The live module is then neither built nor changed.
        seed: of preferences, data order and dropout. torch's global random state is as before afterwards.
        checkpoint: a file; resumed from if it exists, written every `checkpoint_every` steps and at the end.
        checkpoint_every: steps between checkpoints.
        log: a .csv file or a TensorBoard directory. A run that resumes goes on in it, a new one replaces it; a file
            that is no such log is left alone.
        callback: called with each step's record; returning True ends the training after it.
        progress: show a progress bar on stderr.

    Returns:
        The records of the steps taken now (not of those before the checkpoint).

    Raises:
        ValueError: objectives do not match the engine's, an argument is out of range, a loss is not a finite scalar,
            the checkpoint belongs to a run with other settings, or `log` is some other file that is there already.
        StoreError: the checkpoint is damaged.
        RuntimeError: another process of the run has ended.
    """
    settings = Settings(
        method=method if isinstance(method, str) else type(method).__qualname__,
        steps=steps,
        lr=lr,
        lr_end=lr_end,
        sampler=sampler or ("low_discrepancy" if alpha == 1 else "dirichlet"),
        alpha=alpha,
        corner_every=corner_every,
        preferences_per_step=preferences_per_step,
        accumulate=accumulate,
        seed=seed,
        regularization=regularization,
        options=dict(options or {}),
    )
    settings.check()
    if checkpoint_every < 1:
        raise ValueError(f"got checkpoint_every={checkpoint_every}, expected at least 1")
    matched = _match(objectives, engine.objectives)
    run = Run(engine, matched, get_solver(method, options), settings, validation, materialize)
    path = Path(checkpoint) if checkpoint is not None else None
    first = rank_and_size()[0] == 0
    records: list[Record] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        start = run.restore(path) if path is not None and path.exists() else 0
        if run.watch is not None and start == 0:
            run.watch.judge(0)
        writer = open_log(log, start) if log is not None and first else None
        bar = tqdm(total=steps, initial=start, disable=not (progress and first), desc="fit", unit="step")
        try:
            for step in range(start, steps):
                if run.watch is not None and run.watch.ended:
                    break
                record = run.step(step)
                records.append(record)
                bar.update()
                bar.set_postfix({o: f"{record[f'loss/{o}']:.3f}" for o in engine.objectives})
                if writer is not None:
                    writer.write(record)
                stop = callback is not None and bool(callback(record))
                stop = stop or (run.watch is not None and run.watch.ended)
                if path is not None and ((step + 1) % checkpoint_every == 0 or step + 1 == steps or stop):
                    run.save(path, step + 1)
                if stop:
                    break
        finally:
            bar.close()
            if writer is not None:
                writer.close()
    if run.watch is not None:
        run.watch.finish()
    if materialize:
        engine.switch([1 / len(engine.objectives)] * len(engine.objectives))
    return records


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
