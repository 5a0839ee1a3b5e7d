"""PEFT LoRA directories as experts: delta = scale * B A, computed from the factors, never as a difference.

Source: Hu et al., LoRA, arXiv 2106.09685; rank-stabilized scale: Kalajdzievski, arXiv 2312.03732. The file format is
PEFT's adapter_config.json and adapter_model.safetensors.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paretofuse.engine.errors import CheckpointError
from paretofuse.engine.stacking.sources import Source, TensorInfo, from_safetensors

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<embedding>embedding_)?A(?:\.weight)?$")

_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to start a LoRA that change the weights that it is added to."""


@dataclass(frozen=True)
class _Pair:
    """The factors of one module: names of A and B, their scale, and whether the weight is stored transposed."""

    a: str
    b: str
    scale: float
    transposed: bool


def from_directory(path: Path, label: str, base: Source) -> Source:
    """A source of deltas over a PEFT LoRA directory.

    Args:
        path: the directory.
        label: what to call it in messages.
        base: the model that the adapter was trained on.

    Raises:
        CheckpointError: not a LoRA, a kind that is not a plain sum (DoRA), or factors that do not fit the base.
    """
    config = json.loads((path / CONFIG).read_text())
    if kind := _no_plain_sum(config):
        raise CheckpointError(
            f"{label}: {kind} is not of the form scale * B A; call merge_and_unload() and stack the merged model"
        )
    if not (path / WEIGHTS).is_file():
        raise CheckpointError(f"{label}: expected {WEIGHTS} beside {CONFIG}; pickles are never read")
    files = from_safetensors([path / WEIGHTS], label)
    pairs: dict[str, _Pair] = {}
    whole: dict[str, str] = {}  # base name -> tensor that replaces it (modules_to_save, trained biases)
    for name in files.infos:
        if match := _FACTOR.match(name):
            target = _base_name(match["module"], base, label)
            b = name.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")
            if b not in files.infos:
                raise CheckpointError(f"{label}: {name!r} has no {b!r}; the file is incomplete")
            transposed = bool(match["embedding"]) or bool(config.get("fan_in_fan_out"))
            pairs[target] = _Pair(name, b, _scale(match["module"], config), transposed)
        elif "lora_" not in name:
            whole[_whole_name(name, base, label)] = name
    pairs = {base.aliases.get(target, target): pair for target, pair in pairs.items()}
    whole = {base.aliases.get(target, target): name for target, name in whole.items()}
    for target, pair in pairs.items():
        _check_fit(files, pair, target, base, label)
    for target, name in whole.items():
        if files.infos[name].shape != base.infos[target].shape:
            raise CheckpointError(
                f"tensor {target!r} has shape {list(files.infos[name].shape)} in {label} and "
                f"{list(base.infos[target].shape)} in {base.label}"
            )

    @lru_cache(maxsize=1)
    def product(target: str) -> Tensor:
        return _product(files, pairs[target], base.infos[target].shape)

    def read(name: str, start: int, stop: int) -> Tensor:
        if name in pairs:
            return product(name).reshape(-1)[start:stop]
        return files.read(whole[name], start, stop)

    infos = {name: TensorInfo(base.infos[name].shape, torch.float32) for name in pairs}
    infos |= {name: files.infos[own] for name, own in whole.items()}
    return Source(label=label, infos=infos, read=read, is_delta=True, replaced=frozenset(whole))


def _no_plain_sum(config: dict[str, Any]) -> str | None:
    """The adapter's kind where base + scale * B A is not what it computes, else None."""
    if config.get("peft_type") != "LORA":
        return str(config.get("peft_type"))
    kinds = {
        "use_dora": "DoRA",
        "lora_bias": "LoRA with bias",
        "alora_invocation_tokens": "activated LoRA",
        "use_qalora": "QA-LoRA",
        "use_bdlora": "block-diagonal LoRA",
        "kasa_config": "KaSA",
    }
    found = next((name for key, name in kinds.items() if config.get(key)), None)
    start = config.get("init_lora_weights", True)
    if found is None and isinstance(start, str) and start.lower().startswith(_CHANGE_THE_BASE):
        # Saved with path_initial_model_for_weight_conversion, PEFT says True here, and the sum is right again.
        found = f"LoRA started by init_lora_weights={start!r}, which takes its start away from the base's weights,"
    return found


def _scale(module: str, config: dict[str, Any]) -> float:
    """alpha / r, or alpha / sqrt(r) for rank-stabilized LoRA, with the module's own rank and alpha if it has any."""
    name = module.removeprefix(_PREFIX)
    rank = _pattern(config.get("rank_pattern"), name, config["r"])
    alpha = _pattern(config.get("alpha_pattern"), name, config["lora_alpha"])
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pattern(patterns: dict[str, float] | None, name: str, default: float) -> float:
    """PEFT's rule: the first pattern that is the module's name or matches it from a dot on."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def _base_name(module: str, base: Source, label: str) -> str:
    """The base's weight that a LoRA module changes."""
    return _whole_name(f"{module}.weight", base, label)


def _whole_name(name: str, base: Source, label: str) -> str:
    """The base's name of an adapter's tensor."""
    plain = name.removeprefix(_PREFIX)
    for candidate in (plain, plain.replace(".modules_to_save", ""), plain.replace(".base_layer", "")):
        if candidate in base.infos or candidate in base.aliases:
            return candidate
    raise CheckpointError(
        f"{label}: {name!r} belongs to no tensor of {base.label}; was it trained on another base?"
    )


def _check_fit(files: Source, pair: _Pair, target: str, base: Source, label: str) -> None:
    """The factors' product must have exactly the weight's shape."""
    a, b = files.infos[pair.a].shape, files.infos[pair.b].shape
    if a[0] != b[1]:
        raise CheckpointError(f"{label}: {pair.a!r} has rank {a[0]} and {pair.b!r} rank {b[1]}")
    if len(a) == 2:
        shape: tuple[int, ...] = (a[1], b[0]) if pair.transposed else (b[0], a[1])
    else:
        shape = (b[0], *a[1:])
    if shape != base.infos[target].shape:
        raise CheckpointError(
            f"tensor {target!r}: {label} makes a delta of shape {list(shape)}, {base.label} has "
            f"{list(base.infos[target].shape)}"
        )


def _product(files: Source, pair: _Pair, shape: tuple[int, ...]) -> Tensor:
    """scale * B A in float32, of the weight's shape."""
    a, b = (
        files.read(name, 0, files.infos[name].numel).to(torch.float32).view(files.infos[name].shape)
        for name in (pair.a, pair.b)
    )
    a, b = a.flatten(1), b.flatten(1)
    delta = a.T @ b.T if pair.transposed else b @ a
    return delta.mul_(pair.scale).view(shape)
