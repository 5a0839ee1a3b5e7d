"""What the store's tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.stores import write_store


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write_store(tmp_path / "store")
    return tmp_path / "store"
