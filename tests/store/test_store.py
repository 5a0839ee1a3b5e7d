"""Stores: strict reading of files and manifests (with attack files), exact round trips, atomic writing."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paretofuse.engine.dtypes import TO_TORCH
from paretofuse.engine.errors import StoreError
from paretofuse.engine.extension import _C
from paretofuse.engine.layout import ITEM_SIZE, Layout, TensorSpec
from paretofuse.engine.routing.routers import Routers
from paretofuse.engine.store.reader import Store
from paretofuse.engine.store.safetensors_file import SafetensorsFile, SafetensorsWriter, TensorData
from paretofuse.engine.store.writer import StoreWriter

SPECS = (
    TensorSpec("steps", (), "I64", "constant", None, "I64"),
    TensorSpec("a.weight", (3, 5), "F32", "routed", "a", "BF16", ("tied.weight",)),
    TensorSpec("a.bias", (5,), "F32", "static", None, "BF16"),
    TensorSpec("b.weight", (7, 1), "BF16", "routed", "b", "BF16"),
    TensorSpec("nothing", (0, 4), "BF16", "routed", "b", "BF16"),
    TensorSpec("mask", (3,), "BOOL", "constant", None, "BOOL"),
)
OBJECTIVES = ("cola", "sst2")
LAYOUT = Layout(OBJECTIVES, SPECS, 0.3)


def random_bytes(rng: np.random.Generator, nbytes: int) -> np.ndarray:
    return rng.integers(0, 256, nbytes, dtype=np.uint8)


def random_routers(rng: np.random.Generator, groups: int, experts: int) -> dict[str, np.ndarray]:
    shapes = {
        "hidden.weight": (groups, 4, experts),
        "hidden.bias": (groups, 4),
        "output.weight": (groups, experts, 4),
        "output.bias": (groups, experts),
    }
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def write_store(path: Path, seed: int = 0, layout: Layout = LAYOUT, **writer_options: Any) -> dict[str, Any]:
    """Write a store of random bytes and return what went into it."""
    rng = np.random.default_rng(seed)
    merged = layout.with_role("routed", "static")
    parts: dict[str, Any] = {
        "base": {s.name: random_bytes(rng, s.nbytes) for s in layout.tensors},
        "deltas": [
            {s.name: random_bytes(rng, s.numel * ITEM_SIZE[s.delta_dtype]) for s in merged[expert % 2 :]}
            for expert in range(len(layout.objectives))
        ],
        "routers": random_routers(rng, len(layout.groups), len(layout.objectives)),
    }
    with StoreWriter(path, objectives=layout.objectives, force=True, **writer_options) as writer:
        writer.write_base([(s.name, s.dtype, s.shape, [parts["base"][s.name]]) for s in layout.tensors])
        for objective, own in zip(layout.objectives, parts["deltas"], strict=True):
            # A generator, cut into pieces of one byte and the rest; None for what is left out.
            writer.write_expert(
                objective,
                (
                    (
                        s.name,
                        s.delta_dtype,
                        s.shape,
                        [own[s.name][:1], own[s.name][1:]] if s.name in own else None,
                    )
                    for s in merged
                ),
            )
        writer.write_routers("sqrt", parts["routers"])
        writer.write_head("cola", [("head.weight", "F32", (2, 2), [np.eye(2, dtype=np.float32)])])
        writer.add_model_file("config.json", b'{"labels": 1}')
        writer.add_model_file("sub/vocabulary.txt", "naïve\n".encode())
        writer.add_head_file("cola", "config.json", b'{"labels": 2}')
        writer.finish(layout, "torch.nn.Linear")
    return parts


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write_store(tmp_path / "store")
    return tmp_path / "store"


def edit_manifest(store: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads((store / "manifest.json").read_text())
    change(document)
    (store / "manifest.json").write_text(json.dumps(document))


# --- safetensors files: both ways with the reference library ---------------------------------------------------


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


# --- attack files ----------------------------------------------------------------------------------------------


def with_header(header: bytes | dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def check_message(error: StoreError, path: Path, words: str) -> None:
    """The message names the path, and says the words elsewhere (the path holds the test's own name)."""
    assert str(path) in str(error)
    assert re.search(words, str(error).replace(str(path), ""))


FOUR = b"1234"
ATTACKS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes"),
    "seven bytes": (b"1234567", "7 bytes"),
    "no header": (struct.pack("<Q", 0), "does not begin"),
    "truncated header": (with_header(b'{"t":', length=500), "truncated"),
    "huge header length": (with_header({}, length=2**63), "header"),
    "largest header length": (with_header({}, length=2**64 - 1), "header"),
    "header over the limit": (with_header({}, length=100_000_001), "header"),
    "pickle": (b"\x80\x04\x95" + b"\0" * 40, "header"),
    "not JSON": (with_header(b"{'t': 1}"), "damaged"),
    "unfinished JSON": (with_header(b'{"t": {"dtype"'), "damaged"),
    "list": (with_header(b"[]"), "does not begin"),
    "leading space": (with_header(b" {}"), "does not begin"),
    "bad UTF-8": (with_header(b'{"\xff\xfe": 1}'), "damaged"),
    "deep nesting": (with_header(b'{"t":' + b"[" * 500_000 + b"]" * 500_000 + b"}"), "damaged"),
    "deep objects": (with_header(b'{"t":' * 200_000 + b"1" + b"}" * 200_000), "damaged"),
    "long integer": (with_header(b'{"t":' + b"9" * 10_000 + b"}"), "damaged"),
    "NaN": (with_header(b'{"t":NaN}'), "damaged"),
    "duplicate names": (
        with_header(
            b'{"t":' + json.dumps(entry()).encode() + b',"t":' + json.dumps(entry()).encode() + b"}", FOUR
        ),
        "'t' appears twice",
    ),
    "duplicate keys": (
        with_header(b'{"t":{"dtype":"F32","dtype":"U8","shape":[1],"data_offsets":[0,4]}}', FOUR),
        "'dtype' appears twice",
    ),
    "entry no object": (with_header({"t": 5}), "should have"),
    "missing key": (with_header({"t": {"dtype": "F32", "shape": [1]}}, FOUR), "should have"),
    "further key": (with_header({"t": entry(strides=[1])}, FOUR), "should have"),
    "unknown dtype": (with_header({"t": entry("F31")}, FOUR), "'F31'"),
    "dtype no string": (with_header({"t": entry(["F32"])}, FOUR), "dtype"),
    "wrong dtype": (with_header({"t": entry("F16")}, FOUR), "F16"),
    "wrong shape": (with_header({"t": entry(shape=[2])}, FOUR), "takes 8"),
    "negative shape": (with_header({"t": entry(shape=[-1])}, FOUR), "shape"),
    "two negative sizes": (with_header({"t": entry(shape=[-1, -1])}, FOUR), "shape"),
    "float shape": (with_header({"t": entry(shape=[1.0])}, FOUR), "shape"),
    "boolean shape": (with_header({"t": entry(shape=[True])}, FOUR), "shape"),
    "shape no list": (with_header({"t": entry(shape=1)}, FOUR), "shape"),
    "overflowing shape": (with_header({"t": entry(shape=[2**62, 4])}, FOUR), "takes"),
    "sizes past 64 bits": (with_header({"t": entry(shape=[2**64, 0], offsets=(0, 0))}), "shape"),
    "negative offset": (with_header({"t": entry(offsets=(-4, 0))}, FOUR), "offsets"),
    "reversed offsets": (with_header({"t": entry(offsets=(4, 0))}, FOUR), "takes 4"),
    "three offsets": (with_header({"t": entry(offsets=(0, 4, 4))}, FOUR), "offsets"),
    "offsets past the end": (with_header({"t": entry(offsets=(0, 4))}, b"123"), "1 bytes are missing"),
    "offsets far away": (with_header({"t": entry(offsets=(2**62, 2**62 + 4))}, FOUR), "hole"),
    "overlap": (with_header({"t": entry(), "u": entry()}, FOUR), "overlaps"),
    "partial overlap": (with_header({"t": entry(), "u": entry(offsets=(2, 6))}, FOUR * 2), "overlaps"),
    "hole": (with_header({"t": entry(), "u": entry(offsets=(8, 12))}, FOUR * 3), "hole"),
    "bytes behind": (with_header({"t": entry()}, FOUR + b"5"), "too many"),
    "twice among many": (
        with_header(b"{" + b",".join(b'"%d":0' % (i % 300_000) for i in range(300_001)) + b"}"),
        "'0' appears twice",
    ),
    "metadata no object": (with_header({"__metadata__": 5}), "metadata"),
    "metadata no strings": (with_header({"__metadata__": {"a": 1}}), "metadata"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_files(tmp_path: Path, name: str) -> None:
    content, words = ATTACKS[name]
    path = tmp_path / "attack.safetensors"
    path.write_bytes(content)
    with pytest.raises(StoreError) as caught:
        SafetensorsFile(path)
    check_message(caught.value, path, words)


@given(data=st.data())
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_files_open_or_give_a_store_error(tmp_path: Path, data: st.DataObject) -> None:
    header = {"__metadata__": {"a": "b"}, "t": entry(), "u": entry("BF16", (2, 2), (4, 12))}
    content = bytearray(with_header(header, bytes(12)))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(content)
    try:
        file = SafetensorsFile(path)
    except StoreError:
        return
    for view in file.tensors.values():
        assert view.offset + view.nbytes <= len(content)
        assert view.data.size == view.nbytes


@pytest.mark.parametrize("kind", ["missing", "directory"])
def test_unreadable_files(tmp_path: Path, kind: str) -> None:
    path = tmp_path if kind == "directory" else tmp_path / "none.safetensors"
    with pytest.raises(StoreError, match="cannot be read"):
        SafetensorsFile(path)


# --- stores ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_round_trip(tmp_path: Path, seed: int) -> None:
    parts = write_store(tmp_path / "store", seed)
    store = Store.open(tmp_path / "store")
    assert store.layout == LAYOUT
    assert (store.init, store.model_class) == ("sqrt", "torch.nn.Linear")
    for mapping, written in zip((store.base, *store.deltas), (parts["base"], *parts["deltas"]), strict=True):
        assert set(mapping) == set(written)
        for name, content in written.items():
            np.testing.assert_array_equal(mapping[name].data, content)
    for name, array in parts["routers"].items():
        np.testing.assert_array_equal(store.routers[name], array)
    np.testing.assert_array_equal(store.heads["cola"]["head.weight"].data.view(np.float32), [1, 0, 0, 1])
    assert store.model_files() == {"config.json": b'{"labels": 1}', "sub/vocabulary.txt": "naïve\n".encode()}
    assert store.model_files("cola")["config.json"] == b'{"labels": 2}'
    assert store.model_files("sst2") == store.model_files()


def test_any_safetensors_tool_reads_the_parts(store: Path) -> None:
    opened = Store.open(store)
    theirs = safetensors.torch.load_file(store / "experts" / "cola.safetensors")
    assert set(theirs) == set(opened.deltas[0])
    for name, tensor in theirs.items():
        raw = tensor.reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)
        np.testing.assert_array_equal(raw.numpy(), opened.deltas[0][name].data)


def test_verify_reports_progress_and_finds_one_changed_bit(store: Path) -> None:
    opened = Store.open(store)
    calls: list[tuple[int, int]] = []
    opened.verify(lambda done, total: calls.append((done, total)))
    assert calls[-1][0] == calls[-1][1] == sum(size for size, _ in opened.checksums.values())
    for path in opened.checksums:
        content = bytearray((store / path).read_bytes())
        content[-1] ^= 1
        (store / path).write_bytes(content)
        with pytest.raises(StoreError, match="altered") as caught:
            opened.verify()
        assert path in str(caught.value)
        content[-1] ^= 1
        (store / path).write_bytes(content)
    opened.verify()


@pytest.mark.parametrize(
    "path", ["base.safetensors", "experts/sst2.safetensors", "routers.safetensors", "model/config.json"]
)
@pytest.mark.parametrize("harm", ["remove", "truncate", "extend", "directory"])
def test_missing_and_truncated_files(store: Path, path: str, harm: str) -> None:
    file = store / path
    content = file.read_bytes()
    file.unlink()
    if harm == "truncate":
        file.write_bytes(content[:-1])
    elif harm == "extend":
        file.write_bytes(content + b"\0")
    elif harm == "directory":
        file.mkdir()
    with pytest.raises(StoreError) as caught:
        Store.open(store)
    assert path in str(caught.value)
    assert "create the store again" in str(caught.value)


MANIFEST_ATTACKS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "newer version": (
        lambda m: m.update(version=3, created_by="paretofuse 9.0"),
        "newer paretofuse.*9.0.*upgrade",
    ),
    "no version": (lambda m: m.pop("version"), "version"),
    "boolean version": (lambda m: m.update(version=True), "version"),
    "text version": (lambda m: m.update(version="1"), "version"),
    "other format": (lambda m: m.update(format="zip"), "format"),
    "absolute path": (lambda m: m.update(base="/etc/passwd"), "escape"),
    "parent path": (lambda m: m["experts"].update(cola="../cola.safetensors"), "escape"),
    "inner parent path": (lambda m: m["experts"].update(cola="experts/../../x"), "escape"),
    "backslash path": (lambda m: m.update(base="..\\base.safetensors"), "escape"),
    "drive path": (lambda m: m.update(base="c:base.safetensors"), "escape"),
    "null in path": (lambda m: m.update(base="base\0"), "escape"),
    "listed escape": (lambda m: m["files"].update({"../x": m["files"]["base.safetensors"]}), "escape"),
    "model file escape": (lambda m: m["model"]["files"].append("../../x"), "escape"),
    "model file is weights": (lambda m: m["model"]["files"].append("model.safetensors"), "weights"),
    "model file is pickle": (lambda m: m["model"]["files"].append("pytorch_model.bin"), "weights"),
    "head file escape": (lambda m: m["model"]["heads"]["cola"].append("/x"), "escape"),
    "unlisted file": (lambda m: m["files"].pop("base.safetensors"), "no size and checksum"),
    "bad record": (lambda m: m["files"].update({"base.safetensors": 5}), "base.safetensors"),
    "negative size": (lambda m: m["files"]["base.safetensors"].update(bytes=-1), "base.safetensors"),
    "bad checksum": (lambda m: m["files"]["base.safetensors"].update(sha256="x"), "base.safetensors"),
    "no objectives": (lambda m: m.update(objectives=[]), "objectives"),
    "twin objectives": (lambda m: m.update(objectives=["cola", "cola"]), "objectives"),
    "number objective": (lambda m: m.update(objectives=["cola", 1]), "objectives"),
    "missing expert": (lambda m: m["experts"].pop("cola"), "experts"),
    "unknown expert": (lambda m: m["experts"].update(mrpc="x"), "experts"),
    "unknown head": (lambda m: m["heads"].update(mrpc="x"), "heads"),
    "text weight": (lambda m: m.update(static_weight="0.3"), "static_weight"),
    "NaN weight": (lambda m: m.update(static_weight=float("nan")), "not JSON"),
    "boolean weight": (lambda m: m.update(static_weight=True), "static_weight"),
    "tensor no object": (lambda m: m["tensors"].append(3), "tensor table"),
    "twin tensors": (lambda m: m["tensors"].append(m["tensors"][0]), "twice"),
    "alias twin": (lambda m: m["tensors"][0].update(aliases=["a.weight"]), "twice"),
    "unknown role": (lambda m: m["tensors"][1].update(role="magic"), "role"),
    "routed without group": (lambda m: m["tensors"][1].update(group=None), "group"),
    "static with group": (lambda m: m["tensors"][2].update(group="a"), "group"),
    "merged integers": (lambda m: m["tensors"][1].update(dtype="I64"), "dtypes"),
    "negative size in shape": (lambda m: m["tensors"][1].update(shape=[-3, 5]), "shape"),
    "other shape": (lambda m: m["tensors"][1].update(shape=[5, 3]), r"a\.weight.*\[3, 5\].*\[5, 3\]"),
    "other dtype": (lambda m: m["tensors"][1].update(dtype="BF16"), r"a\.weight"),
    "other delta dtype": (lambda m: m["tensors"][1].update(delta_dtype="F16"), r"cola.*a\.weight"),
    "further tensor": (lambda m: m["tensors"].append({**m["tensors"][1], "name": "z", "aliases": []}), "'z'"),
    "missing tensor": (lambda m: m["tensors"].pop(0), "'steps'"),
    "delta of a constant": (lambda m: m["tensors"][2].update(role="constant"), r"a\.bias"),
    "other groups": (lambda m: m["tensors"][1].update(group="b"), "router parameter"),
    "unknown init": (lambda m: m["routers"].update(init="magic"), "init"),
    "routers elsewhere": (lambda m: m["routers"].update(file="base.safetensors"), "router parameters"),
    "no routers": (lambda m: m.pop("routers"), "routers"),
    "training no object": (lambda m: m.update(training=["ls"]), "training"),
    "tensors no list": (lambda m: m.update(tensors={}), "tensors"),
}


