"""Replicas under load, and the library under the sanitizers."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import paretofuse as pf
from tests.support import cpplib, waiting
from tests.support.models import net_and_experts, perturbed
from tests.support.process import run


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stores") / "net"
    base, experts = net_and_experts()
    pf.stack(base, experts, route="tensor").save(path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("replicas", "calls"), [(1, 150), (3, 500), (9, 300), pytest.param(3, 40_000, marks=pytest.mark.long)]
)
def test_eight_threads_under_the_thread_sanitizer(store: Path, replicas: int, calls: int) -> None:
    """More preferences than replicas, so that most calls merge; and as many, so that most do not."""
    folder = cpplib.build("tsan", "stress_replicas")
    assert run(folder / "stress_replicas", store, str(calls), "8", str(replicas), "6") == "0 wrong\n"


def test_eight_threads_at_full_speed(release: Path, store: Path) -> None:
    assert run(release / "stress_replicas", store, "3000", "8", "3", "6") == "0 wrong\n"


SWITCHES = pytest.mark.parametrize("switches", [10_000, pytest.param(500_000, marks=pytest.mark.long)])


@pytest.mark.slow
@SWITCHES
def test_many_switches_leak_nothing(store: Path, switches: int) -> None:
    folder = cpplib.build_for_leaks("soak")
    # Freed memory goes to the sanitizer's quarantine first, which must not pass for growth.
    run(folder / "soak", store, str(switches), ASAN_OPTIONS="detect_leaks=1:quarantine_size_mb=1")


@SWITCHES
def test_memory_stays_flat_over_many_switches(release: Path, store: Path, switches: int) -> None:
    run(release / "soak", store, str(switches))


KEYS = {"a": [1.0, 0.0, 0.0], "b": [0.0, 1.0, 0.0], "c": [0.0, 0.0, 1.0], "d": [0.5, 0.25, 0.25]}


def in_time(library: cpplib.Library, store: Path) -> tuple[waiting.Acquire, waiting.Release]:
    """Of an engine with two replicas; a timeout becomes Python's own."""
    engine = library.open(store, threads=1, replicas=2)

    def acquire(key: str, timeout: float | None) -> cpplib.Replica:
        try:
            return engine.acquire(KEYS[key], timeout)
        except cpplib.LibraryError as error:
            raise TimeoutError if error.status == library.TIMEOUT else error from error

    return acquire, cpplib.Replica.release


@pytest.mark.parametrize(
    "check",
    [
        waiting.check_nobody_starves,
        waiting.check_a_waiter_that_gives_up_leaves_no_trace,
        waiting.check_a_holder_that_waits_is_served_by_the_other,
    ],
)
def test_waiting_for_replicas(
    library: cpplib.Library,
    store: Path,
    check: Callable[[waiting.Acquire, waiting.Release, type[Exception]], None],
) -> None:
    acquire, release = in_time(library, store)
    check(acquire, release, TimeoutError)


def test_timeouts(library: cpplib.Library, store: Path) -> None:
    engine = library.open(store, threads=1, replicas=1)
    for timeout in (float("nan"), -1.0, float("-inf")):
        with pytest.raises(cpplib.LibraryError, match=r"timeout: got .* expected 0 or more") as refused:
            engine.acquire(KEYS["a"], timeout)
        assert refused.value.status == library.INVALID
    held = engine.acquire(KEYS["a"], 0.0)
    with pytest.raises(cpplib.LibraryError, match=r"no replica became free within 0\.0.* 1 in all") as late:
        engine.acquire(KEYS["b"], 0.0)
    assert late.value.status == library.TIMEOUT
    held.release()
    for timeout in (float("inf"), 1e300, 1e18):
        engine.acquire(KEYS["b"], timeout).release()


def test_an_invalid_preference_costs_no_replica(library: cpplib.Library, store: Path) -> None:
    """Nothing is merged anew for the good one afterwards: its tensors were overwritten by hand, and stay so."""
    engine = library.open(store, threads=1, replicas=1)
    first = engine.acquire(KEYS["a"])
    name = next(n for n in engine.names("tensor") if n == "first.weight")
    view = first.view(name)
    ctypes.memset(view.data, 0x11, view.nbytes)
    marked = view.array()
    first.release()
    for wrong in ([0.5, 0.5, 0.5], [float("nan"), 0.5, 0.5], [1.5, -0.5, 0.0], [1.0], []):
        with pytest.raises(cpplib.LibraryError) as refused:
            engine.acquire(wrong)
        assert refused.value.status == library.INVALID
    again = engine.acquire(KEYS["a"], 0.0)
    assert np.array_equal(again.view(name).array(), marked)
    again.release()


FORKED = """
import os, signal, sys
from pathlib import Path
from tests.support import cpplib

library = cpplib.Library(Path(sys.argv[1]))
engine = library.open(Path(sys.argv[2]), threads=4)
engine.switch([0.2, 0.3, 0.5])  # starts libgomp's threads
engine.acquire([1.0, 0.0, 0.0]).release()
child = os.fork()
if child == 0:
    signal.alarm(100)  # a child that hangs is killed
    engine.switch([0.5, 0.3, 0.2])
    found = {name: array.tobytes() for name, array in engine.tensors().items()}
    fresh = library.open(Path(sys.argv[2]), threads=1)
    fresh.switch([0.5, 0.3, 0.2])
    same = found == {name: array.tobytes() for name, array in fresh.tensors().items()}
    replica = engine.acquire([0.0, 1.0, 0.0], 50.0)
    os._exit(0 if same else 3)
status = os.waitpid(child, 0)[1]
engine.switch([0.1, 0.1, 0.8])  # the parent goes on
sys.exit(os.waitstatus_to_exitcode(status) % 256)
"""


def test_a_forked_process_merges(library: cpplib.Library, tmp_path: Path) -> None:
    big = torch.nn.Linear(512, 700)  # several chunks of work, so that more than one thread has some
    pf.stack(big, {name: perturbed(big, seed) for seed, name in enumerate("abc")}).save(tmp_path / "store")
    run(sys.executable, "-c", FORKED, library.c._name, str(tmp_path / "store"), cwd=cpplib.ROOT)
