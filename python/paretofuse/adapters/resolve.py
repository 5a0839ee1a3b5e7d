"""Turns what a user calls a model (a module, a state dict, a path) into a source."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from paretofuse.adapters import hf, hub, openclip, quantized
from paretofuse.adapters.peft import files as peft
from paretofuse.adapters.peft import live
from paretofuse.engine.engine import Engine
from paretofuse.engine.errors import CheckpointError
from paretofuse.engine.stacking.sources import Source, from_module, from_safetensors, from_state_dict
from paretofuse.engine.stacking.wrappers import unwrap, unwrapped


def resolve(model: Any, label: str, base: Source | None = None) -> Source:
    """The source of a model.

    Args:
        model: an nn.Module; a state dict; a path to a .safetensors file, to a Hugging Face or open_clip directory,
            or (experts only) to a PEFT LoRA directory; a module that carries LoRAs of PEFT (experts only).
        label: what to call it in messages.
        base: the base's source, for experts.

    Raises:
        TypeError: none of these.
        CheckpointError: the path holds nothing of the kind, or a quantized model.
    """
    source = _source(model, label, base)
    quantized.check_source(source)
    if base is None or source.is_delta:
        return source
    source = _by_names_of(base, source)
    quantized.check_kinds(source, base)
    return source


def _source(model: Any, label: str, base: Source | None) -> Source:
    if isinstance(model, nn.Module):
        model = unwrap(model)
        quantized.check_module(model, label)
        if not live.is_live(model):
            return from_module(model, label)
        if base is None:
            raise CheckpointError(
                f"{label}: a model with adapters can be an expert only; the base is the model under it: model.unload()"
            )
        return live.from_model(model, label, base)
    if isinstance(model, Mapping):
        quantized.check_tensors(model, label)
        return from_state_dict(model, label)
    if not isinstance(model, (str, os.PathLike)):
        merged = "; stack what it merges: engine.merge(preference)" if isinstance(model, Engine) else ""
        raise TypeError(
            f"{label}: got {type(model).__name__}, expected an nn.Module, a state dict or a path{merged}"
        )
    path = Path(model)
    if not path.exists():
        path = hub.directory(str(model), label)
    label = f"{label} ({path})"
    if path.is_file() and path.suffix == ".safetensors":
        return from_safetensors([path], label)
    if path.is_file() and path.suffix == ".gguf":
        raise quantized.gguf_refusal(label)
    if path.is_file():
        raise CheckpointError(
            f"{label}: only .safetensors files are read, never pickles; convert it with safetensors.torch.save_file"
        )
    if (adapter := peft.adapter_folder(path, label)) is not None:
        if base is None:
            raise CheckpointError(
                f"{label}: a LoRA directory can be an expert only; the base is the model under it"
            )
        return peft.from_directory(adapter, label, base)
    if (path / openclip.CONFIG).is_file():
        return openclip.from_directory(path, label)
    if any(path.glob("*.gguf")) and not any(path.glob("*.safetensors")):
        raise quantized.gguf_refusal(label)
    return hf.from_directory(path, label)


def _by_names_of(base: Source, expert: Source) -> Source:
    """An expert by its base's tensor names, where they differ by a wrapper's prefix or by the class that saved it."""
    ours = {*base.infos, *base.aliases}
    plain = {unwrapped(name): name for name in ours}
    theirs = (*expert.infos, *expert.aliases)
    names = {name if name in ours else plain.get(unwrapped(name), name): name for name in theirs}
    if len(names) == len(theirs) and names != {name: name for name in theirs}:
        expert = expert.renamed(names)

    def missing(source: Source) -> int:
        return len(base.infos.keys() - source.infos.keys() - source.aliases.keys() - base.constants)

    if missing(expert):
        fitted = hf.in_class_of(expert, base)
        expert = fitted if missing(fitted) < missing(expert) else expert
    return expert
