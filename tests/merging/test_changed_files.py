"""An engine over mapped files notices when they are rewritten in place, before it merges; a touch is nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import paretofuse as pf
from paretofuse.engine.errors import StoreError
from tests.support.models import Net, net_and_experts

R = {"a": 0.25, "b": 0.75}
USES: dict[str, Callable[[pf.Engine], Any]] = {
    "switch": lambda engine: engine.switch(R),
    "merge": lambda engine: engine.merge(R),
    "train_at": lambda engine: engine.train_at(R),
    "replica": lambda engine: engine.replica(R).__enter__(),
}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    base, experts = net_and_experts(count=2)
    pf.stack(base, experts).save(tmp_path / "store")
    return tmp_path / "store"


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("file", ["base.safetensors", "experts/b.safetensors"])
def test_a_file_that_was_cut_or_rewritten_is_an_error(store: Path, use: str, backend: str, file: str) -> None:
    engine = pf.load(store, module=Net(), backend=backend)
    engine.switch({"a": 1.0})
    before = {name: tensor.clone() for name, tensor in engine.module.state_dict().items()}
    victim = store / file
    size = victim.stat().st_size
    with open(victim, "r+b") as opened:
        opened.truncate(100)  # reading on would end the process (SIGBUS)
    with pytest.raises(StoreError, match="was changed after it was opened; open the store again"):
        USES[use](engine)
    with open(victim, "r+b") as opened:
        opened.truncate(size)  # the size of then, other bytes
    with pytest.raises(StoreError, match="was changed"):
        USES[use](engine)
    for name, tensor in engine.module.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("use", USES)
def test_a_file_that_was_touched_is_not(store: Path, use: str) -> None:
    engine = pf.load(store, module=Net())
    for path in store.rglob("*.safetensors"):
        os.utime(path)
    USES[use](engine)
