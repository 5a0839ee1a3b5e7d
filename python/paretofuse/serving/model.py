"""What is served: an engine, what its model is for, and the tokenizer or processor that feeds it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paretofuse.engine.engine import Engine

TASKS = ("text-generation", "text-classification", "image-classification", "feature-extraction", "callable")

Answer = Callable[[Any, Any], Any]
"""A user's own function of (merged module, the request's input); what it returns is sent as JSON."""


@dataclass(frozen=True)
class ServedModel:
    """One engine, ready to serve.

    Attributes:
        engine: what merges.
        name: as clients call it.
        task: one of TASKS.
        processor: a tokenizer or an image processor; None for a callable.
        answer: the callable, for the task "callable".
    """

    engine: Engine
    name: str
    task: str
    processor: Any
    answer: Answer | None = None

    @property
    def chats(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return self.task == "text-generation" and bool(getattr(self.processor, "chat_template", None))


def served_model(
    engine: Engine, name: str, processor: Any = None, answer: Answer | None = None
) -> ServedModel:
    """Find out what a model is for, and load what feeds it.

    Args:
        engine: the engine.
        name: as clients call it.
        processor: a tokenizer or an image processor of transformers; by default made of the files that the store
            keeps of its model.
        answer: serves any model by a function of (merged module, input) instead.

    Raises:
        ValueError: no task is known for the model, or nothing that feeds it is there.
    """
    if not name or len(name) > 200:
        raise ValueError(f"got model_name={name!r}, expected 1 to 200 characters")
    if answer is not None:
        return ServedModel(engine, name, "callable", None, answer)
    task = task_of(engine)
    if task == "image-classification" or (task == "feature-extraction" and _is_for_images(engine)):
        return ServedModel(engine, name, task, processor or _loaded(engine, "AutoImageProcessor"))
    return ServedModel(engine, name, task, processor or _loaded(engine, "AutoTokenizer"))


def task_of(engine: Engine) -> str:
    """What the class of a model is for, by transformers' own tables.

    Raises:
        ValueError: it is none of TASKS.
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
        "or an encoder of transformers; give a function that answers for it (--predict MODULE:FUNCTION, predict=)"
    )


def _is_for_images(engine: Engine) -> bool:
    return "preprocessor_config.json" in engine.blueprint.files


def _loaded(engine: Engine, kind: str) -> Any:
    """A tokenizer or processor of the store's own files; no code of theirs runs, and nothing is fetched."""
    import transformers

    with tempfile.TemporaryDirectory(prefix="paretofuse-") as name:
        for file, content in engine.blueprint.files.items():
            path = Path(name, file)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        try:
            return getattr(transformers, kind).from_pretrained(
                name, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"got a store without a usable tokenizer or processor ({error}); stack a base directory that has its "
                "files, or give one: create_app(engine, processor=...)"
            ) from error
