"""Sharded tensors (DTensor: FSDP2, tensor parallelism): each process stacks and merges its own shards.

A merge is the same sum for every element, so the shards of the result are the merges of the shards: nothing is
communicated. A store, a gradient and a fused product are of whole tensors; these are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paretofuse.engine.errors import CheckpointError


@dataclass(frozen=True)
class Sharding:
    """How a tensor lies on a mesh of processes.

    Attributes:
        mesh: the DeviceMesh.
        placements: Shard or Replicate for each dimension of the mesh.
        shape, stride: of the whole tensor.
    """

    mesh: Any
    placements: tuple[Any, ...]
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def whole(self, shard: Tensor) -> Tensor:
        """This process's shard as a DTensor, without communication."""
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            shard, self.mesh, self.placements, run_check=False,
            shape=torch.Size(self.shape), stride=self.stride,
        )  # fmt: skip


def sharding_of(tensor: Tensor) -> Sharding | None:
    """How a tensor is sharded; None for ordinary tensors."""
    if type(tensor) in (Tensor, nn.Parameter):
        return None
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return None
    return Sharding(tensor.device_mesh, tuple(tensor.placements), tuple(tensor.shape), tensor.stride())


def shard(tensor: Tensor) -> Tensor:
    """This process's shard of a DTensor, as a detached view of its memory; an ordinary tensor itself."""
    return tensor if sharding_of(tensor) is None else tensor.detach().to_local()  # type: ignore[attr-defined]


def shards(tensors: Mapping[str, Tensor], label: str) -> tuple[dict[str, Tensor], dict[str, Sharding]]:
    """This process's shards of a state dict, and how the sharded ones lie.

    Raises:
        CheckpointError: a tensor is a pending sum.
    """
    found = {name: sharding for name, t in tensors.items() if (sharding := sharding_of(t)) is not None}
    for name, sharding in found.items():
        if any(placement.is_partial() for placement in sharding.placements):
            raise CheckpointError(
                f"{label}: tensor {name!r} is a pending sum, placements {sharding.placements}; redistribute it first"
            )
    return {name: shard(tensor) for name, tensor in tensors.items()}, found


def check_alike(
    base: Mapping[str, Sharding],
    expert: Mapping[str, Sharding],
    names: Mapping[str, str],
    labels: tuple[str, str],
) -> None:
    """Raise CheckpointError unless an expert's tensors are sharded as the base's.

    Args:
        base, expert: shardings by each one's own tensor names.
        names: the expert's name of each base tensor that both have.
        labels: what to call expert and base in messages.
    """
    alone = [name for name in expert if name not in names.values()]
    if alone:
        raise CheckpointError(
            f"{labels[0]}: its own tensor {alone[0]!r} is sharded; heads must be whole tensors"
        )
    for name, theirs in names.items():
        if base.get(name) != expert.get(theirs):
            raise CheckpointError(
                f"tensor {name!r} lies as {_shown(expert.get(theirs))} in {labels[0]} and as "
                f"{_shown(base.get(name))} in {labels[1]}; shard both alike (torch.distributed.tensor."
                "distribute_tensor, or load the expert into a model sharded like the base)"
            )


def _shown(sharding: Sharding | None) -> str:
    return "a whole tensor" if sharding is None else f"{sharding.placements} on {sharding.mesh}"
