"""Training checkpoints: one safetensors file with routers, optimizer, random states and step; no pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from paretofuse.engine.errors import StoreError
from paretofuse.engine.routing.routers import Routers

FORMAT = "paretofuse-checkpoint-1"


def write_checkpoint(
    path: Path,
    routers: Routers,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    copies: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Write a checkpoint beside its place, then move it there; a kill leaves the previous one whole.

    Args:
        path: the checkpoint file.
        routers: the trained parameters.
        optimizer: an optimizer whose state is tensors by parameter (Adam).
        state: everything else, JSON only.
        copies: further values of the routers' parameters, by a label without a dot.
    """
    tensors = {f"routers.{k}": v.detach().cpu() for k, v in routers.state_dict().items()}
    for index, slots in optimizer.state_dict()["state"].items():
        tensors |= {
            f"optimizer.{index}.{slot}": value.detach().cpu().contiguous() for slot, value in slots.items()
        }
    for label, own in copies.items():
        tensors |= {f"copy.{label}.{name}": value.detach().cpu().clone() for name, value in own.items()}
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        for index, random in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"random.cuda.{index}"] = random
    content = save(tensors, metadata={"format": FORMAT, "state": json.dumps(state)})
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def read_state(path: Path) -> dict[str, Any]:
    """What `write_checkpoint` was given as `state`; restores nothing.

    Raises:
        StoreError: the file is damaged or is not a checkpoint.
    """
    return _read(path)[1]


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise StoreError(f"{path}: not a readable checkpoint ({error}); delete it to start anew") from error
    if metadata.get("format") != FORMAT:
        raise StoreError(
            f"{path}: not a ParetoFuse checkpoint (format {metadata.get('format')!r}, not {FORMAT!r})"
        )
    return tensors, json.loads(metadata["state"])


def read_checkpoint(
    path: Path, routers: Routers, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Restore routers, optimizer and random states; returns the rest of the state, and the copies.

    Raises:
        StoreError: the file is damaged or is not a checkpoint of such routers.
    """
    tensors, state = _read(path)
    own = {name: tensors[f"routers.{name}"] for name in routers.state_dict() if f"routers.{name}" in tensors}
    try:
        routers.load_state_dict(own)
    except RuntimeError as error:
        raise StoreError(
            f"{path}: a checkpoint of other routers; give each run its own file ({error})"
        ) from error
    slots: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, slot = name.split(".")
            slots.setdefault(int(index), {})[slot] = tensor
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(tensors["random.cpu"])
    for device in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"random.cuda.{device}" in tensors:
            torch.cuda.set_rng_state(tensors[f"random.cuda.{device}"], device)
    copies: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("copy."):
            _, label, own_name = name.split(".", 2)
            copies.setdefault(label, {})[own_name] = tensor
    return state, copies
