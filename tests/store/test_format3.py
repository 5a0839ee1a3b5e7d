"""Stores of format 3 are read for ever: one of more planes than objectives gives the tensors that it gave when new."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import paretofuse as pf
from paretofuse.engine.layout import Member
from paretofuse.engine.merging.disk import merge_store
from paretofuse.engine.store.reader import Store
from tests.store.test_format1 import PREFERENCE

DATA = Path(__file__).parent / "data"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    shutil.copytree(DATA / "format3.pareto", tmp_path / "store")
    return tmp_path / "store"


def test_it_opens(store: Path) -> None:
    opened = Store.open(store)
    opened.verify()
    assert opened.layout.objectives == ("news", "poems")
    assert opened.layout.members == (
        Member("a", "news", 0.5), Member("b", "poems", 1.0), Member("ties", None, 0.0), Member("a2", "news", 0.5),
    )  # fmt: skip
    assert opened.family == "rows"


def test_it_merges_to_the_bytes_of_then(store: Path, tmp_path: Path) -> None:
    truth = load_file(DATA / "format3.merged.safetensors")
    merged = merge_store(store, PREFERENCE, tmp_path / "out.safetensors").path
    for got in (load_file(merged), pf.load(store).merge_state_dict(PREFERENCE)):
        assert got.keys() == truth.keys()
        assert all(torch.equal(got[name], tensor) for name, tensor in truth.items())
