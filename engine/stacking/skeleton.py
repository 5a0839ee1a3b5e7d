"""Skeletons: a module's structure with meta tensors, and its copies with real ones.

`copy.deepcopy` takes a memo of objects already copied. Filling it with the replacement of each tensor gives a copy of
any module, ties and hooks included, that holds the given tensors and never a second set of the old ones.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from paretofuse.engine.errors import some


def stored_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by state-dict name, as the very objects that the module holds."""
    return {k: v for k, v in module.state_dict(keep_vars=True).items() if isinstance(v, Tensor)}


def can_copy(module: nn.Module) -> bool:
    """Whether a module can be copied; what FSDP2's fully_shard has taken hold of cannot."""
    # Whoever has sharded a module has imported FSDP; importing it for everybody else would take half a second.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is None or not any(isinstance(part, fsdp.FSDPModule) for part in module.modules())


def make_skeleton(module: nn.Module, keep: Collection[str] = ()) -> nn.Module:
    """A copy of a module whose stored tensors are on the meta device; buffers outside the state dict are copied.

    Args:
        module: any module.
        keep: names of stored tensors that are copied too, for models that no file gives them.
    """
    memo: dict[int, object] = {}
    for name, tensor in stored_tensors(module).items():
        if id(tensor) not in memo and name not in keep:
            meta = torch.empty_like(tensor.detach(), device="meta")
            memo[id(tensor)] = _as(tensor, meta)
    return copy.deepcopy(module, memo)


def materialize(
    skeleton: nn.Module,
    tensors: Mapping[str, Tensor],
    source: str,
    any_shape: Collection[str] = (),
    constants: Collection[str] = (),
) -> nn.Module:
    """A copy of a skeleton that holds the given tensors themselves (no copy).

    What the skeleton holds itself (initial values, buffers outside the state dict) is copied to the device of the
    given tensors, where that is a single one.

    Args:
        skeleton: from `make_skeleton`, or any module.
        tensors: every stored tensor by name; tied names may be given once.
        source: what to call the tensors in messages.
        any_shape: names whose shape may differ from the skeleton's (heads).
        constants: names that the module may do without: what a checkpoint holds beside its class.

    Raises:
        ValueError: tensors are missing, superfluous or of another shape than the module's.
    """
    wanted = stored_tensors(skeleton)
    given: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        if name in wanted and given.setdefault(id(wanted[name]), tensor) is not tensor:
            raise ValueError(
                f"{source}: {type(skeleton).__name__} ties {name!r} to another tensor, but each has values of its own"
            )
    missing = [name for name, tensor in wanted.items() if id(tensor) not in given and tensor.is_meta]
    extra = [name for name in tensors if name not in wanted and name not in constants]
    if missing or extra:
        raise ValueError(
            f"{source} and {type(skeleton).__name__} do not fit: missing {some(missing)}, unknown {some(extra)}"
        )
    memo: dict[int, object] = {}
    for name, tensor in wanted.items():
        if id(tensor) not in given:
            continue
        new = given[id(tensor)]
        if new.shape != tensor.shape and name not in any_shape:
            raise ValueError(
                f"{source}: tensor {name!r} has shape {list(new.shape)}, {type(skeleton).__name__} expects "
                f"{list(tensor.shape)}"
            )
        memo.setdefault(id(tensor), _as(tensor, new))
    places = {tensor.device for tensor in tensors.values()}
    if len(places) == 1:
        place = places.pop()
        for tensor in (*skeleton.parameters(), *skeleton.buffers()):
            if id(tensor) not in memo and not tensor.is_meta:
                memo[id(tensor)] = _as(tensor, tensor.detach().to(place, copy=True))
    module = copy.deepcopy(skeleton, memo)
    for name in any_shape:
        if name in wanted and id(wanted[name]) in given:
            _resize(module, name, wanted[name].shape, given[id(wanted[name])].shape)
    return module


def _resize(module: Any, name: str, was: torch.Size, now: torch.Size) -> None:
    """Have a module that got a head of another size say so, as layers and transformers' losses ask it for its size."""
    if was == now or not now:
        return
    path, _, attribute = name.rpartition(".")
    layer = module.get_submodule(path)
    if isinstance(layer, nn.Linear) and attribute == "weight":
        layer.out_features, layer.in_features = now
    if getattr(module, "num_labels", None) == was[0] != now[0]:
        module.num_labels = module.config.num_labels = now[0]


def _as(like: Tensor, tensor: Tensor) -> Tensor:
    """The tensor as a Parameter where `like` is one, with its requires_grad."""
    if isinstance(like, nn.Parameter):
        return nn.Parameter(tensor, requires_grad=like.requires_grad)
    return tensor
