"""What an experiment is: models, objectives, an evaluation; and what every contender is given and gives back.

An experiment says how to train a base and how to fine-tune it on a weighted sum of its losses; an expert is that at a
preference of 1. Everything else (baselines, learning, measuring, caching, tables, pictures) is the same for all.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import paretofuse as pf
from benchmarks.harness.record import peak_bytes, reset_peak, resident
from benchmarks.models import pwemoe
from paretofuse.engine.routing.groups import Route
from paretofuse.engine.training.batches import Batches

Contend = Callable[["Context"], "Outcome"]


@dataclass(frozen=True)
class Experiment:
    """One experiment.

    Attributes:
        name: of its files and its command.
        title: for tables and pictures.
        objectives: E of them, with the batches that routers learn from; losses take (module, batch).
        evaluate: a module in eval mode -> one number for each objective, by its name, on data that nothing learns from.
        metric: what those numbers are, such as "accuracy".
        maximize: whether larger is better.
        reference: the hypervolume's reference point [E], in the objectives' order.
        make: builds the model's structure; its weights are replaced.
        train_base: seed -> the base, in eval mode.
        fine_tune: (a copy of the base to train in place, preference [E], seed) -> None; ends in eval mode.
        identity: what base and experts depend on (steps, sizes, data); another identity is another cache.
        preferences: where fronts are swept [P, E].
        scalarized: preferences of the separately fine-tuned models [S, E].
        pwemoe_routes: PWEMoE's modes in this model: routes by name; none: it does not take part.
        pwemoe_steps: steps of PWEMoE; fewer than its own only in a quick run.
        ours_steps: steps of ours, each a contender.
        family_steps: steps of each other family, and of an ablation.
        first_seed_only: what names of contenders begin with that are too slow for each seed, or the same for each; seed
            0 runs them.
        unlabelled: the objectives once more, with losses that see no label; empty where there are no classes.
        more: further contenders by name, such as base + probe.
        notes: sentences for the report.
    """

    name: str
    title: str
    objectives: tuple[pf.Objective, ...]
    evaluate: Callable[[nn.Module], Mapping[str, float]]
    metric: str
    maximize: bool
    reference: tuple[float, ...]
    make: Callable[[], nn.Module]
    train_base: Callable[[int], nn.Module]
    fine_tune: Callable[[nn.Module, Sequence[float], int], None]
    identity: str
    preferences: np.ndarray
    scalarized: np.ndarray
    pwemoe_routes: Mapping[str, str | Route] = field(
        default_factory=lambda: {"mlp": "mlp", "module": "module"}
    )
    pwemoe_steps: int = pwemoe.STEPS
    ours_steps: tuple[int, ...] = (40, 75, 400)
    family_steps: tuple[int, ...] = (75, 400)
    first_seed_only: tuple[str, ...] = ("PWEMoE-LS mlp", "PWEMoE-EPO")
    unlabelled: tuple[pf.Objective, ...] = ()
    more: Mapping[str, Contend] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The objectives' names, in order."""
        return tuple(objective.name for objective in self.objectives)


@dataclass(frozen=True)
class Outcome:
    """What a contender reached.

    Attributes:
        front: one row for each model; a single model's preference means nothing.
        kind: "model", or "front" where models follow a preference.
        steps: router steps or, where whole models are trained, their steps; None where nothing is learned.
        parameters: how many numbers were trained; of one model where several are trained one after the other.
        note: such as the coefficient that was chosen.
    """

    front: pf.Front
    kind: str
    steps: int | None = None
    parameters: int | None = None
    note: str = ""


class Meter:
    """Wall seconds, CPU seconds and peak memory of what runs inside `with meter:`.

    Memory is all that became resident above what the process held before it loaded any model, so that base, experts,
    gradients, optimizer and activations count, and the libraries and the data do not.
    """

    def __init__(self) -> None:
        self.wall: float | None = None
        self.cpu: float | None = None
        self.peak_mb: float | None = None
        self._before = resident() or 0

    def __enter__(self) -> Meter:
        reset_peak()
        self._start = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *error: object) -> None:
        self.wall = time.perf_counter() - self._start[0]
        self.cpu = time.process_time() - self._start[1]
        self.peak_mb = (peak_bytes() - self._before) / 1e6


