"""Links in a store: within it and into a Hugging Face cache they are followed, elsewhere never."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from paretofuse.engine.errors import StoreError
from paretofuse.engine.store.reader import Store


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
