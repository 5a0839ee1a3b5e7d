"""A model directory's small files: what makes it complete besides its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from paretofuse.engine.errors import CheckpointError
from paretofuse.engine.store.reader import MANIFEST
from paretofuse.engine.store.writer import is_model_file

_SMALL_FILE = 64 << 20  # tokenizers are a few MiB; anything larger is no configuration
_LEFT_BEHIND = (".h5", ".msgpack", ".onnx", ".gguf", ".index.json")
"""Ends of names that are no weights to a store but would bring the base's weights beside the merged ones."""

WEIGHTS = ("model.safetensors", "diffusion_pytorch_model.safetensors")
"""What transformers and diffusers call their weights; their indexes carry `.index.json` in addition."""


def companion_files(path: Path) -> dict[str, bytes]:
    """The files, by name below the directory, that a merged model needs as they are in the base.

    Configurations, tokenizer, processor, chat templates, licence; those in folders too (sentence-transformers'
    1_Pooling, additional_chat_templates), unless the folder holds weights of its own. Hidden files, training logs,
    large files, and what no store takes (weights, names that are not portable) stay behind.
    """
    folders = [f for f in sorted(path.iterdir()) if f.is_dir() and not holds_weights(f)]
    found = {}
    for file in sorted((*path.iterdir(), *(file for folder in folders for file in folder.rglob("*")))):
        name = file.relative_to(path)
        skipped = any(part.startswith(".") for part in name.parts) or "tfevents" in name.name
        if (
            not skipped
            and file.is_file()
            and _is_kept(name.as_posix())
            and file.stat().st_size <= _SMALL_FILE
        ):
            found[name.as_posix()] = file.read_bytes()
    return found


def holds_weights(folder: Path) -> bool:
    """Whether weights of any kind lie in a folder or below it."""
    return any(file.is_file() and not _is_kept(f"x{file.suffix}") for file in folder.rglob("*"))


def _is_kept(name: str) -> bool:
    return is_model_file(name) and not name.endswith(_LEFT_BEHIND)


def json_object(content: bytes, name: str, label: str) -> dict[str, Any]:
    """What a model directory's JSON file holds.

    Raises:
        CheckpointError: no JSON, or no object of names; names the file.
    """
    try:
        found = json.loads(content)
    except ValueError as error:  # of JSON, or of UTF-8
        reason = f"is no JSON ({error})"
    else:
        if isinstance(found, dict):
            return found
        reason = f"holds a {type(found).__name__} instead of an object"
    raise CheckpointError(
        f"{label}: {name} {reason}; it may be truncated: copy it again, or save the model again"
    )


def weight_files(path: Path, label: str) -> tuple[list[Path], list[str]]:
    """The directory's safetensors files, and the tensors that an index promises.

    Where both the file and an index are there, the file, as transformers does.

    Raises:
        CheckpointError: there are none, a shard that the index names is missing, or the index is damaged.
    """
    for weights in WEIGHTS:
        if (path / weights).is_file():
            return [path / weights], []
        index = path / f"{weights}.index.json"
        if index.is_file():
            shards = _shards(index, label)
            names = sorted(set(shards.values()))
            missing = [shard for shard in names if Path(shard).name != shard or not (path / shard).is_file()]
            if missing:
                raise CheckpointError(
                    f"{label}: {index.name} names {missing[0]!r}, which is not in the directory"
                )
            return [path / shard for shard in names], list(shards)
    found = sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return found, []
    if (path / MANIFEST).is_file():
        advice = "it is a store, of which `paretofuse merge` makes a model"
    elif any(path.glob("*.bin")) or any(path.glob("*.pt")):
        advice = "pickles are never read; load and save it again with save_pretrained(..., safe_serialization=True)"
    else:
        advice = f"expected {WEIGHTS[0]} or {WEIGHTS[0]}.index.json"
    raise CheckpointError(f"{label}: no safetensors weights found in the directory; {advice}")


def _shards(index: Path, label: str) -> dict[str, str]:
    """The file of each tensor, as an index tells it."""
    tensors = json_object(index.read_bytes(), index.name, label).get("weight_map")
    if (
        not isinstance(tensors, dict)
        or not tensors
        or not all(isinstance(shard, str) for shard in tensors.values())
    ):
        raise CheckpointError(
            f"{label}: {index.name} has no 'weight_map' from each tensor to its file; copy it again, or save the model "
            "again"
        )
    return tensors
