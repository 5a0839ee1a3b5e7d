"""Training the routers: sample a preference, merge, take one backward pass for each objective, step.

All that a solver sees is the Jacobian of the M losses with respect to the routing weights, [M, G, P]; the direction
that it returns goes on into the routers. Method: Tang et al., arXiv 2406.09770.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from paretofuse.engine.distributed import rank_and_size
from paretofuse.engine.engine import Engine
from paretofuse.engine.evaluation.arguments import check_function
from paretofuse.engine.evaluation.objective import Objectives, as_objectives, in_order
from paretofuse.engine.evaluation.progress import progress_bar
from paretofuse.engine.modules.captured import one_gpu
from paretofuse.engine.routing.sampling import SamplerName
from paretofuse.engine.solvers import Solver, get_solver
from paretofuse.engine.termination import termination_raises
from paretofuse.engine.training import random_state
from paretofuse.engine.training.captured import REMEDY
from paretofuse.engine.training.log import Log, open_log
from paretofuse.engine.training.run import Record, Run
from paretofuse.engine.training.settings import Settings, check_number
from paretofuse.engine.training.smoothing import divergence
from paretofuse.engine.training.validation import Validation

_LOG = logging.getLogger("paretofuse")


def fit(
    engine: Engine,
    objectives: Objectives,
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
    family: str | None = None,
    row_lr: float | None = None,
    row_shrinkage: float | None = None,
    plane_lr: float | None = None,
    plane_shrinkage: float | None = None,
    plane_orthogonality: float | None = None,
    sketch: int | None = None,
    materialize: bool = True,
    capture: bool = False,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 100,
    log: str | os.PathLike[str] | Log | None = None,
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
        engine: the engine; only its routers change, and its trained planes where it has some.
        objectives: one `Objective` for each expert, in any order, or {name: (data, loss)}.
        method: a solver by name ("ls" is linear scalarization; docs/solvers.md has all) or one of your own.
        steps: optimizer steps in all, those before a resumed checkpoint included. With more than the checkpoint's run
            had, a finished run goes on; see `checkpoint`.
        lr: Adam's learning rate at the start.
        lr_end: its share left at the end, 0 to 1.
        options: the solver's own options, by name; only with a solver's name.
        sampler: how preferences are drawn: "low_discrepancy" or "dirichlet"; by default "low_discrepancy", or
            "dirichlet" where alpha is given.
        alpha: concentration of the Dirichlet distribution; 1 is uniform over the simplex, below 1 favours corners; with
            "dirichlet" only.
        corner_every: every so manyth preference is all weight on one objective, each in turn; 0 for none.
        preferences_per_step: preferences in one step; each costs as much as a step with one.
        accumulate: batches of each objective for each preference.
        regularization: adds this times the mean over groups of `|L(r) - L_start(r)|^2`, L_start being the routing
            weights at the start; 0 for none. It keeps what the initial weights give where the losses do not object.
        validation: sweep held-out data now and then, keep the best routers, and stop early.
        family: "rows" to train a coefficient for each row of each routed tensor as well (`engine.routers.rows`, zero at
            the start): thousands of numbers; "rows+columns" for one for each column of each routed matrix too; "scalar"
            for one for each group alone: hundreds. None for the family that the engine was asked to have, else for
            "rows" unless it holds one process's shards, which cannot merge them.
        row_lr: learning rate of the coefficients of rows and columns at the start, half of `lr` unless told; it falls
            as `lr` does.
        row_shrinkage: each step takes this share, times their learning rate, of those coefficients away; 0 unless told.
            Against overfitting where data is small.
        plane_lr: learning rate of trained planes (`pf.add_planes`) at the start, 0.003 unless told; it falls as `lr`
            does.
        plane_shrinkage: each step takes this share, times their learning rate, of the trained planes away; 0 unless
            told.
        plane_orthogonality: each step turns the A of different objectives' trained planes apart, by this times their
            learning rate; 0 unless told. Orthogonal ones look at different directions of a layer's input.
        sketch: a rank, such as 16: the nearest planes of this rank stand in for the experts' own in the gradient of the
            coefficients of linear layers, whose weight gradients are then never made; merges have the planes
            themselves. Less time for a gradient that is not quite the losses'; None for the exact one.
        materialize: False to train through `engine.fused_module`, which stores no merged weights of linear layers:
            less memory, more time, the same gradients. The live module is then neither built nor changed.
        capture: True for a model that one GPU's kernels merge: from the second step on, merging, forward and backward
            passes and the gradients' reduction are replayed as one CUDA graph. All batches of an objective must be of
            the same shapes, and losses must read no value back (`.item()`, masks of any length).
        seed: of preferences, data order and dropout. The global random states of torch, Python and NumPy, from which
            losses and data may draw, are as before afterwards.
        checkpoint: a file; resumed from if it exists, written every `checkpoint_every` steps, at the end, and when
            the run is interrupted (SIGINT, SIGTERM, SIGHUP) or an error ends it, with all steps until then. Only
            `steps` may differ from those of the run that wrote it: the rest of a lengthened run follows the longer
            run's cosine, so the learning rate first rises again to what that has at this step.
        checkpoint_every: steps between checkpoints.
        log: a .csv file or a TensorBoard directory, in which a run that resumes goes on, while a new one replaces it (a
            file that is no such log is left alone); a tracker's name, "wandb", "mlflow", "aim" or "trackio", whose
            active run is taken if there is one; or an object with write(record) and close(), which it ends with.
        callback: called with each step's record; returning True ends the training after it.
        progress: show a progress bar on stderr where that is a terminal, with each objective's loss at equal
            preference, smoothed over the last steps.

    Returns:
        The records of the steps taken now (not of those before the checkpoint). `engine.training` then says how the
        routers were trained: steps, method, seed, data (the objectives' names), when, versions. Without a validation, a
        run of 20 steps or more in which every loss rose by half is logged as a warning (logger
        "paretofuse"): its steps are too large.

    Raises:
        ValueError: objectives do not match the engine's, an argument is out of range, a loss is not a finite scalar or
            does not depend on the module's routed weights, a step cannot be captured, or its batches differ, the
            checkpoint belongs to a run with other settings or data, or `log` is some other file that is there already.
        TypeError: an argument is of another kind, such as a module instead of the engine.
        StoreError: the checkpoint is damaged, or another file.
        RuntimeError: another process of the run has ended.
    """
    if not isinstance(engine, Engine):
        raise TypeError(
            f"got {type(engine).__name__} to train, expected an engine that pf.stack or pf.load made"
        )
    check_number("lr", lr)
    settings = Settings(
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
        family=_default_family(engine) if family is None else family,
        row_lr=lr / 2 if row_lr is None else row_lr,
        row_shrinkage=0.0 if row_shrinkage is None else row_shrinkage,
        plane_lr=Settings.plane_lr if plane_lr is None else plane_lr,
        plane_shrinkage=0.0 if plane_shrinkage is None else plane_shrinkage,
        plane_orthogonality=0.0 if plane_orthogonality is None else plane_orthogonality,
        sketch=sketch,
    )
    settings.check()
    if settings.family == "scalar" and not (row_lr is None and row_shrinkage is None):
        raise ValueError(
            f"got row_lr={row_lr} and row_shrinkage={row_shrinkage} for routers without row coefficients; pass "
            'family="rows" or "rows+columns", or leave them out'
        )
    of_planes = {
        "plane_lr": plane_lr,
        "plane_shrinkage": plane_shrinkage,
        "plane_orthogonality": plane_orthogonality,
    }
    if engine.routers.planes is None and (given := {k: v for k, v in of_planes.items() if v is not None}):
        raise ValueError(
            f"got {', '.join(f'{name}={value}' for name, value in given.items())} for an engine without trained "
            "planes; call pf.add_planes(engine, rank=4) first, or leave it out"
        )
    check_number("checkpoint_every", checkpoint_every, 1)
    if validation is not None and not isinstance(validation, Validation):
        raise TypeError(
            f"got validation of type {type(validation).__name__}, expected pf.Validation(evaluate, ...)"
        )
    if callback is not None:
        check_function("callback", callback, "callback(record)")
    if capture and not materialize:
        raise ValueError(
            "got capture=True with materialize=False, expected only one of them: graphs hold merged weights"
        )
    if capture:
        one_gpu(engine._bound.backends, REMEDY)
    matched = in_order(as_objectives(objectives), engine.objectives)
    solver = get_solver(method, options)
    path = _checkpoint_path(checkpoint)
    before, asked = engine.routers.family, engine.routers.family_asked
    engine.set_family(settings.family)
    if family is None:
        engine.routers.family_asked = asked  # a default is no wish
    run = Run(engine, matched, solver, settings, validation, materialize, capture)
    first = rank_and_size()[0] == 0
    records: list[Record] = []
    stopping = run.early_stopping
    sketched = nullcontext() if sketch is None else engine._in_place.sketched(sketch, materialize=materialize)
    with termination_raises(), random_state.forked(run.gpus), sketched:
        random_state.seed(seed, run.gpus)
        if path is not None and path.exists():
            run.restore(path)
        elif stopping is not None:
            stopping.validate(0)
        writer = open_log(log, run.taken) if log is not None and first else None
        bar = progress_bar(progress and first, total=steps, initial=run.taken, desc="fit", unit="step")
        try:
            for step in range(run.taken, steps):
                if stopping is not None and stopping.ended:
                    break
                record = run.step(step)
                records.append(record)
                bar.update()
                bar.set_postfix({o: f"{record[f'equal/{o}']:.3f}" for o in engine.objectives})
                enough = writer is not None and writer.write(record)
                if path is not None:
                    run.keep()
                if path is not None and (step + 1) % checkpoint_every == 0:
                    run.save(path)
                if (callback is not None and callback(record)) or enough:
                    break
        finally:
            # However it ends: done, stopped, interrupted, told to end, or by an error in the middle of a step.
            bar.close()
            if writer is not None:
                writer.close()
            if run.taken > 0:
                engine.training = _record_of(engine, run.taken, method, seed)
            else:
                engine.routers.set_family(before)  # as it was: nothing of what is new is trained
                engine.routers.family_asked = asked
            if path is not None:
                run.save(path)
    if stopping is not None:
        stopping.finish()
    elif (worse := divergence(records, engine.objectives)) is not None and rank_and_size()[0] == 0:
        _LOG.warning("training: %s", worse)
    if materialize:
        engine.switch([1 / len(engine.objectives)] * len(engine.objectives))
    return records


