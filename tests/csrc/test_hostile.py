"""libparetofuse and files that mean harm: it refuses what the Python reader refuses, and fuzzing finds no crash."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.engine.test_planes import two_experts
from tests.store.test_attack_files import ATTACKS
from tests.store.test_links import in_cache
from tests.store.test_manifest import MANIFEST_ATTACKS
from tests.store.test_planes import PLANE_ATTACKS, mixed_store
from tests.support import cpplib
from tests.support.cpplib import Library, LibraryError
from tests.support.process import run
from tests.support.stores import edit_manifest, write_store

SEEDS = Path(__file__).parent / "seeds"

KINDS: dict[str, Callable[[Path], object]] = {"dense": write_store, "planes": mixed_store}
"""Stores to spoil: of format 1, and of format 2 with every format of a plane."""


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write_store(tmp_path / "store")
    return tmp_path / "store"


def refused(library: Library, store: Path) -> str:
    with pytest.raises(LibraryError) as caught:
        library.open(store)
    assert caught.value.status == Library.STORE
    return str(caught.value)


def test_the_store_is_good_without_an_attack(library: Library, store: Path) -> None:
    assert library.open(store).names("objective")


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("file", ["base.safetensors", "experts/cola.safetensors", "routers.safetensors"])
def test_attack_files(library: Library, store: Path, name: str, file: str) -> None:
    content = ATTACKS[name][0]
    (store / file).write_bytes(content)
    edit_manifest(store, lambda m: m["files"][file].update(bytes=len(content)))
    message = refused(library, store)
    assert f"{store / file}: not a valid safetensors file: " in message
    assert len(message) < 600


@pytest.mark.parametrize("seed", sorted(path.name for path in (SEEDS / "safetensors").iterdir()))
def test_seeds_of_the_fuzzer(library: Library, store: Path, seed: str) -> None:
    content = (SEEDS / "safetensors" / seed).read_bytes()
    (store / "routers.safetensors").write_bytes(content)
    edit_manifest(store, lambda m: m["files"]["routers.safetensors"].update(bytes=len(content)))
    # The good ones are well-formed, but no routers.
    assert ("router parameter" in refused(library, store)) == (seed in ("good", "empty"))


@pytest.mark.parametrize("name", PLANE_ATTACKS)
def test_attacks_by_planes(library: Library, tmp_path: Path, name: str) -> None:
    two_experts("int8").save(tmp_path / "store")
    edit_manifest(tmp_path / "store", PLANE_ATTACKS[name][0])
    assert PLANE_ATTACKS[name][1] in refused(library, tmp_path / "store")


@pytest.mark.parametrize("name", MANIFEST_ATTACKS)
def test_manifest_attacks(library: Library, store: Path, name: str) -> None:
    edit_manifest(store, MANIFEST_ATTACKS[name][0])
    assert str(store) in refused(library, store)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '"paretofuse"', "null", "[" * 300_000, '{"format": "\\udc', "{}\0", '{"a": 1, "a": 1}', "\ufeff{}"],
)  # fmt: skip
def test_manifests_that_are_no_object(library: Library, store: Path, text: str) -> None:
    (store / "manifest.json").write_text(text)
    assert "manifest.json" in refused(library, store)


@pytest.mark.parametrize("harm", ["remove", "truncate", "extend", "directory", "pipe", "link"])
@pytest.mark.parametrize("file", ["base.safetensors", "experts/cola.safetensors", "model/config.json"])
def test_files_that_are_not_as_they_were(
    library: Library, store: Path, tmp_path: Path, file: str, harm: str
) -> None:
    path = store / file
    content = path.read_bytes()
    path.unlink()
    if harm == "truncate":
        path.write_bytes(content[:-1])
    elif harm == "extend":
        path.write_bytes(content + b"\0")
    elif harm == "directory":
        path.mkdir()
    elif harm == "pipe":
        os.mkfifo(path)
    elif harm == "link":
        (tmp_path / "outside").write_bytes(content)
        path.symlink_to(tmp_path / "outside")
    assert str(path) in refused(library, store)


def test_a_linked_folder_is_refused(library: Library, store: Path, tmp_path: Path) -> None:
    (store / "experts").rename(tmp_path / "experts")
    (store / "experts").symlink_to(tmp_path / "experts")
    assert "experts" in refused(library, store)


def test_a_hugging_face_cache_opens(library: Library, store: Path, tmp_path: Path) -> None:
    root = in_cache(store, tmp_path / "cache", "")
    assert library.open(root).names("objective")
    (tmp_path / "cache" / "secret").write_bytes((root / "model" / "config.json").read_bytes())
    (root / "model" / "config.json").unlink()
    (root / "model" / "config.json").symlink_to(tmp_path / "cache" / "secret")
    assert "points outside of the store" in refused(library, root)


def test_what_is_no_store(library: Library, tmp_path: Path) -> None:
    assert "paretofuse stack" in refused(library, tmp_path / "none")
    (tmp_path / "file").write_text("x")
    assert "paretofuse stack" in refused(library, tmp_path / "file")
    assert "manifest.json" in refused(library, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1500, pytest.param(100_000, marks=pytest.mark.long)])
def test_damaged_bytes_open_or_are_refused(library: Library, tmp_path: Path, kind: str, count: int) -> None:
    """Every one of some thousand damaged stores opens and merges, or is refused by an error of the right kind."""
    store = tmp_path / "store"
    KINDS[kind](store)
    random = np.random.default_rng(11)
    files = [*sorted(json.loads((store / "manifest.json").read_text())["files"]), "manifest.json"]
    opened, statuses = 0, []
    for _ in range(count):
        path = store / files[random.integers(len(files))]
        content = path.read_bytes()
        damaged = bytearray(content)
        for _ in range(random.integers(1, 4)):
            # Headers and manifests are where it hurts.
            damaged[random.integers(min(len(damaged), 1200))] = random.integers(256)
        path.write_bytes(damaged)
        try:
            engine = library.open(store, threads=1)
            engine.switch([1.0] + [0.0] * (len(engine.names("objective")) - 1))
            engine.tensors()
            opened += 1
        except LibraryError as error:
            statuses.append(error.status)
        except KeyError:  # a dtype that this test cannot show
            opened += 1
        finally:
            path.write_bytes(content)
    assert min(opened, len(statuses)) > 10
    assert set(statuses) <= {Library.STORE, Library.INVALID}  # INVALID: routers without finite weights


FUZZERS = ("safetensors", "manifest", "store")


@pytest.fixture(scope="module")
def fuzzers() -> Path:
    if not cpplib.has_fuzzer():
        pytest.skip("needs clang with libFuzzer: apt install clang libclang-rt-dev")
    return cpplib.build("fuzz", *(f"fuzz_{name}" for name in FUZZERS))


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [8, pytest.param(300, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("fuzzer", "kind"),
    [("safetensors", "dense"), ("manifest", "dense"), *(("store", kind) for kind in KINDS)],
)
def test_fuzzing_finds_nothing(fuzzers: Path, tmp_path: Path, fuzzer: str, kind: str, seconds: int) -> None:
    store = tmp_path / "store"
    KINDS[kind](store)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    seeds = [SEEDS / fuzzer] if (SEEDS / fuzzer).is_dir() else []
    if fuzzer == "store":  # the good store's own files, each behind the byte that chooses it
        for number, name in enumerate(sorted(json.loads((store / "manifest.json").read_text())["files"])):
            (corpus / str(number)).write_bytes(bytes([number]) + (store / name).read_bytes())
    # libFuzzer's own limit on memory looks at the peak, which Linux hands on from the process that started this one.
    printed = run(
        fuzzers / f"fuzz_{fuzzer}", f"-max_total_time={seconds}", "-timeout=20", "-max_len=16384",
        "-rss_limit_mb=0", "-malloc_limit_mb=2048", f"-artifact_prefix={tmp_path}/", corpus, *seeds,
        PARETOFUSE_FUZZ_STORE=str(store), ASAN_OPTIONS="hard_rss_limit_mb=2048",
    )  # fmt: skip
    assert "Done" in printed
