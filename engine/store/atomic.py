"""Files and directories that appear whole or not at all: written beside their place, synced, then renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from paretofuse.engine.extension import _C
from paretofuse.engine.store.paths import as_path
from paretofuse.engine.termination import termination_raises

Fresh = _C.Fresh
"""A file or directory on its way to its place; see csrc/src/store/atomic.h."""


def name_the_file(error: BaseException | None, place: str | os.PathLike[str]) -> None:
    """Name the place in what failed on the way to it: Python tells a full disk's error, but not of which file."""
    if isinstance(error, OSError) and error.filename is None:
        error.filename = str(place)


@contextmanager
def fresh(place: str | os.PathLike[str], *, directory: bool = False) -> Iterator[Path]:
    """A path to write to; what is written there takes its place when the block ends, or is removed if it fails.

    What killed processes have left of earlier attempts is swept away first. SIGTERM and SIGHUP, where nobody handles
    them, remove it too.

    Args:
        place: where it will be. An older file or directory there is replaced in one step.
        directory: make a directory instead of an empty file.

    Raises:
        OSError: the system refuses; `filename` says what. The place is as it was.
        ValueError: a directory that cannot be replaced as a whole: a mount point, or the current one.
    """
    with termination_raises():
        new = Fresh(as_path(place), directory=directory)
        try:
            yield new.path
            new.place()
        except OSError as error:
            name_the_file(error, place)
            raise
        finally:
            new.discard()


@contextmanager
def fresh_named(place: str | os.PathLike[str]) -> Iterator[Path]:
    """Like `fresh`, for writers that look at a file's name: a path of that name, in a fresh folder beside the place."""
    with termination_raises():
        folder = Fresh(as_path(place), directory=True)
        try:
            path = folder.path / Path(place).name
            yield path
            for entry in (path, folder.path):
                _sync(entry)
            os.replace(path, place)
            _sync(folder.path.parent)
        except OSError as error:
            name_the_file(error, place)
            raise
        finally:
            folder.discard()


def _sync(path: Path) -> None:
    """Wait until a file's data, or a directory's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(place: str | os.PathLike[str], content: bytes) -> None:
    """Write a whole file in one step; raises as `fresh`."""
    with fresh(place) as path:
        path.write_bytes(content)
