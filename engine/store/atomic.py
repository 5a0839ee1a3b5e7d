"""Files and directories that appear whole or not at all: written beside their place, synced, then renamed."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import sys
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP}


def beside(target: Path) -> Path:
    """A fresh hidden name in the directory of `target`, on the same file system; missing parents are made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.parent / f".{target.name}.{secrets.token_hex(6)}.partial"


def replaceable(target: Path) -> Path:
    """The directory that `target` is or links to, so that a link stays and what it points to is replaced.

    Raises:
        ValueError: a directory that cannot be exchanged for another: a mount point, or the current one.
    """
    if not target.is_dir():
        return target
    target = target.resolve()
    if target.is_mount() or target == Path.cwd():
        kind = "a mount point" if target.is_mount() else "the current directory"
        raise ValueError(
            f"got {target}, which is {kind} and cannot be replaced as a whole; name a new directory in it"
        )
    return target


def sync(path: Path) -> None:
    """Wait until a file's data, or a directory's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(root: Path) -> None:
    """Sync every file and directory below and including `root`."""
    for directory, _, names in os.walk(root):
        for name in names:
            sync(Path(directory, name))
        sync(Path(directory))


def place_file(new: Path, target: Path) -> None:
    """Put a written and synced file at its place in one step, over an older file if there is one."""
    os.replace(new, target)
    sync(target.parent)


def write_file(target: Path, content: bytes) -> None:
    """Write a file whole or not at all, over an older file if there is one; a link there is replaced, not followed."""
    new = beside(target)
    file = new.open("xb")  # x: a name that somebody put there first, a link too, is an error
    try:
        with file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        place_file(new, target)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def place_directory(new: Path, target: Path) -> None:
    """Put a written and synced directory at its place, over an older directory if there is one.

    On Linux the two are exchanged in one step, so whoever opens `target` finds the old or the new directory,
    even after a crash; the old one is removed afterwards. Where the system or file system cannot exchange,
    the old one is moved aside first: a crash between the two renames leaves `target` missing and both
    directories whole beside it.
    """
    if not target.is_dir():
        os.rename(new, target)
    elif _exchange(new, target):
        sync(target.parent)
        shutil.rmtree(new)
    else:
        old = beside(target)
        os.rename(target, old)
        try:
            os.rename(new, target)
        except OSError:
            os.rename(old, target)
            raise
        sync(target.parent)
        shutil.rmtree(old)
    sync(target.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two directories in one step; False where that is not supported."""
    if not sys.platform.startswith("linux"):
        return False
    import ctypes  # here, because reading a store should not pay for it

    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # a C library older than the system call
        return False
    arguments = (_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    if renameat2(*arguments) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(first), None, str(second))
