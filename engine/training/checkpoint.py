"""Training checkpoints: one safetensors file of tensors and JSON, with a checksum over both; no pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from paretofuse.engine.errors import StoreError
from paretofuse.engine.store.atomic import write_file

FORMAT = "paretofuse-checkpoint-2"


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write a checkpoint beside its place, then move it there; a kill leaves the previous one whole.

    Args:
        path: the checkpoint file; missing parents are made.
        tensors: on the CPU, contiguous.
        state: everything else, JSON only.
    """
    text = json.dumps(state)
    metadata = {"format": FORMAT, "state": text, "sha256": _digest(tensors, text)}
    write_file(path, save(dict(tensors), metadata=metadata))


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the state that `write_checkpoint` was given.

    Raises:
        StoreError: the file is damaged or is not a checkpoint.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise StoreError(
            f"{path}: neither a checkpoint of pf.fit nor readable as a damaged one ({error}); it is left as it is: "
            "name another checkpoint file to start anew"
        ) from error
    if metadata.get("format") != FORMAT:
        raise StoreError(
            f"{path}: not a checkpoint that this version of pf.fit can resume (format {metadata.get('format')!r}, not "
            f"{FORMAT!r}); it is left as it is: name another checkpoint file to start anew"
        )
    text = metadata.get("state", "")
    if metadata.get("sha256") != _digest(tensors, text):
        raise damaged(path, "its checksum is another")
    try:
        state = json.loads(text)
    except ValueError as error:
        raise damaged(path, str(error)) from error
    if not isinstance(state, dict):
        raise damaged(path, f"its state is of type {type(state).__name__}")
    return tensors, state


def damaged(path: Path, reason: str) -> StoreError:
    """The error for a checkpoint of ours that cannot be resumed, whatever the reason."""
    return StoreError(f"{path}: a damaged checkpoint ({reason}); delete it to start anew")


def like(path: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of a checkpoint's tensors that are expected.

    Raises:
        StoreError: one is missing, or of another shape or dtype.
    """
    found: dict[str, Tensor] = {}
    for name, pattern in expected.items():
        own = tensors.get(name)
        if own is None or own.shape != pattern.shape or own.dtype != pattern.dtype:
            got = "nothing" if own is None else f"{list(own.shape)} {own.dtype}"
            raise damaged(path, f"{name} is {got}, not {list(pattern.shape)} {pattern.dtype}")
        found[name] = own
    return found


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    """A checksum of everything that counts: the state, and each tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
