"""Several processes (torchrun): who am I, and sums of small numbers over all.

Everything here is a no-op in a single process. Only losses, the Jacobian (objectives x G x E) and sweep values ever
travel; weights and deltas never do.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist


def rank_and_size() -> tuple[int, int]:
    """This process's rank and how many there are; (0, 1) outside of torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def sum_over_ranks(tensor: Tensor, doing: str) -> Tensor:
    """The sum of a small CPU tensor over all processes.

    Args:
        tensor: the same shape on every rank.
        doing: what this is for, for the message when another process is gone.

    Raises:
        RuntimeError: another process has ended.
    """
    if rank_and_size()[1] == 1:
        return tensor
    device = (
        torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else tensor.device
    )
    total = tensor.to(device, copy=True)
    try:
        dist.all_reduce(total)
    except RuntimeError as error:
        raise RuntimeError(
            f"another process of this run ended while {doing}: see its own message, and start the run again "
            f"(a checkpoint resumes with any number of processes). {error}"
        ) from error
    return total.to(tensor.device)


def names_of_first_rank(names: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """What rank 0 holds, on every rank."""
    if rank_and_size()[1] == 1:
        return names
    box = [names]
    dist.broadcast_object_list(box, src=0)
    return box[0]
