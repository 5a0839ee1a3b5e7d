"""Stores of format 2 are read for ever: one of planes of every format gives the tensors that it gave when new."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import paretofuse as pf
from paretofuse.engine.merging.disk import merge_store
from paretofuse.engine.store.reader import Store
from tests.store.test_format1 import PREFERENCE

DATA = Path(__file__).parent / "data"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    shutil.copytree(DATA / "format2.pareto", tmp_path / "store")
    return tmp_path / "store"


def test_it_opens(store: Path) -> None:
    opened = Store.open(store)
    opened.verify()
    formats = [{name: plane.format for name, plane in own.items()} for own in opened.planes]
    assert formats == [
        {"byte.weight": "int8", "half.weight": "int4", "odd.weight": "int4", "low.weight": "lowrank"},
        {"half.weight": "int4", "low.weight": "lowrank"},
    ]
    assert [sorted(own) for own in opened.deltas] == [["bias"], ["bias", "byte.weight", "whole.weight"]]


def test_it_merges_to_the_bytes_of_then(store: Path, tmp_path: Path) -> None:
    truth = load_file(DATA / "format2.merged.safetensors")
    merged = merge_store(store, PREFERENCE, tmp_path / "out.safetensors").path
    for got in (load_file(merged), pf.load(store).merge_state_dict(PREFERENCE)):
        assert got.keys() == truth.keys()
        assert all(torch.equal(got[name], tensor) for name, tensor in truth.items())
