"""Base and experts of different vocabularies, as sources with a row for each token of one tokenizer.

The rows are those of a recipe with tokenizer_source; see recipes/vocabulary.py. An expert that lacks a token has the
base's row, and so adds nothing to it; where the base lacks it too, both have the mean of the rows of those that do not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from paretofuse.adapters import hf
from paretofuse.engine.errors import CheckpointError
from paretofuse.engine.stacking.sources import Source
from paretofuse.recipes.files import with_tokenizer
from paretofuse.recipes.models import Model, is_vocabulary
from paretofuse.recipes.vocabulary import Vocabulary, make_vocabulary

_BASE = "the base"


def with_one_vocabulary(
    tokenizer: str,
    base: Source,
    experts: Mapping[str, Source],
    places: tuple[Any, Mapping[str, Any]],
) -> tuple[Source, dict[str, Source], tuple[str, ...]]:
    """The same sources with embeddings and heads by the tokens of one tokenizer, which the base then brings along.

    Args:
        tokenizer: "base", "union", or a directory.
        base, experts: as they are; LoRA experts have the base's tokens.
        places: what the user gave for the base and for each expert.

    Returns:
        base, experts, and what a user should know, a sentence each.

    Raises:
        TypeError: a model is no directory, so that nobody knows its tokenizer.
        CheckpointError: the base has no tokenizer, or a LoRA changes embeddings or the head.
        ImportError: transformers is missing.
    """
    sources = {_BASE: base, **{f"expert {name!r}": source for name, source in experts.items()}}
    given = dict(zip(sources, (places[0], *places[1].values()), strict=True))
    full = {name: source for name, source in sources.items() if not source.is_delta}
    for name in full:
        if not isinstance(given[name], str | os.PathLike):
            raise TypeError(
                f"got tokenizer={tokenizer!r} and {name} as a {type(given[name]).__name__}, expected the model's "
                "directory, which has its tokenizer"
            )
    for source in sources.values():
        changed = [tensor for tensor in source.infos if source.is_delta and is_vocabulary(tensor)]
        if changed:
            raise CheckpointError(
                f"{source.label}: a LoRA that changes {changed[0]!r} cannot be fitted to another tokenizer; merge it "
                "first with PEFT's merge_and_unload and save_pretrained"
            )
    models = {name: Model(str(given[name])) for name in full}
    vocabulary = make_vocabulary(tokenizer, _BASE, models, asked=f"tokenizer={tokenizer!r}")
    rows = _FittedRows(vocabulary, full)
    fitted = {name: rows.source(name) if name in full else source for name, source in sources.items()}
    return (
        fitted[_BASE],
        dict(zip(experts, list(fitted.values())[1:], strict=True)),
        (f"one vocabulary of {vocabulary.tokens} tokens", *vocabulary.notes),
    )


class _FittedRows:
    """Reads the tensors with a row for each token, of all models at once; keeps those of one name at a time."""

    def __init__(self, vocabulary: Vocabulary, sources: Mapping[str, Source]) -> None:
        self._vocabulary = vocabulary
        self._sources = sources
        self._name = ""
        self._held: dict[str, Tensor] = {}

    def source(self, model: str) -> Source:
        """A model's source with fitted tensors, configuration and tokenizer."""
        own, size = self._sources[model], self._vocabulary.size
        names = {name for name in own.infos if is_vocabulary(name)}
        files = with_tokenizer(own.blueprint.files, self._vocabulary)
        config = json.loads(files[hf.CONFIG])
        config["vocab_size"] = size
        files[hf.CONFIG] = json.dumps(config, indent=2).encode()
        owners = {**{name: name for name in own.infos}, **own.aliases}

        def read(name: str, start: int, stop: int) -> Tensor:
            return self._of(name)[model][start:stop] if name in names else own.read(name, start, stop)

        return replace(
            own,
            infos={
                name: replace(info, shape=(size, *info.shape[1:])) if name in names else info
                for name, info in own.infos.items()
            },
            read=read,
            blueprint=hf.blueprint_from_files(files, own.label, owners),
        )

    def _of(self, name: str) -> dict[str, Tensor]:
        """A tensor's flat elements by model, for all models that have one of that name or tied to it."""
        if name == self._name:
            return self._held
        owners = {model: own.aliases.get(name, name) for model, own in self._sources.items()}
        having = [model for model, owner in owners.items() if owner in self._sources[model].infos]
        infos = [self._sources[model].infos[owners[model]] for model in having]
        wide = []
        for model, info in zip(having, infos, strict=True):
            flat = self._sources[model].read(owners[model], 0, info.numel)
            dtype = torch.float64 if info.dtype == torch.float64 else torch.float32
            wide.append(flat.to(dtype).view(info.shape).numpy())
        fitted = self._vocabulary.fitted_floats(having, wide, _BASE)
        self._held = {
            model: torch.from_numpy(values).to(info.dtype).view(-1)
            for model, info, values in zip(having, infos, fitted, strict=True)
        }
        self._name = name
        return self._held
