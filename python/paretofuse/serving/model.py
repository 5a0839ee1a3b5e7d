"""What is served: an engine, what its model is for, and the tokenizer or processor that feeds it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paretofuse.engine.engine import Engine
from paretofuse.serving.pooling import Pooling, pooling_of

Predict = Callable[[Any, Any], Any]
"""A user's own function of (merged module, the request's input); what it returns is sent as JSON."""


@dataclass(frozen=True)
class ServedModel:
    """One engine, ready to serve.

    Attributes:
        engine: what merges.
        name: as clients call it.
        task: "text-generation", "text-classification", "image-classification", "feature-extraction" or "callable".
        processor: a tokenizer or an image processor; None for a callable.
        predict: the callable, for the task "callable".
    """

    engine: Engine
    name: str
    task: str
    processor: Any
    predict: Predict | None = None

    @cached_property
    def skeleton(self) -> Any:
        """The model's structure, without weights."""
        return self.engine.blueprint.make()

    @cached_property
    def takes_images(self) -> bool:
        """Whether the inputs are images rather than texts."""
        return getattr(self.skeleton, "main_input_name", None) == "pixel_values"

    @property
    def chats(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return self.task == "text-generation" and bool(getattr(self.processor, "chat_template", None))

    @cached_property
    def generation(self) -> Any:
        """transformers' GenerationConfig, as from_pretrained would find it."""
        from transformers import GenerationConfig

        content = self.engine.blueprint.files.get("generation_config.json")
        return GenerationConfig.from_dict(json.loads(content)) if content else self.skeleton.generation_config

    @cached_property
    def ends(self) -> frozenset[int]:
        """The tokens that end an answer."""
        ends = self.generation.eos_token_id
        if ends is None:
            ends = getattr(self.processor, "eos_token_id", None)
        return frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])

    @cached_property
    def context(self) -> int | None:
        """Tokens that the model can look at; None where its configuration sets no bound."""
        config = self.skeleton.config.get_text_config()
        return getattr(config, "max_position_embeddings", None)

    @cached_property
    def labels(self) -> dict[int, str]:
        """The names of a classifier's outputs."""
        return {int(i): str(name) for i, name in self.skeleton.config.id2label.items()}

    @cached_property
    def pooling(self) -> Pooling:
        """What makes embeddings of an encoder's states.

        Raises:
            ValueError: its files ask for one that is not known here.
        """
        return Pooling("cls") if self.takes_images else pooling_of(self.engine.blueprint.files)

    def padded(self, tokens: list[list[int]]) -> dict[str, Tensor]:
        """Texts' tokens as a batch: input_ids and attention_mask, [B, T] each, padded on the right."""
        width = max(map(len, tokens))
        pad = getattr(self.processor, "pad_token_id", None) or 0
        device = self.engine.device
        ids = torch.tensor([own + [pad] * (width - len(own)) for own in tokens], device=device)
        mask = torch.tensor([[1] * len(own) + [0] * (width - len(own)) for own in tokens], device=device)
        return {"input_ids": ids, "attention_mask": mask}


def served_model(
    engine: Engine, name: str, processor: Any = None, predict: Predict | None = None
) -> ServedModel:
    """Find out what a model is for, and load what feeds it.

    Args:
        engine: the engine.
        name: as clients call it.
        processor: a tokenizer or an image processor of transformers; by default made of the files that the store
            keeps of its model.
        predict: serves any model by a function of (merged module, input) instead.

    Raises:
        ValueError: no task is known for the model, or nothing that feeds it is there.
    """
    if not isinstance(name, str) or not 1 <= len(name) <= 200:
        raise ValueError(f"got model_name={name!r}, expected 1 to 200 characters")
    if predict is not None:
        if not callable(predict):
            raise TypeError(f"got predict={predict!r}, expected a function of (module, input)")
        return ServedModel(engine, name, "callable", None, predict)
    model = ServedModel(engine, name, task_of(engine), processor)
    if model.task == "feature-extraction":
        _ = model.pooling  # what cannot be served is found now
    if processor is not None:
        return model
    kind = "AutoImageProcessor" if model.takes_images else "AutoTokenizer"
    return ServedModel(engine, name, model.task, _loaded(engine.blueprint.files, kind))


def task_of(engine: Engine) -> str:
    """What the class of a model is for, by transformers' own tables.

    Raises:
        ValueError: it is for none of the tasks that are served.
    """
    from transformers.models.auto import modeling_auto as tables

    name = (engine.blueprint.model_class or "").rpartition(".")[2]
    known: dict[str, Any] = {
        "text-generation": tables.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "text-classification": tables.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "image-classification": tables.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        "feature-extraction": tables.MODEL_MAPPING_NAMES,
    }
    for task, table in known.items():
        if any(name in (names if isinstance(names, tuple) else (names,)) for names in table.values()):
            return task
    raise ValueError(
        f"got a model of class {name or 'unknown'}, expected a causal language model, a sequence or image classifier "
        "or an encoder of transformers; give a function that answers for it, predict="
    )


def _loaded(files: Mapping[str, bytes], kind: str) -> Any:
    """A tokenizer or processor of the store's own files; no code of theirs runs, and nothing is fetched."""
    import transformers

    with tempfile.TemporaryDirectory(prefix="paretofuse-") as name:
        for file, content in files.items():  # names that the store has checked: relative, below the model
            path = Path(name, file)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        try:
            return getattr(transformers, kind).from_pretrained(
                name, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            raise ValueError(
                f"got a store without a usable tokenizer or processor ({error}); stack a base directory that has its "
                "files, or give one: create_app(engine, processor=...)"
            ) from error
