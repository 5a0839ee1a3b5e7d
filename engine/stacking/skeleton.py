"""Skeletons: a module's structure with meta tensors, and its copies with real ones.

`copy.deepcopy` takes a memo of objects already copied. Filling it with the replacement of each tensor gives a copy of
any module, ties and hooks included, that holds the given tensors and never a second set of the old ones.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Collection, Mapping

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


def make_skeleton(module: nn.Module) -> nn.Module:
    """A copy of a module whose stored tensors are on the meta device; buffers outside the state dict are copied."""
    memo: dict[int, object] = {}
    for tensor in stored_tensors(module).values():
        if id(tensor) not in memo:
            meta = torch.empty_like(tensor.detach(), device="meta")
            memo[id(tensor)] = _as(tensor, meta)
    return copy.deepcopy(module, memo)


def materialize(
    skeleton: nn.Module, tensors: Mapping[str, Tensor], source: str, any_shape: Collection[str] = ()
) -> nn.Module:
    """A copy of a skeleton that holds the given tensors themselves (no copy).

    Args:
        skeleton: from `make_skeleton`, or any module.
        tensors: every stored tensor by name; tied names may be given once.
        source: what to call the tensors in messages.
        any_shape: names whose shape may differ from the skeleton's (heads).

    Raises:
        ValueError: tensors are missing, superfluous or of another shape than the module's.
    """
    wanted = stored_tensors(skeleton)
    given = {id(wanted[name]): tensor for name, tensor in tensors.items() if name in wanted}
    missing = [name for name, tensor in wanted.items() if id(tensor) not in given]
    extra = [name for name in tensors if name not in wanted]
    if missing or extra:
        raise ValueError(
            f"{source} and {type(skeleton).__name__} do not fit: missing {some(missing)}, unknown {some(extra)}"
        )
    memo: dict[int, object] = {}
    for name, tensor in wanted.items():
        new = given[id(tensor)]
        if new.shape != tensor.shape and name not in any_shape:
            raise ValueError(
                f"{source}: tensor {name!r} has shape {list(new.shape)}, {type(skeleton).__name__} expects "
                f"{list(tensor.shape)}"
            )
        memo.setdefault(id(tensor), _as(tensor, new))
    return copy.deepcopy(skeleton, memo)


def _as(like: Tensor, tensor: Tensor) -> Tensor:
    """The tensor as a Parameter where `like` is one, with its requires_grad."""
    if isinstance(like, nn.Parameter):
        return nn.Parameter(tensor, requires_grad=like.requires_grad)
    return tensor
