"""What tests of several folders share."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub

import paretofuse as pf
from tests.support import cpplib
from tests.support.fake_cuda import Driver
from tests.support.models import net_and_experts


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first: the builds that they need go on while the other worker has quick ones, and none is the last."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish() -> None:
    """What is imported by now stays: the garbage collector need not look through millions of objects at every turn."""
    gc.collect()
    gc.freeze()


class _Kept(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture
def logged() -> Iterator[list[logging.LogRecord]]:
    """What is logged during a test, warnings and worse."""
    handler = _Kept()
    logging.getLogger().addHandler(handler)
    yield handler.records
    logging.getLogger().removeHandler(handler)


@pytest.fixture(scope="session")
def release() -> Path:
    """The folder of libparetofuse's release build."""
    return cpplib.build("release")


@pytest.fixture
def driver(release: Path) -> Driver:
    """The fake CUDA driver, as if nothing had been called."""
    (path,) = release.glob("libfake_cuda.*")
    fake = Driver(path)
    fake.reset()
    return fake


@pytest.fixture(scope="session")
def library(release: Path) -> cpplib.Library:
    """libparetofuse's C interface."""
    return cpplib.Library(cpplib.shared_library(release))


@pytest.fixture(scope="session")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where libparetofuse is installed."""
    return cpplib.install(tmp_path_factory.mktemp("prefix"))


@pytest.fixture(scope="session")
def two_experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a small net and two experts, "a" and "b"."""
    path = tmp_path_factory.mktemp("stores") / "net"
    base, experts = net_and_experts(count=2)
    pf.stack(base, experts).save(path)
    return path
