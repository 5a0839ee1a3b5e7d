"""Hub ids such as "org/name": directories that the local Hugging Face cache holds; nothing is ever downloaded."""

from __future__ import annotations

import re
from pathlib import Path

from paretofuse.engine.errors import CheckpointError

_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def cached(name: str, label: str) -> Path:
    """The directory of a model in the local Hugging Face cache.

    Raises:
        CheckpointError: no Hub id, or the cache does not hold it; says how to get a directory.
    """
    if not _ID.fullmatch(name) or name.endswith(".safetensors"):
        raise CheckpointError(
            f"{label} ({name}): no such file or directory; pass a model's directory, a .safetensors file, or the id of "
            "a model that the local Hugging Face cache holds, such as org/name"
        )
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, local_files_only=True))
    except (ImportError, OSError, ValueError) as error:  # of huggingface_hub: not there, or no id
        raise CheckpointError(
            f"{label} ({name}): no such file or directory, nor a model in the local Hugging Face cache; models are not "
            f"downloaded here: get it with `hf download {name}`, which prints its directory"
        ) from error
