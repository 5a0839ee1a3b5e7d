"""What the tests of the GPU path share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.fake_cuda import Driver, write_kernels


@pytest.fixture
def driver(release: Path) -> Driver:
    """The fake driver, as if nothing had been called."""
    (path,) = release.glob("libfake_cuda.*")
    fake = Driver(path)
    fake.reset()
    return fake


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of kernels for the fake driver."""
    return write_kernels(tmp_path_factory.mktemp("kernels") / "all")
