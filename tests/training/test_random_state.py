"""Random states: of the CPU and of the GPUs in use, and of no others."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from paretofuse.engine.training import random_state


class Generator:
    """Stands for a GPU's."""

    def __init__(self) -> None:
        self.seeds: list[int] = []

    def manual_seed(self, number: int) -> None:
        self.seeds.append(number)


@pytest.fixture
def three_gpus(monkeypatch: pytest.MonkeyPatch) -> list[Generator]:
    generators = [Generator() for _ in range(3)]
    states = {index: torch.full((4,), index, dtype=torch.uint8) for index in range(3)}
    monkeypatch.setattr(torch.cuda, "default_generators", generators)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda index: states[index].clone())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, index: states.__setitem__(index, state))
    return generators


def test_which_gpus_are_in_use(three_gpus: list[Generator]) -> None:
    devices = [torch.device(name) for name in ("cuda:1", "cpu", "cuda:0", "cuda", "cuda:1", "meta")]
    assert random_state.gpus_of(devices) == (0, 1, 2)
    assert random_state.gpus_of([*devices, torch.device("cuda:2")]) == (0, 1, 2)
    assert random_state.gpus_of([torch.device("cpu")]) == ()


def test_only_those_are_seeded(three_gpus: list[Generator]) -> None:
    with random_state.forked(()):
        random_state.seed(5, (0, 2))
        first = torch.rand(3)
        random_state.seed(5)
        assert torch.equal(torch.rand(3), first)
        random_state.seed(6)
        assert not torch.equal(torch.rand(3), first)
    assert [generator.seeds for generator in three_gpus] == [[5], [], [5]]


def test_states_go_and_come_back(three_gpus: list[Generator]) -> None:
    with random_state.forked(()):
        states = random_state.random_states((0, 2))
        assert list(states) == ["cpu", "python", "numpy", "cuda.0", "cuda.2"]
        first = torch.rand(3)
        states["cuda.0"] = torch.full((4,), 9, dtype=torch.uint8)
        del states["cuda.2"]  # written on a machine with one GPU
        random_state.set_random_states(states, (0, 2))
        assert torch.equal(torch.rand(3), first)
    assert [int(torch.cuda.get_rng_state(index)[0]) for index in range(3)] == [9, 1, 2]


def test_a_fork_gives_the_state_back(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    fork = torch.random.fork_rng
    monkeypatch.setattr(
        torch.random, "fork_rng", lambda devices: (asked.append(devices), fork(devices=[]))[1]
    )
    before = torch.get_rng_state()
    with random_state.forked((1, 2)):
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    assert asked == [[1, 2]]


def draws() -> list[float]:
    """Of each kind, normal numbers too: of those the generators make two and hold one back."""
    return [float(torch.rand(())), random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()]  # noqa: NPY002


def test_python_and_numpy_are_seeded_kept_and_given_back() -> None:
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    outside = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    with random_state.forked(()):
        random_state.seed(5)
        first = draws()
        states = random_state.random_states(())
        second = draws()
        random_state.seed(5)
        assert draws() == first
        random_state.set_random_states(states, ())
        assert draws() == second
        del states["python"], states["numpy"]  # written by a version that kept torch's alone
        random_state.set_random_states(states, ())
        assert draws()[0] == second[0]
    assert (random.getstate(), np.random.get_state()[1].tolist()) == outside  # noqa: NPY002


def test_another_generator_that_somebody_gave_to_numpy_is_left_alone() -> None:
    own = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(3))
    try:
        before = np.random.get_state(legacy=False)  # noqa: NPY002
        with random_state.forked(()):
            random_state.seed(5)
            states = random_state.random_states(())
            assert list(states) == ["cpu", "python"]
            random_state.set_random_states(states, ())
        assert np.random.get_state(legacy=False) == before  # noqa: NPY002
    finally:
        np.random.set_bit_generator(own)
