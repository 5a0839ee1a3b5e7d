"""What the tests of the GPU path share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.kernel_folder import write_kernels


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of kernels for the fake driver."""
    return write_kernels(tmp_path_factory.mktemp("kernels") / "all")
