"""What GET /v1/front tells of the served model beside its front: what it takes, and facts of every merged model."""

from __future__ import annotations

from collections import Counter
from typing import Any

from paretofuse.engine.dtypes import TO_TORCH
from paretofuse.engine.layout import ITEM_SIZE
from paretofuse.serving.model import ServedModel


def facts_of(model: ServedModel) -> dict[str, Any]:
    """The fields of FrontDocument that the page at `/` shows its form by."""
    engine = model.engine
    classifies = model.task in ("text-classification", "image-classification")
    formats = Counter(plane.format for own in engine.planes.values() for plane in own.values())
    return {
        "takes": "json" if model.task == "callable" else "image" if model.takes_images else "text",
        "chat": model.chats,
        "adapter": bool(formats) and all(name.startswith("lowrank") for name in formats),
        "labels": [model.labels[index] for index in sorted(model.labels)] if classifies else [],
        "facts": {
            "class": (engine.blueprint.model_class or "unknown").rpartition(".")[2],
            "parameters": f"{sum(spec.numel for spec in engine.layout.tensors):,}",
            "size": _size(model),
            "planes": ", ".join(f"{count} {name}" for name, count in formats.most_common(4)),
            "task": model.task,
        },
    }


def _size(model: ServedModel) -> str:
    tensors = model.engine.layout.tensors
    size = sum(spec.numel * ITEM_SIZE[spec.dtype] for spec in tensors)
    dtypes = [
        str(TO_TORCH[name]).removeprefix("torch.") for name in dict.fromkeys(spec.dtype for spec in tensors)
    ]
    return f"{size / 1e6:,.1f} MB in {' and '.join(dtypes)}"