@pytest.mark.parametrize("name", MANIFEST_ATTACKS)
def test_manifest_attacks(store: Path, name: str) -> None:
    change, words = MANIFEST_ATTACKS[name]
    edit_manifest(store, change)
    with pytest.raises(StoreError) as caught:
        Store.open(store)
    check_message(caught.value, store, words)


@pytest.mark.parametrize("text", ["", "{", "[]", '"paretofuse"', "null", "[" * 300_000, '{"format": "\\udc'])
def test_manifests_that_are_no_object(store: Path, text: str) -> None:
    (store / "manifest.json").write_text(text)
    with pytest.raises(StoreError, match=r"manifest\.json"):
        Store.open(store)


@pytest.mark.parametrize("what", ["base.safetensors", "experts", "model/config.json"])
def test_links_out_of_the_store_are_refused(store: Path, tmp_path: Path, what: str) -> None:
    outside = tmp_path / "outside"
    (store / what).rename(outside)
    (store / what).symlink_to(outside)
    with pytest.raises(StoreError, match="outside of the store"):
        Store.open(store)


@pytest.mark.parametrize("below", ["", "stores/one"])
def test_a_hugging_face_cache_opens(store: Path, tmp_path: Path, below: str) -> None:
    """Files are links to ../../blobs there, as deep as they lie; and merging from it works."""
    root = in_cache(store, tmp_path / "cache", below)
    opened = Store.open(root)
    opened.verify()
    assert opened.model_files("cola")["config.json"] == b'{"labels": 2}'
    np.testing.assert_array_equal(opened.base["a.weight"].data, Store.open(store).base["a.weight"].data)


