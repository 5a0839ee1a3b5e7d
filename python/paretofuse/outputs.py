"""Files and stores that long work writes at its end, checked before it starts."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from paretofuse.engine.store.writer import StoreWriter


def prepare_file(path: str | os.PathLike[str]) -> None:
    """Make a file's missing parents and try whether it can be written there; leaves nothing else behind.

    Raises:
        OSError: it cannot; `filename` is the path.
    """
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    if target.exists() and not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:  # which names the parent, or a temporary file
        raise OSError(error.errno, error.strerror, str(target)) from error


def prepare_store(path: str | os.PathLike[str], objectives: Sequence[str]) -> None:
    """Try whether a store can be written there; leaves nothing behind but missing parents.

    Raises:
        ValueError: something stands there that is no store.
        OSError: nothing can be written there.
    """
    with StoreWriter(path, objectives=objectives):
        pass  # never finished, so what it began is removed
