"""Replicas under load, and the library under the sanitizers."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

import paretofuse as pf
from tests.support import cpplib
from tests.support.models import net_and_experts


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stores") / "net"
    base, experts = net_and_experts()
    pf.stack(base, experts, route="tensor").save(path)
    return path


def result(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [1, 3, 9])
def test_eight_threads_under_the_thread_sanitizer(store: Path, replicas: int) -> None:
    """More preferences than replicas, so that most calls merge; and as many, so that most do not."""
    options = ["-DPARETOFUSE_TESTS=ON", "-DPARETOFUSE_STD_THREADS=ON", "-DPARETOFUSE_SANITIZE=thread"]
    folder = cpplib.build("tsan", *options, targets=["stress_replicas"])
    seconds = 5 if replicas == 3 else 2
    printed = result(folder / "stress_replicas", store, str(seconds), "8", str(replicas), "6")
    acquired, wrong = (int(part.split()[0]) for part in printed.strip().split(", "))
    assert wrong == 0
    assert acquired > 1000


def test_eight_threads_at_full_speed(store: Path) -> None:
    folder = cpplib.build("release", "-DCMAKE_BUILD_TYPE=Release", "-DPARETOFUSE_TESTS=ON")
    assert "0 wrong" in result(folder / "stress_replicas", store, "2", "8", "3", "6")


@pytest.mark.slow
def test_ten_thousand_switches_leak_nothing(store: Path) -> None:
    options = ["-DPARETOFUSE_TESTS=ON", "-DPARETOFUSE_SANITIZE=address,undefined"]
    folder = cpplib.build("asan", *options, targets=["soak"])
    # Freed memory goes to the sanitizer's quarantine first, which must not pass for growth.
    result(folder / "soak", store, "10000", ASAN_OPTIONS="detect_leaks=1:quarantine_size_mb=1")


def test_memory_stays_flat_over_ten_thousand_switches(store: Path) -> None:
    folder = cpplib.build("release", "-DCMAKE_BUILD_TYPE=Release", "-DPARETOFUSE_TESTS=ON")
    result(folder / "soak", store, "10000")
