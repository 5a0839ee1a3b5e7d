"""Streams of batches: their order, any place again, and whatever draws random numbers in them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, TensorDataset

import paretofuse as pf
from paretofuse.engine.training.batches import Batches
from tests.training.test_fit import equal, loss, problem, state
from tests.training.test_resume import Stream


class Shuffled:
    """Batches in an order that Python or NumPy draws."""

    def __init__(self, shuffle: Callable[[Any], None]) -> None:
        self.shuffle = shuffle

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = list(range(5))
        self.shuffle(order)
        rows = list(Stream(20))
        for i in order:
            x, y = zip(*rows[4 * i : 4 * i + 4], strict=True)
            yield torch.stack(x), torch.stack(y)


def random_data(kind: str) -> Any:
    rows = list(Stream(20))
    own = torch.Generator().manual_seed(8)
    given: dict[str, Any] = {
        "generator": {"shuffle": True, "generator": own},
        "sampler": {"sampler": RandomSampler(rows, generator=own)},
        "augmented": {"collate_fn": lambda b: [torch.stack(x) + np.random.rand() for x in zip(*b, strict=True)]},  # noqa: NPY002
    }  # fmt: skip
    if kind in given:
        return DataLoader(rows, batch_size=4, **given[kind])  # type: ignore[arg-type]
    return Shuffled(random.shuffle if kind == "python" else np.random.shuffle)


def noisy(module: nn.Module, batch: Any) -> Tensor:
    return loss(module, (batch[0] + random.random() + np.random.randn(), batch[1]))  # noqa: NPY002


@pytest.mark.parametrize("kind", ["generator", "sampler", "augmented", "python", "numpy", "loss"])
def test_whatever_draws_random_numbers_repeats_and_resumes(tmp_path: Path, kind: str) -> None:
    def trained(data: Any, **settings: Any) -> dict[str, Tensor]:
        random.seed()  # as in another process
        np.random.seed()  # noqa: NPY002
        own = data.sampler.generator.get_state() if kind in ("generator", "sampler") else None
        engine, _ = problem()
        called = noisy if kind == "loss" else loss
        pf.fit(
            engine, {name: (data, called) for name in engine.objectives}, steps=12, progress=False, **settings
        )
        assert own is None or torch.equal(data.sampler.generator.get_state(), own)
        return state(engine)

    data = random_data(kind)
    whole = trained(data)
    assert equal(trained(data), whole)
    path = tmp_path / "run.ckpt"
    trained(data, checkpoint=path, callback=lambda record: record["step"] == 7)
    assert equal(trained(random_data(kind), checkpoint=path), whole)


def test_the_seed_of_a_loaders_own_generator_counts() -> None:
    def first(seed: int) -> Tensor:
        loader = DataLoader(
            TensorDataset(torch.arange(32)),
            batch_size=8,
            shuffle=True,
            generator=torch.Generator().manual_seed(seed),
        )
        found: Tensor = Batches(loader, "left", 3, 0).take()[0]
        return found

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


def shuffled(seed: int = 3, index: int = 0) -> Batches:
    return Batches(
        DataLoader(TensorDataset(torch.arange(32)), batch_size=8, shuffle=True), "left", seed, index
    )


def orders(batches: Batches, epochs: int) -> list[list[int]]:
    return [[int(x) for _ in range(4) for x in batches.take()[0]] for _ in range(epochs)]


def test_each_epoch_seed_and_objective_has_an_order_of_its_own() -> None:
    found = [*orders(shuffled(), 3), *orders(shuffled(seed=4), 1), *orders(shuffled(index=1), 1)]
    assert all(sorted(order) == list(range(32)) for order in found)
    assert len({tuple(order) for order in found}) == len(found)
    assert orders(shuffled(), 3) == found[:3]


def test_one_processs_share_of_the_data_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = TensorDataset(torch.arange(32))
    sampler: Any = DistributedSampler(rows, num_replicas=2, rank=0)
    shared = DataLoader(rows, batch_size=8, sampler=sampler)
    in_batches = DataLoader(rows, batch_sampler=BatchSampler(sampler, 8, drop_last=False))
    for loader in (shared, in_batches):
        Batches(loader, "left", 3, 0)  # a process alone may learn from a part
        with monkeypatch.context() as several:
            several.setattr("paretofuse.engine.training.batches.rank_and_size", lambda: (0, 2))
            Batches(DataLoader(rows, batch_size=8, shuffle=True), "left", 3, 0)
            with pytest.raises(
                ValueError, match="'left' has a DistributedSampler, expected all batches in every"
            ):
                Batches(loader, "left", 3, 0)


@pytest.mark.parametrize("taken", [0, 1, 3, 4])
def test_seek_finds_any_place(taken: int) -> None:
    stream = shuffled()
    for _ in range(4 + taken):
        stream.take()
    place = stream.epoch, stream.taken
    other = shuffled()
    other.take()
    other.seek(*place)
    assert (other.epoch, other.taken) == place
    assert torch.equal(stream.take()[0], other.take()[0])
