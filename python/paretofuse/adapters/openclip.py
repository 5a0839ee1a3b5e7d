"""open_clip model directories: open_clip_config.json and open_clip_model.safetensors.

In-memory open_clip models are ordinary modules and need no adapter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

from paretofuse.adapters.hf import companion_files
from paretofuse.engine.errors import CheckpointError
from paretofuse.engine.skeleton import make_skeleton
from paretofuse.engine.sources import ModelCard, Source, from_safetensors

CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"


def from_directory(path: Path, label: str) -> Source:
    """A source over an open_clip directory, streamed from its file.

    Raises:
        CheckpointError: its weights are not safetensors.
    """
    if not (path / WEIGHTS).is_file():
        raise CheckpointError(f"{label}: expected {WEIGHTS} beside {CONFIG}; pickles are never read")
    return replace(from_safetensors([path / WEIGHTS], label), card=card_from_files(companion_files(path)))


def card_from_files(files: Mapping[str, bytes]) -> ModelCard:
    """The card of an open_clip model; without open_clip, the files only."""
    try:
        from open_clip.model import CLIP, CustomTextCLIP
    except ImportError:
        return ModelCard(files=dict(files), model_class="open_clip.CLIP")
    settings = dict(json.loads(files[CONFIG])["model_cfg"])
    cls = (
        CustomTextCLIP
        if settings.pop("custom_text", False) or "hf_model_name" in settings.get("text_cfg", {})
        else CLIP
    )
    skeleton = cache(lambda: make_skeleton(cls(**settings)).eval())
    return ModelCard(skeleton=skeleton, files=dict(files), model_class=f"open_clip.{cls.__name__}")
