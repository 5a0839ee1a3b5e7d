"""open_clip model directories: open_clip_config.json and open_clip_model.safetensors.

In-memory open_clip models are ordinary modules and need no adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretofuse.adapters.files import companion_files, json_object
from paretofuse.engine.errors import CheckpointError
from paretofuse.engine.stacking.skeleton import make_skeleton
from paretofuse.engine.stacking.sources import Blueprint, Source, from_safetensors

if TYPE_CHECKING:
    from torch import nn

CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"


def from_directory(path: Path, label: str) -> Source:
    """A source over an open_clip directory, streamed from its file.

    Raises:
        CheckpointError: its weights are not safetensors, or its configuration is damaged.
    """
    if not (path / WEIGHTS).is_file():
        raise CheckpointError(f"{label}: expected {WEIGHTS} beside {CONFIG}; pickles are never read")
    return replace(
        from_safetensors([path / WEIGHTS], label),
        blueprint=blueprint_from_files(companion_files(path), label),
    )


def blueprint_from_files(files: Mapping[str, bytes], label: str = "the model") -> Blueprint:
    """The blueprint of an open_clip model. Imports nothing, as Hugging Face's.

    Raises:
        CheckpointError: its configuration is damaged; the message starts with the label.
    """
    settings = json_object(files[CONFIG], CONFIG, label).get("model_cfg")
    if not isinstance(settings, dict):
        raise CheckpointError(f"{label}: {CONFIG} has no 'model_cfg'; copy it again from where it came from")
    custom = settings.pop("custom_text", False) or "hf_model_name" in settings.get("text_cfg", {})
    name = "CustomTextCLIP" if custom else "CLIP"
    skeleton = cache(lambda: _skeleton(name, settings))
    return Blueprint(skeleton=skeleton, files=dict(files), model_class=f"open_clip.{name}")


def _skeleton(name: str, settings: Mapping[str, Any]) -> nn.Module:
    """The model of a configuration, with meta tensors; ImportError without open_clip."""
    try:
        from open_clip import model
    except ImportError as error:
        raise ImportError(
            f"a model of open_clip.{name} needs open_clip ({error}); pip install 'paretofuse[openclip]', or pass "
            "module= to pf.load"
        ) from error

    return make_skeleton(getattr(model, name)(**settings)).eval()