def _default_family(engine: Engine) -> str:
    """What is trained unless told: the family that the engine was asked for, else "rows" where they can be merged."""
    routers = engine.routers
    return routers.family_asked or ("rows" if engine._bound.reads_rows else routers.family)


def _checkpoint_path(checkpoint: str | os.PathLike[str] | None) -> Path | None:
    """The checkpoint file, where one can be written: that is tried now rather than after the first hundred steps."""
    if checkpoint is None:
        return None
    path = Path(checkpoint)
    if path.is_dir():
        raise ValueError(f"got checkpoint={str(path)!r}, which is a directory, expected a file")
    if rank_and_size()[0] == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    # A link stays, and what it leads to is replaced, as that is a checkpoint of ours or refused when it is read.
    return path.resolve() if path.is_file() else path


def _record_of(engine: Engine, steps: int, method: str | Solver, seed: int) -> dict[str, Any]:
    """How the routers were trained, for the store and for people."""
    return {
        "steps": steps,
        "method": method if isinstance(method, str) else type(method).__qualname__,
        "seed": seed,
        "data": list(engine.objectives),
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"paretofuse": _version("paretofuse"), "torch": torch.__version__},
    }


def _version(package: str) -> str:
    """A package's installed version; of a source tree that was never installed, "unknown"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
