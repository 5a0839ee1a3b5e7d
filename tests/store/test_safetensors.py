"""Safetensors files: both ways with the reference library, mapped without copies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paretofuse.engine.dtypes import TO_TORCH
from paretofuse.engine.layout import ITEM_SIZE
from paretofuse.engine.store.reader import Store
from paretofuse.engine.store.safetensors_file import SafetensorsFile, SafetensorsWriter
from tests.support.stores import random_bytes


@st.composite
def tensor_lists(draw: st.DrawFn) -> list[tuple[str, str, tuple[int, ...]]]:
    names = draw(st.lists(st.text(min_size=1, max_size=12), unique=True, max_size=6))
    names = [name for name in names if name != "__metadata__" and name.isprintable()]
    shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
    return [(name, draw(st.sampled_from(sorted(ITEM_SIZE))), draw(shapes)) for name in names]


@given(tensors=tensor_lists(), seed=st.integers(0, 2**32 - 1), reserve=st.integers(0, 500))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_written_files_are_read_by_safetensors_and_by_us(
    tmp_path: Path, tensors: list[tuple[str, str, tuple[int, ...]]], seed: int, reserve: int
) -> None:
    rng = np.random.default_rng(seed)
    content = {
        name: random_bytes(rng, int(np.prod(shape, dtype=int)) * ITEM_SIZE[dtype])
        for name, dtype, shape in tensors
    }
    path = tmp_path / "x.safetensors"
    with SafetensorsWriter(path, metadata={"format": "pt"}, reserve=reserve) as writer:
        for name, dtype, shape in tensors:
            writer.add(name, dtype, shape, [content[name]])
    theirs = safetensors.torch.load_file(path)
    ours = SafetensorsFile(path)
    assert set(theirs) == set(ours.tensors) == set(content)
    assert ours.metadata == {"format": "pt"}
    for name, dtype, shape in tensors:
        view = ours.tensors[name]
        assert (view.dtype, view.shape, view.nbytes) == (dtype, shape, content[name].size)
        np.testing.assert_array_equal(view.data, content[name])
        assert theirs[name].dtype == TO_TORCH[dtype]
        assert tuple(theirs[name].shape) == shape
        raw = (
            theirs[name].reshape(-1).view(torch.uint8)
            if content[name].size
            else torch.empty(0, dtype=torch.uint8)
        )
        np.testing.assert_array_equal(raw.numpy(), content[name])


@given(tensors=tensor_lists(), seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_files_of_safetensors_are_read(
    tmp_path: Path, tensors: list[tuple[str, str, tuple[int, ...]]], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    content = {}
    for name, dtype, shape in tensors:
        size = int(np.prod(shape, dtype=int)) * ITEM_SIZE[dtype]
        raw = torch.from_numpy(random_bytes(rng, size) & 1)  # 0 and 1 are bytes of every dtype, booleans too
        typed = raw.view(TO_TORCH[dtype]) if size else torch.empty(0, dtype=TO_TORCH[dtype])
        content[name] = typed.reshape(shape)
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(content, path, metadata={"made": "by them"})
    ours = SafetensorsFile(path)
    assert ours.metadata == {"made": "by them"}
    assert set(ours.tensors) == set(content)
    for name, dtype, shape in tensors:
        view = ours.tensors[name]
        assert (view.dtype, view.shape) == (dtype, shape)
        if view.nbytes:
            assert view.address % ITEM_SIZE[dtype] == 0
            tensor = torch.frombuffer(view.data, dtype=TO_TORCH[dtype]).reshape(
                shape
            )  # no warning: it is writable
            assert torch.equal(
                tensor.reshape(-1).view(torch.uint8), content[name].reshape(-1).view(torch.uint8)
            )


def test_views_map_the_file_without_copies_and_never_change_it(store: Path) -> None:
    before = (store / "base.safetensors").read_bytes()
    opened = Store.open(store)
    whole = opened.files[0].data
    for view in opened.base.values():
        assert np.shares_memory(view.data, whole) or view.nbytes == 0
        view.data[...] = 255
    assert (store / "base.safetensors").read_bytes() == before


def test_unaligned_tensors_are_copied_to_an_aligned_address(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    content = random_bytes(rng, 8 * 16).reshape(16, 8)
    with SafetensorsWriter(tmp_path / "x") as writer:
        writer.add("odd", "U8", (1,), [b"\0"])
        for i, row in enumerate(content):
            writer.add(f"double{i}", "F64", (1,), [row])
    file = SafetensorsFile(tmp_path / "x")
    for i, row in enumerate(content):
        assert file.tensors[f"double{i}"].offset % 8 == 1
        assert file.tensors[f"double{i}"].address % 8 == 0
        np.testing.assert_array_equal(file.tensors[f"double{i}"].data, row)


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (lambda w: w.add("t", "F32", (2,), [b"1234"]), "got 4 bytes for tensor 't', expected 8"),
        (lambda w: w.add("t", "F32", (1,), [b"12345678"]), "got 8 bytes for tensor 't', expected 4"),
        (lambda w: w.add("t", "F99", (1,), [b"1234"]), "F99"),
        (lambda w: (w.add("t", "U8", (1,), [b"1"]), w.add("t", "U8", (1,), [b"1"])), "twice"),
        (lambda w: w.write(b"1"), "begin"),
        (lambda w: w.end(), "begin"),
        (lambda w: (w.begin("t", "U8", (1,)), w.begin("u", "U8", (1,))), "before the end of 't'"),
        (lambda w: w.begin("t", "U8", (1,)), "within tensor 't'"),
        (lambda w: w.add("__metadata__", "U8", (1,), [b"1"]), "__metadata__"),
    ],
)
def test_writer_refuses(tmp_path: Path, use: Callable[[SafetensorsWriter], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words), SafetensorsWriter(tmp_path / "x") as writer:
        use(writer)
