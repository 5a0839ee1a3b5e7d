"""Stores of format 1 are read for ever: one that the first release wrote gives the tensors that it gave then."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import paretofuse as pf
from paretofuse.engine.merging.disk import merge_store
from paretofuse.engine.store.reader import Store
from tests.support.models import Net

DATA = Path(__file__).parent / "data"
PREFERENCE = [0.25, 0.75]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    shutil.copytree(DATA / "format1.pareto", tmp_path / "store")
    return tmp_path / "store"


def assert_same_bits(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, truth in expected.items():
        assert (got[name].dtype, got[name].shape) == (truth.dtype, truth.shape), name
        assert got[name].numpy().tobytes() == truth.numpy().tobytes(), name


def test_it_opens(store: Path) -> None:
    opened = Store.open(store)
    opened.verify()
    assert opened.layout.objectives == ("a", "b")
    assert opened.layout.groups == ("first", "head")
    assert (opened.init, opened.layout.static_weight) == ("sqrt", 0.3)
    assert {spec.role for spec in opened.layout.tensors} == {"routed", "static", "constant"}
    assert set(opened.heads) == {"a", "b"}
    assert opened.training is None
    assert opened.trained
    assert opened.model_files("b") == {"notes.txt": b"of b\n", "tokenizer/vocabulary.txt": "naïve\n".encode()}


@pytest.mark.parametrize("head", [None, "b"])
def test_it_merges_to_the_bytes_of_then(store: Path, tmp_path: Path, head: str | None) -> None:
    truth = load_file(DATA / f"format1.{head or 'base'}.safetensors")
    merged = merge_store(store, PREFERENCE, tmp_path / "out", head=head).path
    assert_same_bits(load_file(merged / "model.safetensors"), truth)
    assert (merged / "notes.txt").read_bytes() == (b"of b\n" if head else b"of the base\n")
    assert_same_bits(pf.load(store).merge_state_dict(PREFERENCE, head=head), truth)


def test_it_switches_to_the_bytes_of_then(store: Path) -> None:
    engine = pf.load(store, module=Net(), verify=True)
    engine.switch(PREFERENCE)
    assert_same_bits(dict(engine.module.state_dict()), load_file(DATA / "format1.base.safetensors"))
