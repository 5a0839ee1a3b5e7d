"""Random states: set for a while, kept in checkpoints, and given back.

They are those of Python's `random`, of NumPy's global functions, and torch's of the devices in use: losses and data may
draw from any of them. `torch.manual_seed` and `torch.random.fork_rng` reach for every GPU of the machine: they start
CUDA on cards that other people use, and what a run does not own is changed or copied. A run touches the CPU and its
model's own devices only.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def gpus_of(devices: Iterable[torch.device]) -> tuple[int, ...]:
    """The indices of the GPUs among some devices, in order, each once; a device without an index is the current one."""
    found = {device.index for device in devices if device.type == "cuda"}
    return tuple(sorted({torch.cuda.current_device() if index is None else index for index in found}))


def seed(number: int, gpus: Iterable[int] = ()) -> None:
    """Seed the host and some GPUs."""
    torch.default_generator.manual_seed(number)
    random.seed(number)
    if _numpy_state() is not None:
        np.random.seed(number % (1 << 32))  # noqa: NPY002
    for index in gpus:
        torch.cuda.default_generators[index].manual_seed(number)


@contextmanager
def forked(gpus: Iterable[int]) -> Iterator[None]:
    """Give the random states of the host and of some GPUs back after the block."""
    before = host_states()
    with torch.random.fork_rng(devices=list(gpus)):
        try:
            yield
        finally:
            set_host_states(before)


def host_states(generators: Sequence[torch.Generator] = ()) -> tuple[Any, ...]:
    """The host's random states, and those of some generators, for `set_host_states`."""
    numpys = np.random.get_state(legacy=False)  # noqa: NPY002
    return torch.get_rng_state(), random.getstate(), numpys, [g.get_state() for g in generators]


def set_host_states(states: tuple[Any, ...], generators: Sequence[torch.Generator] = ()) -> None:
    """Continue from `host_states` of the same generators."""
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])  # noqa: NPY002
    for generator, state in zip(generators, states[3], strict=True):
        generator.set_state(state)


def random_states(gpus: Iterable[int]) -> dict[str, Tensor]:
    """The random states as tensors: "cpu" (torch's), "python", "numpy", "cuda.0", ..."""
    _, words, normal = random.getstate()
    states = {"cpu": torch.get_rng_state(), "python": _as_tensor(words[:-1], words[-1], normal)}
    own = _numpy_state()
    if own is not None:
        states["numpy"] = _as_tensor(
            own["state"]["key"], own["state"]["pos"], own["gauss"] if own["has_gauss"] else None
        )
    return states | {f"cuda.{index}": torch.cuda.get_rng_state(index) for index in gpus}


def set_random_states(states: Mapping[str, Tensor], gpus: Iterable[int]) -> None:
    """Continue from `random_states`; what is not among them stays as it is."""
    torch.set_rng_state(states["cpu"])
    if "python" in states:
        words, place, normal = _from_tensor(states["python"])
        random.setstate((3, (*words, place), normal))
    if "numpy" in states and _numpy_state() is not None:
        words, place, normal = _from_tensor(states["numpy"])
        key = np.array(words, np.uint32)
        np.random.set_state(("MT19937", key, place, int(normal is not None), normal or 0.0))  # noqa: NPY002
    for index in gpus:
        if f"cuda.{index}" in states:
            torch.cuda.set_rng_state(states[f"cuda.{index}"], index)


def _numpy_state() -> dict[str, Any] | None:
    """NumPy's global state; None where somebody has put another generator than NumPy's own there, which is theirs."""
    state: Any = np.random.get_state(legacy=False)  # noqa: NPY002
    return state if state["bit_generator"] == "MT19937" else None


def _as_tensor(words: Any, place: int, normal: float | None) -> Tensor:
    """A Mersenne twister's 624 words, its place in them, and the normal number that it holds back, int64 [627]."""
    bits = np.float64(0.0 if normal is None else normal).view(np.int64)
    numbers = [*map(int, words), int(place), int(normal is not None), int(bits)]
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


def _from_tensor(state: Tensor) -> tuple[list[int], int, float | None]:
    *words, place, held, bits = state.tolist()
    return words, place, float(np.int64(bits).view(np.float64)) if held else None