def test_links_to_elsewhere_are_refused_in_a_cache_too(store: Path, tmp_path: Path) -> None:
    for outside in (
        tmp_path / "cache" / "secret",
        tmp_path / "cache" / "blobs" / "deep" / "x",
        tmp_path / "blobs" / "x",
    ):
        root = in_cache(store, tmp_path / "cache", "")
        outside.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / "base.safetensors", outside)
        (root / "base.safetensors").unlink()
        (root / "base.safetensors").symlink_to(outside)
        with pytest.raises(StoreError, match="outside of the store"):
            Store.open(root)
        shutil.rmtree(tmp_path / "cache")
    # Nor are blobs of the neighbourhood where there are no snapshots.
    (tmp_path / "a" / "blobs").mkdir(parents=True)
    root = tmp_path / "a" / "revisions" / "store"
    shutil.copytree(store, root)
    (root / "base.safetensors").rename(tmp_path / "a" / "blobs" / "0")
    (root / "base.safetensors").symlink_to(tmp_path / "a" / "blobs" / "0")
    with pytest.raises(StoreError, match="outside of the store"):
        Store.open(root)


def in_cache(store: Path, cache: Path, below: str) -> Path:
    """A store as huggingface_hub's snapshot_download lays it out."""
    root = cache / "snapshots" / "0123abcd" / below
    (cache / "blobs").mkdir(parents=True)
    for number, file in enumerate(sorted(path for path in store.rglob("*") if path.is_file())):
        blob = cache / "blobs" / f"{number:04x}"
        shutil.copy(file, blob)
        link = root / file.relative_to(store)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return root


