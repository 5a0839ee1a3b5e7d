"""Whole or not at all, and nothing left behind: kills, signals, sweeping, links to what is replaced."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import paretofuse as pf
from paretofuse.engine.store.atomic import Fresh, fresh, fresh_named, write_file
from tests.support.process import python, run

WRITING = """
import signal, sys, time
from paretofuse.engine.store.atomic import Fresh, fresh, fresh_named
{before}
with {how} as path:
    print(path, flush=True)
    time.sleep(600)
"""


def writing(how: str, before: str = "") -> tuple[subprocess.Popen[bytes], Path]:
    """A process that has begun to write, and what it writes to."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITING.format(how=how, before=before)], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().decode().strip())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


KINDS = ["fresh({place!r})", "fresh({place!r}, directory=True)", "fresh_named({place!r})"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_leave_nothing(tmp_path: Path, kind: str, number: signal.Signals) -> None:
    # A test run in a background job may have been told to ignore some of them; the process shall not.
    before = "for n in (signal.SIGTERM, signal.SIGHUP): signal.signal(n, signal.SIG_DFL)\n"
    before += "signal.signal(signal.SIGINT, signal.default_int_handler)"
    process, path = writing(kind.format(place=str(tmp_path / "x.txt")), before)
    assert path.parent == tmp_path or path.parent.parent == tmp_path
    process.send_signal(number)
    process.communicate()
    assert process.returncode != 0
    assert names(tmp_path) == []


def test_handlers_of_the_program_stay(tmp_path: Path) -> None:
    before = "signal.signal(signal.SIGTERM, lambda *_: (print('mine', flush=True), sys.exit(7)))"
    process, _ = writing(f"fresh({str(tmp_path / 'x')!r})", before)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate()
    assert (process.returncode, out) == (7, b"mine\n")
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_killed_process_left_is_swept_by_the_next_writer_of_the_same_place(
    tmp_path: Path, kind: str
) -> None:
    process, _ = writing(kind.format(place=str(tmp_path / "x")))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(names(tmp_path)) == 1
    write_file(tmp_path / "y", b"another place")
    write_file(tmp_path / "x.x", b"another place")
    assert len(names(tmp_path)) == 3
    write_file(tmp_path / "x", b"new")
    assert names(tmp_path) == ["x", "x.x", "y"]
    assert (tmp_path / "x").read_bytes() == b"new"


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_living_process_writes_is_not_swept(tmp_path: Path, kind: str) -> None:
    process, path = writing(kind.format(place=str(tmp_path / "x")))
    try:
        write_file(tmp_path / "x", b"new")
        with fresh(tmp_path / "x"):  # nor what this very process writes
            write_file(tmp_path / "x", b"newer")
        assert path.parent.exists()
        assert len(names(tmp_path)) == 2
    finally:
        process.kill()
        process.communicate()


def test_names_that_are_not_ours_are_not_swept(tmp_path: Path) -> None:
    foreign = [".x.partial", ".x.0123456789ab.part", ".x.0123456789aG.partial", "x.0123456789ab.partial"]
    for name in foreign:
        (tmp_path / name).write_bytes(b"precious")
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / ".x.0123456789ab.partial").symlink_to("precious")  # a link is never followed
    write_file(tmp_path / "x", b"new")
    assert set(foreign) < set(names(tmp_path))
    assert (tmp_path / "precious").read_bytes() == b"precious"


def test_a_failure_leaves_the_old_file_and_the_error_names_it(tmp_path: Path) -> None:
    write_file(tmp_path / "x", b"old")
    with pytest.raises(TypeError), fresh(tmp_path / "x") as path:
        path.write_bytes("no bytes")  # type: ignore[arg-type]
    assert names(tmp_path) == ["x"]
    assert (tmp_path / "x").read_bytes() == b"old"
    with pytest.raises(OSError, match="x") as caught:
        write_file(tmp_path / "x" / "below a file", b"")
    assert str(caught.value.filename).startswith(str(tmp_path / "x"))


def test_a_file_keeps_its_name_on_the_way(tmp_path: Path) -> None:
    with fresh_named(tmp_path / "deep" / "picture.png") as path:
        assert path.name == "picture.png"
        path.write_bytes(b"png")
    assert names(tmp_path / "deep") == ["picture.png"]


def test_a_named_file_is_synced_before_it_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[int | str] = []
    real_sync, real_replace = os.fsync, os.replace

    def sync(descriptor: int) -> None:
        done.append(os.fstat(descriptor).st_ino)
        real_sync(descriptor)

    def put(source: Path, target: Path) -> None:
        done.append("replaced")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", put)
    with fresh_named(tmp_path / "x.png") as path:
        path.write_bytes(b"png")
        file, folder = path.stat().st_ino, path.parent.stat().st_ino
    assert done == [file, folder, "replaced", tmp_path.stat().st_ino]


def test_many_writers_of_one_place_leave_one_whole_file(tmp_path: Path) -> None:
    script = "import sys\nfrom paretofuse.engine.store.atomic import write_file\n"
    script += "for _ in range(50): write_file(sys.argv[1], sys.argv[2].encode() * 1000)"
    place = tmp_path / "x"
    writers = [subprocess.Popen([sys.executable, "-c", script, place, letter]) for letter in "abc"]
    deadline = time.monotonic() + 300
    for writer in writers:
        assert writer.wait(deadline - time.monotonic()) == 0
    assert names(tmp_path) == ["x"]
    assert place.read_bytes() in {letter.encode() * 1000 for letter in "abc"}


def test_places_that_cannot_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="the current directory"):
        Fresh(tmp_path, directory=True)
    with pytest.raises(ValueError, match="a mount point"):
        Fresh("/proc", directory=True)


