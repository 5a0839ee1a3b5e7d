"""Replicas under load, and the library under the sanitizers."""

from __future__ import annotations

from pathlib import Path

import pytest

import paretofuse as pf
from tests.support import cpplib
from tests.support.models import net_and_experts
from tests.support.process import run


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stores") / "net"
    base, experts = net_and_experts()
    pf.stack(base, experts, route="tensor").save(path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("replicas", "seconds"), [(1, 2), (3, 5), (9, 2), pytest.param(3, 300, marks=pytest.mark.long)]
)
def test_eight_threads_under_the_thread_sanitizer(store: Path, replicas: int, seconds: int) -> None:
    """More preferences than replicas, so that most calls merge; and as many, so that most do not."""
    folder = cpplib.build("tsan", "stress_replicas")
    printed = run(folder / "stress_replicas", store, str(seconds), "8", str(replicas), "6")
    acquired, wrong = (int(part.split()[0]) for part in printed.strip().split(", "))
    assert wrong == 0
    assert acquired > 1000


def test_eight_threads_at_full_speed(release: Path, store: Path) -> None:
    assert "0 wrong" in run(release / "stress_replicas", store, "2", "8", "3", "6")


SWITCHES = pytest.mark.parametrize("switches", [10_000, pytest.param(500_000, marks=pytest.mark.long)])


@pytest.mark.slow
@SWITCHES
def test_many_switches_leak_nothing(store: Path, switches: int) -> None:
    folder = cpplib.build("asan", "soak")
    # Freed memory goes to the sanitizer's quarantine first, which must not pass for growth.
    run(folder / "soak", store, str(switches), ASAN_OPTIONS="detect_leaks=1:quarantine_size_mb=1")


@SWITCHES
def test_memory_stays_flat_over_many_switches(release: Path, store: Path, switches: int) -> None:
    run(release / "soak", store, str(switches))