def test_links_within_the_store_and_to_it_are_fine(store: Path, tmp_path: Path) -> None:
    (store / "base.safetensors").rename(store / "elsewhere")
    (store / "base.safetensors").symlink_to("elsewhere")
    (tmp_path / "link").symlink_to(store)
    Store.open(tmp_path / "link").verify()


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: p.write_text("x")])
def test_what_is_no_store(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "x")
    with pytest.raises(StoreError, match=r"is not a store: .*create one with `paretofuse stack`"):
        Store.open(tmp_path / "x" if (tmp_path / "x").exists() else tmp_path)


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no such directory.*paretofuse stack"):
        Store.open(tmp_path / "none")


def test_a_store_that_changes_under_an_open_one_is_noticed(store: Path) -> None:
    opened = Store.open(store)
    opened.check_unchanged()
    victim = store / "experts" / "cola.safetensors"
    os.utime(victim, (1, 1))
    opened.check_unchanged()  # merely touched
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    with open(victim, "r+b") as file:
        file.write(content)
    os.utime(victim, (2, 2))
    with pytest.raises(
        StoreError, match=r"cola\.safetensors: was changed after it was opened; open the store again"
    ):
        opened.check_unchanged()
    content[-1] ^= 1
    with open(victim, "r+b") as file:
        file.write(content)
    opened.check_unchanged()  # it is again what it was
    with open(victim, "r+b") as file:
        file.truncate(len(content) - 1)
    with pytest.raises(StoreError, match="was changed"):
        opened.check_unchanged()


