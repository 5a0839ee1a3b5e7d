"""What the study learns from and measures: scikit-learn's digits, as they are and as negatives, named by text."""

from __future__ import annotations

from functools import cache
from typing import Any

import open_clip
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

TASKS = ("digits", "negatives")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CONFIG: dict[str, Any] = {
    "embed_dim": 48,
    "vision_cfg": {"image_size": 16, "layers": 3, "width": 48, "head_width": 16, "patch_size": 4},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 48, "heads": 3, "layers": 1},
}
BATCH, LEARN = 64, 12


@cache
def prompts(task: str) -> Tensor:
    """The names of a task's ten classes as tokens [10, 12]."""
    kind = "the digit" if task == "digits" else "a negative of the digit"
    tokenizer = open_clip.SimpleTokenizer(context_length=CONFIG["text_cfg"]["context_length"])
    tokens: Tensor = tokenizer([f"{kind} {name}" for name in DIGITS])
    return tokens


@cache
def images_of(task: str, *, held_out: bool) -> tuple[Tensor, Tensor]:
    """Images [N, 3, 16, 16] in [-1, 1] and labels [N]; every fourth image is held out."""
    digits = load_digits()
    grey = torch.tensor(digits.images, dtype=torch.float32) / 8 - 1  # [1797, 8, 8]
    if task == "negatives":
        grey = -grey
    own = (torch.arange(len(grey)) % 4 == 3) == held_out
    images = F.interpolate(grey[own, None], scale_factor=2.0, mode="bilinear").expand(-1, 3, -1, -1)
    return images.contiguous(), torch.tensor(digits.target)[own]


def logits(model: Any, task: str, images: Tensor) -> Tensor:
    """[N, 10]: how near each image is to the name of each class."""
    text = model.encode_text(prompts(task), normalize=True)
    found: Tensor = model.logit_scale.exp() * model.encode_image(images, normalize=True) @ text.mT
    return found


def loss(model: nn.Module, batch: tuple[str, Tensor, Tensor]) -> Tensor:
    """Cross-entropy of the class names."""
    task, images, labels = batch
    return F.cross_entropy(logits(model, task, images), labels)


def objectives() -> dict[str, tuple[list[tuple[str, Tensor, Tensor]], object]]:
    """For [fit]."""
    found = {}
    for task in TASKS:
        images, labels = images_of(task, held_out=False)
        parts = zip(images.split(BATCH), labels.split(BATCH), strict=True)
        found[task] = ([(task, *part) for part in parts][:LEARN], loss)
    return found  # type: ignore[return-value]


def accuracies(model: nn.Module) -> dict[str, float]:
    """For [sweep]: the share of held-out images that are nearest to their own name."""
    found = {}
    for task in TASKS:
        images, labels = images_of(task, held_out=True)
        found[task] = float((logits(model, task, images).argmax(1) == labels).double().mean())
    return found
