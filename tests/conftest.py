"""What tests of several folders share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub

import paretofuse as pf
from tests.support import cpplib
from tests.support.models import net_and_experts


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first: the builds that they need go on while the other worker has quick ones, and none is the last."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def release() -> Path:
    """The folder of libparetofuse's release build."""
    return cpplib.build("release")


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
