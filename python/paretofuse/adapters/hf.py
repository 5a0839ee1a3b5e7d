"""Hugging Face model directories: config.json, one or several safetensors files, tokenizer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from paretofuse.adapters import other_classes
from paretofuse.adapters.files import companion_files, holds_weights, json_object, weight_files
from paretofuse.adapters.hf_class import find_class, in_class, make_model
from paretofuse.adapters.quantized import check_source
from paretofuse.engine.errors import CheckpointError, some
from paretofuse.engine.stacking.sources import Blueprint, Source, from_safetensors

CONFIG = "config.json"
PIPELINE = "model_index.json"


def from_directory(path: Path, label: str) -> Source:
    """A source over a Hugging Face directory: what from_pretrained would make of it, streamed from its files.

    Where the class computes its tensors from the files' ones (experts put together), they are held in memory.

    Raises:
        CheckpointError: there are no safetensors weights, a shard that the index names is missing, or the index or
            the configuration is damaged, or of another model, or the model is quantized.
        ImportError: transformers is missing or too old.
    """
    if (path / PIPELINE).is_file():
        parts = [folder.name for folder in sorted(path.iterdir()) if (folder / CONFIG).is_file()]
        raise CheckpointError(
            f"{label}: this is a pipeline of diffusers, not one model; stack one of its parts: {some(parts)}"
        )
    files, promised = weight_files(path, label)
    source = from_safetensors(files, label)
    absent = [name for name in promised if name not in source.infos]
    if absent:
        raise CheckpointError(
            f"{label}: the index promises {some(absent)}, which no shard holds; copy the directory again, or save the "
            "model again"
        )
    folders = [folder.name for folder in sorted(path.iterdir()) if _is_module_with_weights(folder)]
    notes = [
        f"{label}: the folder {name!r} holds weights of its own, which are not stacked; copy it beside a merged model"
        for name in folders
    ]
    blueprint = blueprint_from_files(companion_files(path), label)
    source = replace(source, blueprint=blueprint, notes=tuple(notes))
    check_source(source)  # before its tensors are fitted to the class, which packed ones never do
    return in_class_of(source)


def _is_module_with_weights(folder: Path) -> bool:
    """Whether this is a folder of a sentence-transformers module with weights, such as 2_Dense."""
    return folder.is_dir() and re.match(r"\d+_", folder.name) is not None and holds_weights(folder)


def in_class_of(source: Source, base: Source | None = None) -> Source:
    """A source by the names of the class that a configuration names, its own one unless the base's is to be taken.

    Left as it is where there is no configuration of transformers, or the class is not part of it (its code lies in
    the directory).
    """
    files = (base or source).blueprint.files
    config = json_object(files[CONFIG], CONFIG, source.label) if CONFIG in files else {}
    name = class_name(config)
    if name is None or "quantization_config" in config or find_class(name) is None:
        return source
    return in_class(source, name, config)


def blueprint_from_files(
    files: Mapping[str, bytes], label: str = "the model", owners: Mapping[str, str] | None = None
) -> Blueprint:
    """The blueprint of a model whose config.json names a class of transformers or diffusers, or one of timm's models.

    Imports nothing: these libraries take seconds to import, and opening a store takes milliseconds.

    Args:
        files: the model directory's files besides the weights.
        label: what to call it in messages.
        owners: the tensors that there are, as `make_model` takes them.

    Raises:
        CheckpointError: config.json is damaged; the message starts with the label.
    """
    config = json_object(files[CONFIG], CONFIG, label) if CONFIG in files else {}
    name = class_name(config)
    if name is not None:
        skeleton = cache(lambda: make_model(name, config, owners))
        return Blueprint(skeleton=skeleton, files=dict(files), model_class=name)
    other = other_classes.class_name(config)
    if other is not None:
        skeleton = cache(lambda: other_classes.skeleton(other, config))
        return Blueprint(skeleton=skeleton, files=dict(files), model_class=other)
    return Blueprint(files=dict(files))


def class_name(config: Mapping[str, Any]) -> str | None:
    """The full name of the transformers class that a configuration names, if it names any."""
    architectures = config.get("architectures")
    if not architectures or "model_type" not in config:
        return None
    return f"transformers.{architectures[0]}"
