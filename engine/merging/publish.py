"""A merged model as a directory with its card, and from there to the Hugging Face Hub."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from paretofuse.engine.routing.routers import Routers
from paretofuse.engine.stacking import persist
from paretofuse.engine.stacking.sources import Blueprint
from paretofuse.engine.stacking.stack import Stack
from paretofuse.engine.store.reader import Store


@contextmanager
def stored(
    path: str | None, stack: Stack, routers: Routers, blueprint: Blueprint, training: Mapping[str, Any] | None
) -> Iterator[Path]:
    """A store of an engine as it is now: the one that it is of, if its routers are the same, else one for a while.

    Raises:
        StoreError: the engine's store is damaged.
        OSError: writing failed.
    """
    if path is not None and os.path.exists(path):
        store = Store.open(path)
        now, then = routers.stored(), store.routers
        same = now.keys() == then.keys() and all(np.array_equal(now[name], then[name]) for name in now)
        if same and store.training == training:
            yield Path(path)
            return
    with tempfile.TemporaryDirectory(prefix="paretofuse-") as folder:
        place = Path(folder, "store")
        persist.save(place, stack, routers, blueprint, training=training)
        yield place


def push(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """Upload a model's directory to the Hugging Face Hub, into a repository that is made if it is not there.

    Args:
        folder: the directory.
        repo_id: "org/name".
        private: of a new repository; the account's own default unless told.
        revision: the branch, made if it is not there; "main" unless told.
        token: to log in; the saved one unless told.

    Returns:
        The commit's address.

    Raises:
        ImportError: huggingface_hub is missing.
        OSError: the Hub refused it, or cannot be reached.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ImportError(
            'uploading needs huggingface_hub, which is not installed; pip install "paretofuse[hf]"'
        ) from error
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    done = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        revision=revision,
        commit_message="Upload a model merged by ParetoFuse",
    )
    return str(done.commit_url)
