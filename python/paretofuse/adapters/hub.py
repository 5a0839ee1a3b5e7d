"""Hub ids such as "org/name" or "org/name@revision": directories in the Hugging Face cache, or downloaded into it."""

from __future__ import annotations

import re
from pathlib import Path

from paretofuse.engine.errors import CheckpointError

_ID = re.compile(r"(?P<id>[\w-][\w.-]*(?:/[\w-][\w.-]*)?)(?:@(?P<revision>[\w.][\w./-]*))?")

_UNREAD = [
    "*.bin",
    "*.ckpt",
    "*.gguf",
    "*.h5",
    "*.msgpack",
    "*.onnx*",
    "*.ot",
    "*.pt",
    "*.pth",
    "*.tflite",
    "openvino/*",
]
"""Weights in other formats than safetensors, which are not downloaded."""


def directory(name: str, label: str) -> Path:
    """The directory of a model of the Hub, at a revision if the name has one.

    huggingface_hub finds or downloads it; with HF_HUB_OFFLINE=1 only the local cache is asked.

    Raises:
        CheckpointError: no Hub id, or neither cache nor Hub has it; says why.
    """
    found = _ID.fullmatch(name)
    if found is None or name.endswith(".safetensors"):
        raise CheckpointError(
            f"{label} ({name}): no such file or directory; pass a model's directory, a .safetensors file, or the id of "
            "a model on the Hugging Face Hub, such as org/name or org/name@revision"
        )
    try:
        from huggingface_hub import constants, snapshot_download

        # Told, not left to it: version 1 asks the Hub for a commit's files even offline.
        offline = constants.HF_HUB_OFFLINE
        return Path(
            snapshot_download(
                found["id"], revision=found["revision"], ignore_patterns=_UNREAD, local_files_only=offline
            )
        )
    except (
        ImportError,
        OSError,
        ValueError,
    ) as error:  # of huggingface_hub: not there, no such id, no network
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{label} ({name}): no such file or directory, nor a model that the Hugging Face cache or the Hub has: "
            f"{reason}"
        ) from error
