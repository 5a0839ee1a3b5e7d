"""Torch's random states of the devices in use: set for a while, and given back.

`torch.manual_seed` and `torch.random.fork_rng` reach for every GPU of the machine: they start CUDA on cards that other
people use, and what a run does not own is changed or copied. A run touches the CPU and its model's own devices only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


def gpus_of(devices: Iterable[torch.device]) -> tuple[int, ...]:
    """The indices of the GPUs among some devices, in order, each once; a device without an index is the current one."""
    found = {device.index for device in devices if device.type == "cuda"}
    return tuple(sorted({torch.cuda.current_device() if index is None else index for index in found}))


def seed(number: int, gpus: Iterable[int] = ()) -> None:
    """Seed the CPU and some GPUs."""
    torch.default_generator.manual_seed(number)
    for index in gpus:
        torch.cuda.default_generators[index].manual_seed(number)


@contextmanager
def forked(gpus: Iterable[int]) -> Iterator[None]:
    """Give the random states of the CPU and of some GPUs back after the block."""
    with torch.random.fork_rng(devices=list(gpus)):
        yield


def random_states(gpus: Iterable[int]) -> dict[str, Tensor]:
    """The random states by device: "cpu", "cuda.0", ..."""
    states = {"cpu": torch.get_rng_state()}
    return states | {f"cuda.{index}": torch.cuda.get_rng_state(index) for index in gpus}


def set_random_states(states: Mapping[str, Tensor], gpus: Iterable[int]) -> None:
    """Continue from `random_states`; a GPU that is not among them stays as it is."""
    torch.set_rng_state(states["cpu"])
    for index in gpus:
        if f"cuda.{index}" in states:
            torch.cuda.set_rng_state(states[f"cuda.{index}"], index)