# --- writing ---------------------------------------------------------------------------------------------------


def leftovers(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if path.name.endswith(".partial")]


def test_replacing_a_store(tmp_path: Path) -> None:
    write_store(tmp_path / "store", seed=1)
    old = Store.open(tmp_path / "store")
    kept = old.base["a.weight"].data.copy()
    write_store(tmp_path / "store", seed=2)
    new = Store.open(tmp_path / "store")
    new.verify()
    assert not np.array_equal(new.base["a.weight"].data, kept)
    np.testing.assert_array_equal(old.base["a.weight"].data, kept)  # whoever has it open keeps the old one
    assert leftovers(tmp_path) == []


def test_a_store_replaced_while_it_is_opened_is_one_of_the_two(store: Path) -> None:
    # Stores of the same sizes, so that nothing but the bytes would tell a mixture; some openings meet the worst moment.
    truth = {int(parts["base"]["steps"].view(np.int64)[0]): parts for parts in [write_store(store, 1)]}
    stop = threading.Event()

    def replace() -> None:
        for seed in itertools.count(2):
            if stop.is_set():
                return
            parts = write_store(store.with_name("next"), seed)
            truth[int(parts["base"]["steps"].view(np.int64)[0])] = parts
            _swap(store.with_name("next"), store)
            time.sleep(0.001)

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        for _ in range(60):
            opened = Store.open(store)
            parts = truth[int(opened.base["steps"].data.view(np.int64)[0])]
            np.testing.assert_array_equal(opened.base["a.weight"].data, parts["base"]["a.weight"])
            np.testing.assert_array_equal(opened.routers["output.bias"], parts["routers"]["output.bias"])
            for own, written in zip(opened.deltas, parts["deltas"], strict=True):
                np.testing.assert_array_equal(own["b.weight"].data, written["b.weight"])
    finally:
        stop.set()
        thread.join()