PLANTS = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* Somebody who guesses the first name right, and puts a link to a victim there in the moment before it is made. */
static void plant(const char* path) {
  static int planted = 0;
  if (strstr(path, ".partial") != NULL && planted++ == 0 && symlink(getenv("VICTIM"), path) != 0) abort();
}

int open(const char* path, int flags, ...) {
  int (*real)(const char*, int, ...) = (int (*)(const char*, int, ...))dlsym(RTLD_NEXT, "open");
  va_list more;
  va_start(more, flags);
  const mode_t mode = flags & O_CREAT ? va_arg(more, mode_t) : 0;
  va_end(more);
  if (flags & O_CREAT) plant(path);
  return real(path, flags, mode);
}

int open64(const char* path, int flags, ...) {
  va_list more;
  va_start(more, flags);
  const mode_t mode = flags & O_CREAT ? va_arg(more, mode_t) : 0;
  va_end(more);
  return open(path, flags, mode);
}

int mkdir(const char* path, mode_t mode) {
  int (*real)(const char*, mode_t) = (int (*)(const char*, mode_t))dlsym(RTLD_NEXT, "mkdir");
  plant(path);
  return real(path, mode);
}

/* A disk that has no room for anything larger than a few kilobytes. */
ssize_t write(int file, const void* data, size_t size) {
  ssize_t (*real)(int, const void*, size_t) = (ssize_t (*)(int, const void*, size_t))dlsym(RTLD_NEXT, "write");
  if (getenv("FULL") != NULL && file > 2 && size > 4096) return errno = ENOSPC, -1;
  return real(file, data, size);
}
"""


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if sys.platform != "linux":
        pytest.skip("preloads a library as Linux does")
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(PLANTS)
    run("cc", "-shared", "-fPIC", "-o", folder / "shim.so", folder / "shim.c", "-ldl")
    return folder / "shim.so"


@pytest.mark.parametrize("directory", [False, True])
def test_a_name_that_is_taken_is_not_followed(shim: Path, tmp_path: Path, directory: bool) -> None:
    """A temporary name may be guessed: what stands there is left alone, and another name taken."""
    victim = tmp_path / "victim"
    victim.mkdir() if directory else victim.write_bytes(b"precious")
    (tmp_path / "out").mkdir()
    script = f"""
from paretofuse.engine.store.atomic import fresh
with fresh({str(tmp_path / "out" / "x")!r}, directory={directory}) as path:
    (path / "file" if {directory} else path).write_bytes(b"new")
"""
    python(script, LD_PRELOAD=str(shim), VICTIM=str(victim))
    assert list(victim.iterdir()) == [] if directory else victim.read_bytes() == b"precious"
    links = [path for path in (tmp_path / "out").iterdir() if path.is_symlink()]
    assert [link.resolve() for link in links] == [victim]  # it was planted
    place = tmp_path / "out" / "x"
    assert (place / "file" if directory else place).read_bytes() == b"new"
    assert not place.is_symlink()


@pytest.mark.parametrize("what", ["stack", "save", "merge", "checkpoint"])
def test_a_full_disk_is_told_with_the_file_and_leaves_nothing(shim: Path, tmp_path: Path, what: str) -> None:
    models = {name: {"w": torch.full((5000,), float(size))} for size, name in enumerate(("base", "a", "b"))}
    for name, tensors in models.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    pf.stack(models["base"], {"a": models["a"], "b": models["b"]}, route="tensor").save(tmp_path / "store")
    script = f"""
import sys
from paretofuse.cli import main
folder = {str(tmp_path)!r}
if {what!r} == "stack":
    words = [f"{{folder}}/base.safetensors", "--expert", f"a={{folder}}/a.safetensors"]
    sys.exit(main(["stack", *words, "-o", f"{{folder}}/new"]))
if {what!r} == "merge":
    sys.exit(main(["merge", f"{{folder}}/store", "--preference", "a=1", "-o", f"{{folder}}/new"]))
import torch, paretofuse as pf
from paretofuse.engine.training.checkpoint import write_checkpoint
try:
    if {what!r} == "save":
        pf.load(f"{{folder}}/store").save(f"{{folder}}/new")
    else:
        write_checkpoint(f"{{folder}}/new", {{"w": torch.full((5000,), 1.0)}}, {{"step": 1}})
except OSError as error:
    print(f"{{error.filename}}: {{error.strerror}}")
    sys.exit(1)
"""
    before = names(tmp_path)
    said = python(script, code=1, LD_PRELOAD=str(shim), VICTIM=str(tmp_path), FULL="1")
    assert "No space left on device" in said
    assert str(tmp_path) in said
    assert "new" in said.replace(str(tmp_path), "")
    left = [name for name in names(tmp_path) if not (tmp_path / name).is_symlink()]
    assert left == before


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        (5, TypeError, "got a path of type int"),
        (None, TypeError, "got a path of type NoneType"),
        ("", ValueError, "got path ''"),
        ("a\0b", ValueError, "which no file can have as its name"),
        ("\ud800", ValueError, "which no file can have as its name"),
    ],
)
def test_what_is_no_path_is_told_in_words(path: object, error: type[Exception], message: str) -> None:
    base = {"w": torch.ones(2)}
    engine = pf.stack(base, {"a": {"w": torch.zeros(2)}})
    front = pf.Front(np.eye(1), np.eye(1), ("a",), ("x",))
    for use in (pf.load, engine.save, lambda p: engine.save_pretrained(p, [1.0]), front.to_csv):
        with pytest.raises(error, match=message):
            use(path)  # type: ignore[operator]
