"""A store takes the place of an older one whole or not at all, and of nothing else."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from paretofuse.engine.errors import StoreError
from paretofuse.engine.extension import _C
from paretofuse.engine.layout import Layout, TensorSpec
from paretofuse.engine.store.reader import Store
from paretofuse.engine.store.safetensors_file import TensorData
from paretofuse.engine.store.writer import StoreWriter
from tests.support.stores import (
    LAYOUT,
    OBJECTIVES,
    SPECS,
    edit_manifest,
    leftovers,
    random_routers,
    untrained,
    write_store,
)


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
from tests.support.stores import write_store
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
