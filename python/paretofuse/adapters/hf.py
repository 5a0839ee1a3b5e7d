"""Hugging Face model directories: config.json, one or several safetensors files, tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretofuse.engine.errors import CheckpointError
from paretofuse.engine.stacking.skeleton import make_skeleton, stored_tensors
from paretofuse.engine.stacking.sources import Blueprint, Source, from_safetensors

if TYPE_CHECKING:
    from torch import nn

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SMALL_FILE = 64 << 20  # tokenizers are a few MiB; anything larger is no configuration


def from_directory(path: Path, label: str) -> Source:
    """A source over a Hugging Face directory, streamed from its files.

    Raises:
        CheckpointError: there are no safetensors weights, a shard that the index names is missing, or the index or
            the configuration is damaged.
    """
    source = from_safetensors(_weight_files(path, label), label)
    config = path / CONFIG
    if not config.is_file():
        return source
    blueprint = blueprint_from_files(companion_files(path), label)
    if (
        blueprint.skeleton is None
        or blueprint.model_class is None
        or _find_class(blueprint.model_class) is None
    ):
        return replace(source, blueprint=replace(blueprint, skeleton=None))
    return replace(source, blueprint=blueprint, aliases=_ties(blueprint.skeleton(), source))


def companion_files(path: Path) -> dict[str, bytes]:
    """A model directory's small files besides the weights: configuration, tokenizer, chat template, licence."""
    skipped = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".index.json")
    return {
        file.name: file.read_bytes()
        for file in sorted(path.iterdir())
        if file.is_file()
        and not file.name.startswith(".")
        and not file.name.endswith(skipped)
        and file.stat().st_size <= _SMALL_FILE
    }


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


def blueprint_from_files(files: Mapping[str, bytes], label: str = "the model") -> Blueprint:
    """The blueprint of a model whose config.json names a transformers class; without transformers, the files only.

    Imports nothing: transformers takes seconds to import, and opening a store takes milliseconds.

    Raises:
        CheckpointError: config.json is damaged; the message starts with the label.
    """
    config = json_object(files[CONFIG], CONFIG, label) if CONFIG in files else {}
    architectures = config.get("architectures") or []
    if not architectures or "model_type" not in config:
        return Blueprint(files=dict(files))
    name = f"transformers.{architectures[0]}"
    skeleton = cache(lambda: _skeleton(name, config)) if find_spec("transformers") else None
    return Blueprint(skeleton=skeleton, files=dict(files), model_class=name)


def _find_class(name: str) -> type | None:
    """A class of transformers by its full name; None where this version has none of that name."""
    import transformers

    return getattr(transformers, name.removeprefix("transformers."), None)


def _skeleton(name: str, config: dict[str, object]) -> nn.Module:
    """The model of a configuration, with meta tensors; buffers that are not stored keep their values.

    Raises:
        ValueError: this version of transformers has no class of that name.
    """
    from transformers import __version__
    from transformers.initialization import no_init_weights

    cls = _find_class(name)
    if cls is None:
        raise ValueError(
            f"got a model of class {name}, which transformers {__version__} does not have; pass module= to pf.load, or "
            "install the version that has it"
        )
    settings = cls.config_class.from_dict(config)  # type: ignore[attr-defined]
    with no_init_weights():
        model = cls(settings)
    model.tie_weights()  # left out together with the initial values
    return make_skeleton(model).eval()


def _weight_files(path: Path, label: str) -> list[Path]:
    """The directory's safetensors files; where both the file and an index are there, the file, as transformers does."""
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    index = path / INDEX
    if index.is_file():
        shards = _shards(index, label)
        missing = [shard for shard in shards if Path(shard).name != shard or not (path / shard).is_file()]
        if missing:
            raise CheckpointError(f"{label}: {INDEX} names {missing[0]!r}, which is not in the directory")
        return [path / shard for shard in shards]
    found = sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return found
    pickles = [*path.glob("*.bin"), *path.glob("*.pt")]
    advice = (
        "pickles are never read; load and save it again with save_pretrained(..., safe_serialization=True)"
        if pickles
        else f"expected {WEIGHTS} or {INDEX}"
    )
    raise CheckpointError(f"{label}: no safetensors weights found in the directory; {advice}")


def _shards(index: Path, label: str) -> list[str]:
    """The names of the files that an index spreads the tensors over."""
    tensors = json_object(index.read_bytes(), INDEX, label).get("weight_map")
    if (
        not isinstance(tensors, dict)
        or not tensors
        or not all(isinstance(shard, str) for shard in tensors.values())
    ):
        raise CheckpointError(
            f"{label}: {INDEX} has no 'weight_map' from each tensor to its file; copy it again, or save the model again"
        )
    return sorted(set(tensors.values()))


def _ties(skeleton: nn.Module, source: Source) -> dict[str, str]:
    """Names that the model ties to stored ones, and that the files therefore leave out (GPT-2's lm_head)."""
    owners = {id(tensor): name for name, tensor in stored_tensors(skeleton).items() if name in source.infos}
    return {
        name: owners[id(tensor)]
        for name, tensor in stored_tensors(skeleton).items()
        if name not in source.infos and id(tensor) in owners
    }