def _swap(first: Path, second: Path) -> None:
    """Put one directory at the other's place, as a deployment by renaming does."""
    fresh = _C.Fresh(second, directory=True)
    fresh.path.rmdir()
    first.rename(fresh.path)
    fresh.place()


def test_replacing_without_exchange(tmp_path: Path) -> None:
    for content in (b"old", b"new"):
        fresh = _C.Fresh(tmp_path / "folder", directory=True)
        (fresh.path / "file").write_bytes(content)
        fresh.place(exchange=False)
    assert (tmp_path / "folder" / "file").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_parents_are_made(tmp_path: Path) -> None:
    write_store(tmp_path / "a" / "b" / "store")
    Store.open(tmp_path / "a" / "b" / "store").verify()


def test_an_exception_leaves_the_old_store(store: Path) -> None:
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}

    def fails() -> Iterator[TensorData]:
        yield "a.weight", "F32", (3, 5), [np.zeros(15, np.float32)]
        raise RuntimeError("the disk is full")

    with (
        pytest.raises(RuntimeError, match="disk is full"),
        StoreWriter(store, objectives=OBJECTIVES) as writer,
    ):
        writer.write_base(fails())
    with StoreWriter(store, objectives=OBJECTIVES) as writer:
        writer.add_model_file("config.json", b"{}")  # and left without finish
    assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == before
    assert leftovers(store.parent) == []


def test_a_killed_save_leaves_the_old_store_whole(store: Path) -> None:
    script = f"""
import sys, time
import numpy as np
from paretofuse.engine.store.writer import StoreWriter
def endless():
    yield "a.weight", "F32", (3, 5), [np.zeros(15, np.float32)]
    while True:
        print("writing", flush=True)
        yield "a.bias", "F32", (5,), iter(lambda: time.sleep(0.01) or b"", None)
with StoreWriter({str(store)!r}, objectives=("cola", "sst2")) as writer:
    writer.write_base(endless())
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert len(leftovers(store.parent)) == 1
    Store.open(store).verify()


def test_kills_at_any_moment_leave_a_whole_store(store: Path) -> None:
    # A process replaces the store without end; whenever it is killed, what stands there opens and verifies.
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pathlib import Path
from tests.store.test_store import write_store
for seed in range(1_000_000):
    write_store(Path({str(store)!r}), seed=seed)
    print(seed, flush=True)
"""
    for attempt in range(2):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"0\n"
            time.sleep(0.05 + 0.037 * attempt)
        finally:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        Store.open(store).verify()


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_other_things_are_not_replaced(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "target"
    if kind == "file":
        target.write_text("precious")
    elif kind == "directory":
        target.mkdir()
        (target / "precious.txt").write_text("precious")
    else:
        target.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="not a store; choose another place"):
        StoreWriter(target, objectives=OBJECTIVES)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("harm", [None, "damaged", "newer"])
