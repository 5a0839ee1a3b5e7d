"""Files and stores that long work writes at its end, checked before it starts."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from paretofuse.engine.engine import Engine
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


def prepare_store(path: str | os.PathLike[str], engine: Engine, *, force: bool) -> None:
    """Try whether what an engine becomes by training can be saved there; leaves nothing behind but missing parents.

    Raises:
        ValueError: something stands there that is no store, or a trained store whose training would be lost.
        OSError: nothing can be written there.
    """
    with StoreWriter(
        path, objectives=engine.objectives, experts=engine.layout.planes, force=force, origin=engine.origin
    ) as writer:
        writer.check_training(trained=True)  # never finished, so what it began is removed
