"""Stores: exact round trips, what is missing or changed, and what the writer refuses."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from paretofuse.engine.errors import StoreError
from paretofuse.engine.layout import Layout
from paretofuse.engine.store import reader
from paretofuse.engine.store.reader import Store, sha256_of
from paretofuse.engine.store.writer import StoreWriter
from tests.support.stores import LAYOUT, OBJECTIVES, SPECS, untrained, write_store


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


@pytest.mark.parametrize("threads", [1, 3])
def test_verification_takes_as_many_threads_as_it_is_told(
    store: Path, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: set[str] = set()
    gate = threading.Barrier(threads)

    def met(path: Path, count: Callable[[int], None] | None = None) -> str:
        if threading.current_thread().name not in names:
            names.add(threading.current_thread().name)
            gate.wait(60)  # passes only where so many threads are at work at once
        return sha256_of(path, count)

    monkeypatch.setattr(reader, "sha256_of", met)
    Store.open(store).verify(threads=threads)
    assert len(names) == threads


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


def test_parents_are_made(tmp_path: Path) -> None:
    write_store(tmp_path / "a" / "b" / "store")
    Store.open(tmp_path / "a" / "b" / "store").verify()


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
from paretofuse.engine.store import reader
from paretofuse.engine.store.reader import Store, sha256_of
from paretofuse.engine.merging.disk import merge_store
Store.open({str(tmp_path / "store")!r}).verify()
merge_store({str(tmp_path / "store")!r}, {{"cola": 1}}, {str(tmp_path / "out")!r}, head="cola")
paretofuse.cli.doctor.examine()
simplex_grid(3, 4)
heavy = {{"torch", "triton", "safetensors", "tqdm", "moocore", "transformers"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)