def test_files_that_are_not_the_stores_own_are_not_lost(store: Path, harm: str | None) -> None:
    manifest = store / "manifest.json"
    if harm == "damaged":
        manifest.write_bytes(manifest.read_bytes()[:-20])
    elif harm == "newer":
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "version": 999}))
    StoreWriter(store, objectives=OBJECTIVES).__exit__(None, None, None)  # would be replaced
    (store / "notes").mkdir()
    (store / "notes" / "front.csv").write_text("precious")
    with pytest.raises(ValueError, match=r"not its own \(notes/front\.csv\)"):
        StoreWriter(store, objectives=OBJECTIVES)
    assert (store / "notes" / "front.csv").read_text() == "precious"


def test_another_projects_manifest(tmp_path: Path) -> None:
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "manifest.json").write_text('{"name": "paretofuse"}')
    (tmp_path / "app" / "main.js").write_text("precious")
    with pytest.raises(ValueError, match=r"main\.js"):
        StoreWriter(tmp_path / "app", objectives=OBJECTIVES)


def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path: Path) -> None:
    write_store(tmp_path / "v1")
    (tmp_path / "latest").symlink_to("v1")
    before = (tmp_path / "v1").stat().st_ino
    write_store(tmp_path / "latest")
    assert (tmp_path / "latest").is_symlink()
    assert (tmp_path / "v1").stat().st_ino != before
    assert leftovers(tmp_path) == []


def test_the_current_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="the current directory"):
        StoreWriter(".", objectives=OBJECTIVES)