class Models:
    """The base and the experts of one experiment and seed, trained when first asked for and kept as files."""

    def __init__(self, experiment: Experiment, seed: int, folder: Path) -> None:
        self.experiment = experiment
        self.seed = seed
        self.folder = folder

    def base(self) -> nn.Module:
        """A fresh copy of the base, in eval mode."""
        path = self.folder / "base.safetensors"
        if not path.exists():
            _save(self.experiment.train_base(self.seed), path)
        return self._load(path)

    def expert(self, name: str) -> nn.Module:
        """A fresh copy of an objective's expert, in eval mode."""
        path = self.folder / f"expert-{name}.safetensors"
        if not path.exists():
            model, index = self.base(), self.experiment.names.index(name)
            self.experiment.fine_tune(model, one_hot(len(self.experiment.names), index), self.seed)
            _save(model, path)
        return self._load(path)

    def experts(self) -> dict[str, nn.Module]:
        """All experts, in the objectives' order."""
        return {name: self.expert(name) for name in self.experiment.names}

    def _load(self, path: Path) -> nn.Module:
        model = self.experiment.make()
        # Tied tensors are stored once; whatever else were missing would be named here.
        missing, unexpected = model.load_state_dict(load_file(path), strict=False)
        tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - {
            name for name, _ in model.named_parameters()
        }
        if set(missing) - tied or unexpected:
            raise ValueError(
                f"{path} lacks {sorted(set(missing) - tied)} and has {sorted(unexpected)} beside"
            )
        return model.eval()


@dataclass(frozen=True)
class Context:
    """What a contender works with."""

    experiment: Experiment
    models: Models
    seed: int
    meter: Meter

    def measured(self, model: nn.Module) -> list[float]:
        """The metrics of a model, in the objectives' order."""
        with torch.no_grad():
            found = self.experiment.evaluate(model.eval())
        return [float(found[name]) for name in self.experiment.names]

    def front(self, values: Sequence[Sequence[float]], preferences: np.ndarray | None = None) -> pf.Front:
        """Measured values as a front; without preferences, all of a single model at the equal one."""
        names = self.experiment.names
        where = np.full((len(values), len(names)), 1 / len(names)) if preferences is None else preferences
        return pf.Front(where, np.array(values), names, names, self.experiment.maximize)

    def sweep(self, engine: pf.Engine) -> pf.Front:
        """An engine's front on the experiment's preferences."""
        values = []
        for preference in self.experiment.preferences:
            engine.switch([float(share) for share in preference])
            values.append(self.measured(engine.module))
        return self.front(values, self.experiment.preferences)

    def single(self, model: nn.Module, note: str = "") -> Outcome:
        """The outcome of one model."""
        return Outcome(self.front([self.measured(model)]), "model", note=note)


def trainable(module: nn.Module) -> int:
    """Parameters that training changes."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def one_hot(count: int, index: int) -> list[float]:
    """All weight on one objective."""
    return [1.0 if i == index else 0.0 for i in range(count)]


def fine_tune(
    model: nn.Module,
    objectives: Sequence[pf.Objective],
    preference: Sequence[float],
    *,
    steps: int,
    lr: float,
    seed: int,
    weight_decay: float = 0.01,
    clip: float | None = None,
) -> None:
    """Ordinary training of a whole model, in place, on sum_e preference[e] * loss_e; ends in eval mode.

    AdamW on a one-cycle schedule. Objectives of weight 0 cost nothing. Each step takes one batch of each objective, so
    give `objectives` whose batches are of the size that you want here.

    Args:
        model: trained in place; parameters with requires_grad False stay.
        objectives: E of them, in order.
        preference: [E].
        steps: optimizer steps.
        lr: the highest learning rate.
        seed: of data order and dropout.
        weight_decay: AdamW's.
        clip: the gradient's largest norm; None: not clipped.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        streams = [Batches(o.data, o.name, seed, index) for index, o in enumerate(objectives)]
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1, pct_start=0.1)
        model.train()
        for _ in range(steps):
            optimizer.zero_grad()
            for share, objective, stream in zip(preference, objectives, streams, strict=True):
                if share > 0:
                    loss: Tensor = share * objective.loss(model, stream.take())
                    loss.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(trained, clip)
            optimizer.step()
            schedule.step()
    model.eval()


def cache_of(experiment: Experiment, cache: Path) -> Path:
    """The folder of an experiment's models and results."""
    digest = hashlib.sha256(json.dumps([experiment.identity, experiment.names]).encode()).hexdigest()
    return cache / f"{experiment.name}-{digest[:10]}"


def _save(model: nn.Module, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unique = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name in unique}
    beside = path.with_suffix(".partial")
    save_file(state, beside)
    beside.replace(path)
