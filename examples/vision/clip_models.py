"""Makes directories as open_clip keeps them: models/base, a small CLIP, and an expert for each of two tasks.

python clip_models.py
"""

from __future__ import annotations

import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import open_clip
import torch
from clip_tasks import CONFIG, TASKS, images_of, loss
from safetensors.torch import save_file
from torch import nn

BATCH = 64


def train(model: nn.Module, tasks: tuple[str, ...], steps: int, seed: int) -> None:
    """Adam on the tasks' training images, a batch of each in every step."""
    generator = torch.Generator().manual_seed(seed)
    data = {task: images_of(task, held_out=False) for task in tasks}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(steps):
        for task, (images, labels) in data.items():
            chosen = torch.randint(0, len(labels), (BATCH,), generator=generator)
            value = loss(model, (task, images[chosen], labels[chosen]))
            value.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"{' and '.join(tasks)}: {steps} steps, loss {value:.2f}, {time.process_time():.0f} s", flush=True)


def save(model: nn.Module, path: Path) -> None:
    """As open_clip keeps a model: configuration and safetensors."""
    path.mkdir(parents=True, exist_ok=True)
    preprocess: dict[str, Any] = {"size": 16, "mean": [0.5] * 3, "std": [0.5] * 3}
    config = json.dumps({"model_cfg": CONFIG, "preprocess_cfg": preprocess}, indent=1)
    (path / "open_clip_config.json").write_text(config, encoding="utf-8")
    save_file(model.state_dict(), path / "open_clip_model.safetensors")


def main(steps: int) -> None:
    """Train both towers on both tasks a little, then the vision tower alone on each."""
    torch.manual_seed(0)
    base: nn.Module = open_clip.CLIP(**CONFIG)
    train(base, TASKS, steps, 0)
    save(base, Path("models/base"))
    for seed, task in enumerate(TASKS, 1):
        expert = copy.deepcopy(base)
        for name, parameter in expert.named_parameters():
            parameter.requires_grad_(name.startswith("visual."))
        train(expert, (task,), 3 * steps, seed)
        save(expert, Path("models", task))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