def test_an_empty_directory_is_a_fine_place(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    write_store(tmp_path / "store")
    Store.open(tmp_path / "store").verify()


def untrained(init: str) -> dict[str, np.ndarray]:
    state = Routers(LAYOUT.groups, OBJECTIVES, init).state_dict()
    return {name: tensor.numpy() for name, tensor in state.items()}


RECORD = {"method": "ls", "steps": 100, "data": {"cola": "cola-train"}, "when": "2026-11-25T12:00:00+00:00"}


@pytest.mark.parametrize("init", ["identity", "sqrt", "constant"])
@pytest.mark.parametrize("recorded", [True, False])
def test_a_trained_store_is_not_replaced_by_an_untrained_one(store: Path, init: str, recorded: bool) -> None:
    edit_manifest(store, lambda m: m.update(training=RECORD) if recorded else None)
    words = (
        r"trained store \(method ls, steps 100, when 2026" if recorded else r"trained store \(not recorded\)"
    )
    with StoreWriter(store, objectives=OBJECTIVES) as writer, pytest.raises(ValueError, match=words):
        writer.write_routers(init, untrained(init))
    with (
        StoreWriter(store, objectives=OBJECTIVES) as writer,
        pytest.raises(ValueError, match="another training"),
    ):
        writer.write_routers(init, untrained(init), {"steps": 1})
    origin = Store.open(store).routers_checksum
    with StoreWriter(
        store, objectives=OBJECTIVES, origin=origin
    ) as writer:  # the same training, gone on with
        writer.write_routers(init, untrained(init), {"steps": 1})
    with (
        StoreWriter(store, objectives=OBJECTIVES, origin=origin) as writer,
        pytest.raises(ValueError, match=words),
    ):
        writer.write_routers(init, untrained(init))  # reset since
    with StoreWriter(store, objectives=OBJECTIVES, force=True) as writer:
        writer.write_routers(init, untrained(init))
        writer.write_base([(s.name, s.dtype, s.shape, [bytes(s.nbytes)]) for s in SPECS])
        for objective in OBJECTIVES:
            writer.write_expert(objective, [])
        writer.finish(LAYOUT)
    assert not Store.open(store).trained
    with StoreWriter(store, objectives=OBJECTIVES) as writer:  # nothing is lost any more
        writer.write_routers(init, untrained(init))


def test_a_record_that_is_no_json_is_refused(tmp_path: Path) -> None:
    with (
        StoreWriter(tmp_path / "s", objectives=OBJECTIVES) as writer,
        pytest.raises(ValueError, match="not JSON"),
    ):
        writer.write_routers("identity", untrained("identity"), {"loss": float("nan")})


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (lambda w: w.write_expert("mrpc", []), "'mrpc', expected one of 'cola', 'sst2'"),
        (lambda w: w.finish(LAYOUT), "without expert 'cola', expert 'sst2', routers, base"),
        (lambda w: w.finish(Layout(("x",), SPECS, 0.3)), "layout"),
        (lambda w: (w.write_base([]), w.write_base([])), "twice"),
        (lambda w: w.add_model_file("../x", b""), "model file"),
        (lambda w: w.add_model_file("model.safetensors", b""), "model file"),
        (lambda w: w.add_model_file("/etc/x", b""), "model file"),
    ],
)
def test_store_writer_refuses(tmp_path: Path, use: Callable[[StoreWriter], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words), StoreWriter(tmp_path / "s", objectives=OBJECTIVES) as writer:
        use(writer)
    assert list(tmp_path.iterdir()) == []


def test_parts_that_contradict_the_layout_never_replace_a_store(store: Path) -> None:
    before = (store / "manifest.json").read_bytes()
    wrong = Layout(OBJECTIVES, (*SPECS, TensorSpec("more", (1,), "F32", "static", None, "F32")), 0.3)
    with StoreWriter(store, objectives=OBJECTIVES, force=True) as writer:
        writer.write_base([(s.name, s.dtype, s.shape, [bytes(s.nbytes)]) for s in SPECS])
        for objective in OBJECTIVES:
            writer.write_expert(objective, [])
        writer.write_routers("identity", random_routers(np.random.default_rng(0), 2, 2))
        with pytest.raises(StoreError, match="'more'"):
            writer.finish(wrong)
    assert (store / "manifest.json").read_bytes() == before
    assert leftovers(store.parent) == []


@pytest.mark.parametrize(
    ("objectives", "stems"),
    [
        (("cola", "sst-2"), ("cola", "sst-2")),
        (("cola", "COLA"), ("000", "001")),
        (("a/b", "c"), ("000", "001")),
        (("..", "c"), ("000", "001")),
        ((".hidden", "c"), ("000", "001")),
        (("x", "x.safetensors"), ("000", "001")),
        (("naïve", "c"), ("000", "001")),
        (("x" * 200,), ("000",)),
    ],
)
def test_file_names_of_objectives(
    tmp_path: Path, objectives: tuple[str, ...], stems: tuple[str, ...]
) -> None:
    assert tuple(_C.file_stems(objectives)[name] for name in objectives) == stems


def test_strange_objective_names_round_trip(tmp_path: Path) -> None:
    names = ("../evil", 'qu"ote\n')
    rng = np.random.default_rng(0)
    with StoreWriter(tmp_path / "s", objectives=names) as writer:
        writer.write_base([(s.name, s.dtype, s.shape, [bytes(s.nbytes)]) for s in SPECS])
        for name in names:
            writer.write_expert(name, [])
            writer.add_head_file(name, "config.json", name.encode())
        writer.write_routers("identity", random_routers(rng, 2, 2))
        writer.finish(Layout(names, SPECS, 0.3))
    store = Store.open(tmp_path / "s")
    assert store.layout.objectives == names
    assert [store.model_files(name)["config.json"] for name in names] == [name.encode() for name in names]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s"]


@pytest.mark.parametrize("path", ["a", "a/b", "a.b/c-d", "ä", "a b"])
def test_safe_paths(path: str) -> None:
    assert _C.is_safe_path(path)


@pytest.mark.parametrize(
    "path", ["", ".", "..", "/a", "a/../b", "a//b", "a/", "./a", "a\\b", "c:a", "a\0", "//a"]
)
def test_unsafe_paths(path: str) -> None:
    assert not _C.is_safe_path(path)


@pytest.mark.skipif(os.name != "posix", reason="file permissions of POSIX")
def test_a_store_has_ordinary_permissions(store: Path) -> None:
    plain = store.parent / "plain"
    plain.mkdir()
    assert store.stat().st_mode == plain.stat().st_mode


def test_the_store_and_the_merge_need_no_torch(tmp_path: Path) -> None:
    write_store(tmp_path / "store")
    script = f"""
import sys
import paretofuse.cli, paretofuse.cli.doctor
from paretofuse.engine.routing.preference import simplex_grid
from paretofuse.engine.store.reader import Store
from paretofuse.engine.merging.disk import merge_store
Store.open({str(tmp_path / "store")!r}).verify()
merge_store({str(tmp_path / "store")!r}, {{"cola": 1}}, {str(tmp_path / "out")!r}, head="cola")
paretofuse.cli.doctor.examine()
simplex_grid(3, 4)
heavy = {{"torch", "triton", "safetensors", "tqdm", "moocore", "transformers"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)
