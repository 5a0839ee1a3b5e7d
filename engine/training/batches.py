"""The endless, seeded, resumable streams of batches that training draws from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DistributedSampler

from paretofuse.engine.distributed import rank_and_size
from paretofuse.engine.training.random_state import host_states, set_host_states
from paretofuse.engine.training.random_state import seed as seed_random_state


class Batches:
    """An endless stream over an iterable, with a random state of its own.

    Every epoch starts from a seed made of the run's seed, the stream's index and the epoch, and whatever the iterable
    draws from the random states of torch, Python and NumPy, or from a generator that was given to a DataLoader or its
    sampler, comes from there: so the stream depends neither on the model nor on the other objectives, and `seek` finds
    any place again by repeating one epoch's draws. Such a generator's own seed counts too; its state stays as it is.

    Args:
        data: the iterable.
        name: the objective's name, for messages.
        seed: the run's seed.
        index: the objective's index.

    Raises:
        ValueError: the iterable is one process's share of the data.
    """

    def __init__(self, data: Iterable[Any], name: str, seed: int, index: int) -> None:
        self._data = data
        self.name = name
        self._seed = seed
        self._index = index
        self.epoch = 0
        self.taken = 0
        self._iterator: Iterator[Any] | None = None
        self._state: tuple[Any, ...] | None = None
        self._generators = {
            g: g.initial_seed() for g in _of_parts(data, "generator") if isinstance(g, torch.Generator)
        }
        shares = (data, *_of_parts(data, "sampler"))
        if rank_and_size()[1] > 1 and any(isinstance(part, DistributedSampler) for part in shares):
            raise ValueError(
                f"the data of objective {name!r} has a DistributedSampler, expected all batches in every process: they "
                "share out each step's `accumulate` batches themselves; leave the sampler out"
            )

    @property
    def length(self) -> int | None:
        """Batches in an epoch, where the iterable knows."""
        try:
            return len(self._data)  # type: ignore[arg-type]
        except TypeError:  # a generator, or a DataLoader over an iterable data set
            return None

    def take(self) -> Any:
        """The next batch.

        Raises:
            ValueError: the iterable is empty, or is a one-time iterator that has ended.
        """
        with self._own_random_state():
            if self._iterator is None:
                self._begin_epoch()
            batch = next(self._iterator, _END)  # type: ignore[arg-type]
            if batch is _END:
                self.epoch, self.taken = self.epoch + 1, 0
                self._begin_epoch()
                batch = next(self._iterator, _END)  # type: ignore[arg-type]
            if batch is _END and self.length == 0:
                raise ValueError(f"the data of objective {self.name!r} has no batch, expected at least one")
            if batch is _END:
                raise ValueError(
                    f"the data of objective {self.name!r} ended after {self.epoch} rounds and cannot begin again; "
                    "pass a list, a DataLoader or another iterable that can be iterated repeatedly"
                )
            self.taken += 1
            return batch

    def seek(self, epoch: int, taken: int) -> None:
        """Go to the place after `taken` batches of an epoch.

        Raises:
            ValueError: the epoch has fewer batches.
        """
        self.epoch, self.taken, self._iterator, self._state = epoch, 0, None, None
        for done in range(taken):
            self.take()
            if (
                self.epoch != epoch
            ):  # the data ended and began again: the place that is looked for is not there
                raise ValueError(
                    f"the data of objective {self.name!r} has {done} batches, but the run stands after batch {taken}; "
                    "resume it with the data that it began with, or name another checkpoint file to start anew"
                )

    def _begin_epoch(self) -> None:
        # A large odd multiplier keeps neighbouring seeds, objectives and epochs apart. The host's states alone: data
        # is drawn there, and seeding the GPUs as well would repeat the model's dropout with every epoch.
        number = self._seed * 1_000_003 + self._index * 7_919 + self.epoch
        seed_random_state(number % (1 << 63))
        for generator, own in self._generators.items():
            generator.manual_seed((own * 15_485_863 + number) % (1 << 63))
        self._iterator = iter(self._data)

    @contextmanager
    def _own_random_state(self) -> Iterator[None]:
        generators = list(self._generators)
        outside = host_states(generators)
        if self._state is not None:
            set_host_states(self._state, generators)
        try:
            yield
        finally:
            self._state = host_states(generators)
            set_host_states(outside, generators)


def _of_parts(data: Any, name: str) -> list[Any]:
    """An attribute of a DataLoader and its samplers, of each that has it."""
    parts = [data, getattr(data, "sampler", None), getattr(data, "batch_sampler", None)]
    parts.append(getattr(parts[2], "sampler", None))
    return [getattr(part, name) for part in parts if hasattr(part, name)]


_END = object()
