"""MNIST, Fashion-MNIST and, with three objectives, scikit-learn's digits: a small vision transformer with one head.

All tasks share the ten outputs, so that each expert unlearns the others' meaning of them. The digits are shown in
negative and counted from the other end (label 9 - d): as they are, they would be MNIST once more.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor, nn

import paretofuse as pf
from benchmarks.data_sets.images import Part, Task, digits_tasks, load_tasks
from benchmarks.demo import Shuffled, cross_entropy
from benchmarks.experiments.experiment import Experiment, fine_tune
from benchmarks.harness.record import ROOT
from benchmarks.models import pwemoe
from benchmarks.models.tiny_vit import TinyViT

DATA = ROOT / "demo" / "data"
"""Where the demo keeps fetched images too."""


@dataclass(frozen=True)
class Sizes:
    """Steps of training, images of a batch of one task, and test images of a task."""

    base_steps: int = 150
    expert_steps: int = 300
    expert_batch: int = 64
    learning_batch: int = 16
    test_images: int = 1000
    pwemoe_steps: int = pwemoe.STEPS
    ours_steps: tuple[int, ...] = (40, 75, 400, 1500)
    family_steps: tuple[int, ...] = (75, 400)
    points: int = 11


QUICK = Sizes(4, 6, 8, 4, 40, 4, (2, 3), (3,), 3)
_LATER = ("learning_batch", "test_images", "pwemoe_steps", "ours_steps", "family_steps", "points")
"""Sizes that base and experts do not depend on."""


def of_models(sizes: Sizes) -> dict[str, int]:
    """The sizes that base and experts depend on, by name."""
    return {name: value for name, value in asdict(sizes).items() if name not in _LATER}


def accuracies(tasks: Sequence[Task], model: nn.Module) -> dict[str, float]:
    """Test accuracy on each task, 0 to 1."""
    found = {}
    for task in tasks:
        right = sum(
            int((model(x).argmax(1) == y).sum())
            for x, y in zip(task.test.images.split(500), task.test.labels.split(500), strict=True)
        )
        found[task.name] = right / len(task.test.labels)
    return found


def unsure(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The entropy of what a model says of a batch's images; the labels are not looked at."""
    return pf.entropy_loss(model(batch[0]))


def tasks_of(count: int, quick: bool) -> list[Task]:
    """The first `count` of MNIST, Fashion-MNIST and digits in negative; when quick, nothing but those digits."""
    if quick:
        stand_in = digits_tasks()
        turned = Task(
            "turned", *(Part(p.images.mT, p.labels) for p in (stand_in.first.train, stand_in.first.test))
        )
        return [stand_in.first, stand_in.second, turned][:count]
    tasks = load_tasks(DATA)
    if tasks.stand_in:
        raise RuntimeError("MNIST and Fashion-MNIST cannot be had; the lines above say why")
    return [tasks.first, tasks.second, digits_tasks().second][:count]


def for_tuning(task: Task) -> Task:
    """A task of its training images alone: every fifth is for testing."""
    held = torch.arange(len(task.train.labels)) % 5 == 0
    images, labels = task.train.images, task.train.labels
    return Task(task.name, Part(images[~held], labels[~held]), Part(images[held], labels[held]))


def load(count: int, quick: bool, tuning: bool) -> Experiment:
    """The experiment with two or three objectives; `tuning`: without its test images."""
    sizes = QUICK if quick else Sizes()
    found = tasks_of(count, quick)
    tasks = [
        Task(t.name, t.train, t.test.take(sizes.test_images))
        for t in (map(for_tuning, found) if tuning else found)
    ]
    names = [task.name for task in tasks]

    def objectives(size: int) -> tuple[pf.Objective, ...]:
        return tuple(pf.Objective(t.name, Shuffled(t.train, size), cross_entropy) for t in tasks)

    unlabelled = tuple(pf.Objective(t.name, Shuffled(t.train, sizes.learning_batch), unsure) for t in tasks)

    def train_base(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = TinyViT()
        equal, batch = [1 / count] * count, max(1, sizes.expert_batch // count)
        fine_tune(model, objectives(batch), equal, steps=sizes.base_steps, lr=1e-3, seed=seed)
        return model

    def tune(model: nn.Module, preference: Sequence[float], seed: int) -> None:
        # The images of a step are shared out among the objectives that count, so that each model sees as many.
        batch = max(1, sizes.expert_batch // sum(share > 0 for share in preference))
        fine_tune(model, objectives(batch), preference, steps=sizes.expert_steps, lr=1e-3, seed=seed + 1)

    return Experiment(
        name=("vision" if count == 2 else f"vision{count}") + ("-tune" if tuning else ""),
        title=" / ".join(names) + ", one shared head",
        objectives=objectives(sizes.learning_batch),
        evaluate=partial(accuracies, tasks),
        metric="accuracy",
        maximize=True,
        reference=(0.0,) * count,
        make=TinyViT,
        train_base=train_base,
        fine_tune=tune,
        identity=json.dumps([of_models(sizes), names]),
        preferences=pf.simplex_grid(count, sizes.points if count == 2 else min(5, sizes.points)),
        scalarized=pf.simplex_grid(count, 5 if count == 2 else 3),
        pwemoe_steps=sizes.pwemoe_steps,
        ours_steps=sizes.ours_steps,
        unlabelled=unlabelled,
        family_steps=sizes.family_steps,
    )


def two(quick: bool, tuning: bool = False) -> Experiment:
    """MNIST and Fashion-MNIST."""
    return load(2, quick, tuning)


def three(quick: bool, tuning: bool = False) -> Experiment:
    """The two and scikit-learn's digits, in negative and counted from the other end."""
    return load(3, quick, tuning)
