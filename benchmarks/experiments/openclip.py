"""A small open_clip CLIP trained on real images, end to end: directories in, directories out, loaded by open_clip.

Both towers learn to tell MNIST's and Fashion-MNIST's classes by their names; experts go on with the vision tower alone,
as PWEMoE's do. One contender goes the whole way on disk: open_clip directories, stack, fit, sweep, store, merge, and
open_clip's own loader.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import paretofuse as pf
from benchmarks.data_sets.images import Task
from benchmarks.demo import Shuffled
from benchmarks.experiments.contenders import OURS_FIT, OURS_STACK
from benchmarks.experiments.experiment import Context, Experiment, Outcome, fine_tune, trainable
from benchmarks.experiments.vision import Sizes, for_tuning, of_models, tasks_of
from benchmarks.harness.record import BenchmarkError
from paretofuse.engine.merging.disk import merge_store

CONFIG: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 28, "layers": 3, "width": 64, "head_width": 16, "patch_size": 7},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 1},
}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CLOTHES = (
    "t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
MERGED_AT = (0.5, 0.5)
QUICK = Sizes(3, 3, 8, 4, 40, 3, (2,), (2,), 3)
FULL = Sizes(base_steps=150, expert_steps=200, ours_steps=(40, 75, 400))


def prompts(index: int) -> Tensor:
    """The class names of a task as tokens [10, 12]."""
    tokenizer = open_clip.SimpleTokenizer(context_length=CONFIG["text_cfg"]["context_length"])
    texts = (
        [f"the digit {name}" for name in DIGITS]
        if index == 0
        else [f"a photo of a {name}" for name in CLOTHES]
    )
    tokens: Tensor = tokenizer(texts)
    return tokens


def logits(tokens: Tensor, model: Any, images: Tensor, frozen_text: bool = True) -> Tensor:
    """Zero-shot class logits [B, 10] of grey images [B, 1, 28, 28]."""
    with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen_text):
        text = model.encode_text(tokens, normalize=True)
        scale = model.logit_scale.exp()
    found: Tensor = scale * model.encode_image(images.expand(-1, 3, -1, -1), normalize=True) @ text.mT
    return found


def loss(tokens: Tensor, frozen_text: bool, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of the zero-shot logits."""
    images, labels = batch
    return F.cross_entropy(logits(tokens, model, images, frozen_text), labels)


def accuracies(tasks: Sequence[Task], tokens: Sequence[Tensor], model: nn.Module) -> dict[str, float]:
    """Zero-shot test accuracy on each task."""
    return {
        task.name: float((logits(t, model, task.test.images).argmax(1) == task.test.labels).double().mean())
        for task, t in zip(tasks, tokens, strict=True)
    }


def make() -> nn.Module:
    """An untrained model."""
    model: nn.Module = open_clip.CLIP(**CONFIG)
    return model


def write_directory(model: nn.Module, path: Path) -> None:
    """Save as open_clip keeps a model: configuration and safetensors."""
    path.mkdir(parents=True)
    preprocess = {"size": 28, "mean": [0.5] * 3, "std": [0.5] * 3}
    config = {"model_cfg": CONFIG, "preprocess_cfg": preprocess}
    (path / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(model.state_dict(), path / "open_clip_model.safetensors")


def on_disk(steps: int, context: Context) -> Outcome:
    """Ours from directories to a directory that open_clip loads, checked against the sweep.

    Raises:
        BenchmarkError: the model that open_clip loads scores otherwise than in the sweep.
    """
    with tempfile.TemporaryDirectory(prefix="paretofuse-") as name:
        folder = Path(name)
        write_directory(context.models.base(), folder / "base")
        for objective, expert in context.models.experts().items():
            write_directory(expert, folder / objective)
        objectives = context.experiment.objectives
        with context.meter:
            experts = {objective.name: folder / objective.name for objective in objectives}
            engine = pf.stack(folder / "base", experts, **OURS_STACK)
            pf.fit(engine, objectives, steps=steps, seed=context.seed, progress=False, **OURS_FIT)
        front = context.sweep(engine)
        engine.save(folder / "store", force=True)
        merge_store(folder / "store", list(MERGED_AT), folder / "merged")
        loaded = open_clip.create_model(f"local-dir:{folder / 'merged'}").eval()
        found = context.measured(loaded)
    at = next(i for i, r in enumerate(front.preferences) if tuple(r) == MERGED_AT)
    if found != front.values[at].tolist():
        raise BenchmarkError(f"open_clip's model scores {found}, the sweep said {front.values[at].tolist()}")
    return Outcome(front, "front", steps, trainable(engine.routers), f"open_clip loads {MERGED_AT}: the same")


def load(quick: bool, tuning: bool = False) -> Experiment:
    """The experiment; `tuning`: without its test images."""
    sizes = QUICK if quick else FULL
    found = tasks_of(2, quick)
    tasks = [
        Task(t.name, t.train, t.test.take(sizes.test_images))
        for t in (map(for_tuning, found) if tuning else found)
    ]
    tokens = [prompts(index) for index in range(len(tasks))]

    def objectives(size: int, frozen_text: bool = True) -> tuple[pf.Objective, ...]:
        return tuple(
            pf.Objective(task.name, Shuffled(task.train, size), partial(loss, t, frozen_text))
            for task, t in zip(tasks, tokens, strict=True)
        )

    def train_base(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = make()
        both = objectives(max(1, sizes.expert_batch // 2), frozen_text=False)
        fine_tune(model, both, [0.5, 0.5], steps=sizes.base_steps, lr=1e-3, seed=seed)
        return model

    def tune(model: nn.Module, preference: Sequence[float], seed: int) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("visual."))
        batch = max(1, sizes.expert_batch // sum(share > 0 for share in preference))
        fine_tune(model, objectives(batch), preference, steps=sizes.expert_steps, lr=1e-3, seed=seed + 1)

    steps = sizes.ours_steps[-1]
    return Experiment(
        name="openclip-tune" if tuning else "openclip",
        title="open_clip's CLIP, 28 x 28 pixels, MNIST / Fashion-MNIST by class names",
        objectives=objectives(sizes.learning_batch),
        evaluate=partial(accuracies, tasks, tokens),
        metric="accuracy",
        maximize=True,
        reference=(0.0, 0.0),
        make=make,
        train_base=train_base,
        fine_tune=tune,
        identity=json.dumps([of_models(sizes), CONFIG, [t.name for t in tasks]]),
        preferences=pf.simplex_grid(2, sizes.points),
        scalarized=pf.simplex_grid(2, 5),
        pwemoe_steps=sizes.pwemoe_steps,
        ours_steps=sizes.ours_steps,
        family_steps=sizes.family_steps,
        more={f"ours, {steps} steps, on disk": partial(on_disk, steps)},
        notes=(
            "Base: both towers trained from scratch on the classes' names; experts: the vision tower alone. *on disk* "
            "reads open_clip directories, saves a store, merges it into a directory and loads that with "
            "`open_clip.create_model`; the run fails unless the loaded model scores as in the sweep.",
        ),
    )
