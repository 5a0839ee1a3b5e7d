"""Model directories as recipes read them: mapped files, tensors by name whatever prefix a class puts before it."""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Any

from paretofuse.adapters import hub
from paretofuse.adapters.files import json_object, weight_files
from paretofuse.engine.errors import CheckpointError, some
from paretofuse.engine.methods.numbers import Numbers
from paretofuse.engine.store.safetensors_file import SafetensorsFile, TensorView

CONFIG = "config.json"

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
_HEADS = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")
_EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|shared)\.weight$")
_VOCABULARY = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|shared|tok_embeddings|lm_head|embed_out)\.(weight|bias)$"
    r"|^cls\.predictions\.(decoder\.)?bias$|^cls\.predictions\.decoder\.weight$"
)
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""Under which names configurations count layers."""


class Model:
    """A model's directory.

    Attributes:
        name: as the recipe calls it.
        path: where it lies.
        tensors: its tensors by name, mapped.
        config: its config.json.
    """

    def __init__(self, name: str) -> None:
        """Open a directory, or a Hub id (org/name, org/name@revision).

        Raises:
            CheckpointError: there is no model, an adapter, or a quantized one.
            StoreError: a damaged file.
        """
        self.name = name
        self.path = Path(name)
        if not self.path.exists():
            self.path = hub.directory(name, "model")
        if not self.path.is_dir():
            raise CheckpointError(f"{name}: this is a file, expected a model's directory with its {CONFIG}")
        if (self.path / "adapter_config.json").is_file():
            raise CheckpointError(
                f"{name}: this is an adapter; merge it first with PEFT's merge_and_unload and save_pretrained, or "
                "stack it: paretofuse stack --expert NAME=ADAPTER"
            )
        config = self.path / CONFIG
        self.config: dict[str, Any] = (
            json_object(config.read_bytes(), CONFIG, name) if config.is_file() else {}
        )
        if self.config.get("quantization_config"):
            raise CheckpointError(
                f"{name}: quantized: {CONFIG} has a quantization_config, and packed weights cannot be merged; use the "
                "checkpoint from before quantization, or call model.dequantize() and save it again"
            )
        files, promised = weight_files(self.path, name)
        self._files: dict[str, SafetensorsFile] = {}
        self.tensors: dict[str, TensorView] = {}
        for path in files:
            file = SafetensorsFile(path)
            for tensor, view in file.tensors.items():
                if tensor in self.tensors:
                    raise CheckpointError(f"{name}: tensor {tensor!r} is in two files, expected it in one")
                self.tensors[tensor], self._files[tensor] = view, file
        if absent := [tensor for tensor in promised if tensor not in self.tensors]:
            raise CheckpointError(f"{name}: the index promises {some(absent)}, which no shard holds")

    @cached_property
    def stacks(self) -> dict[str, int]:
        """How many layers each stack of them has, by what stands before a layer's number."""
        counts: dict[str, int] = {}
        for tensor in self.tensors:
            if (split := split_layer(tensor)) is not None:
                stack, layer, _ = split
                counts[stack] = max(counts.get(stack, 0), layer + 1)
        return counts

    @cached_property
    def _by_end(self) -> dict[str, list[str]]:
        """Names by what is left of them without their first part."""
        ends: dict[str, list[str]] = {}
        for name in self.tensors:
            ends.setdefault(name.partition(".")[2], []).append(name)
        return ends

    def find(self, tensor: str) -> str | None:
        """This model's name of a tensor that another one calls so; None where it has none.

        A class's prefix (`transformer.` of a GPT-2 with a head) may be there or not, and a head may be tied to the
        embeddings, which are then stored alone.
        """
        shorter = tensor.partition(".")[2]
        longer = self._by_end.get(tensor, [])
        for name in (tensor, shorter, *(longer if len(longer) == 1 else [])):
            if name in self.tensors:
                return name
        if _HEADS.search(tensor) and self.ties_head:
            return self.embeddings
        return None

    @property
    def ties_head(self) -> bool:
        """Whether the output head is the embeddings; configurations only say so where it is not."""
        return self.config.get("tie_word_embeddings", True) is not False

    @cached_property
    def embeddings(self) -> str | None:
        """The name of the input embeddings."""
        return next((name for name in self.tensors if _EMBEDDINGS.search(name)), None)

    @property
    def vocabulary(self) -> int:
        """Rows of the embeddings."""
        size = self.config.get("vocab_size")
        if isinstance(size, int):
            return size
        return 0 if self.embeddings is None else int(self.tensors[self.embeddings].shape[0])

    def numbers(self, tensor: str) -> Numbers:
        """A tensor, mapped."""
        view, file = self.tensors[tensor], self._files[tensor]
        start = view.offset
        return Numbers(view.dtype, view.shape, view.data, lambda a, b: file.release(start + a, start + b))


def split_layer(tensor: str) -> tuple[str, int, str] | None:
    """What stands before a layer's number, the number, and what stands behind it; None for tensors of no layer."""
    found = _LAYER.search(tensor)
    if found is None:
        return None
    return tensor[: found.start(1)], int(found[1]), tensor[found.end(1) :]


def is_head(tensor: str) -> bool:
    """Whether a name is that of a language model's output weights."""
    return _HEADS.search(tensor) is not None


def is_vocabulary(tensor: str) -> bool:
    """Whether a name is that of a tensor with a row for each token."""
    return _VOCABULARY.search(tensor) is not None
