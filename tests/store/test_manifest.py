"""Manifests made to break a reader, and the names of a store's files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paretofuse.engine.errors import StoreError
from paretofuse.engine.extension import _C
from paretofuse.engine.layout import Layout
from paretofuse.engine.store.reader import Store
from paretofuse.engine.store.writer import StoreWriter
from tests.support.stores import SPECS, check_message, edit_manifest, random_routers

MANIFEST_ATTACKS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "newer version": (
        lambda m: m.update(version=4, created_by="paretofuse 9.0"),
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
    "unknown family": (
        lambda m: m["routers"].update(family="columns"),
        "expected scalar, rows or rows\\+columns",
    ),
    "family of another kind": (lambda m: m["routers"].update(family=3), "'family', expected a string"),
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
