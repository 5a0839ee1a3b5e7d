"""Models of different vocabularies: one tokenizer for all, and for each model the row of every token.

The rules are mergekit's: "base" keeps the base model's tokenizer, "union" adds to it every token that another model
has, and a model's name takes that model's. A token that a model lacks gets the base's row; where the base lacks it too,
the mean of the rows of the models that have it; where none has it, zeros. Each row is then merged like any other.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from paretofuse.engine.errors import CheckpointError
from paretofuse.engine.methods.numbers import Floats, Numbers, promoted
from paretofuse.recipes.models import Model

Rows = npt.NDArray[np.int64]
"""For each token of the merged vocabulary a model's row of it, or -1."""


@dataclass(frozen=True)
class Vocabulary:
    """The merged tokenizer and where its tokens' rows are.

    Attributes:
        tokenizer: of transformers.
        tokens: how many it has.
        size: rows of the merged embeddings: the tokens, and as many more as padding asks for.
        rows: by model's name.
        notes: what it comes to, a sentence for each model that lacks tokens.
    """

    tokenizer: Any
    tokens: int
    size: int
    rows: Mapping[str, Rows]
    notes: tuple[str, ...]

    def files(self) -> dict[str, bytes]:
        """What the tokenizer saves, by name."""
        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer.save_pretrained(folder)
            return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}

    def fitted(self, names: Sequence[str], tensors: Sequence[Numbers], base: str | None) -> list[Numbers]:
        """Tensors with a row for each token of a model, as they are with a row for each of the merged vocabulary.

        Args:
            names: the models'.
            tensors: theirs.
            base: the base model's name, whose rows stand in for others' where it is one of them.
        """
        dtype = promoted([own.dtype for own in tensors])
        return [
            Numbers.of(own, dtype)
            for own in self.fitted_floats(names, [own.floats() for own in tensors], base)
        ]

    def fitted_floats(self, names: Sequence[str], wide: Sequence[Floats], base: str | None) -> list[Floats]:
        """The same of tensors as NumPy computes with them."""
        shape = (self.size, *wide[0].shape[1:])
        has = np.stack([self.rows[name] >= 0 for name in names])  # [models, tokens]
        stand_in = np.zeros((self.tokens, *shape[1:]), wide[0].dtype)
        lacking = ~has.all(0)
        for values, name, own in zip(wide, names, has, strict=True):
            chosen = lacking & own
            stand_in[chosen] += values[self.rows[name][chosen]]
        counts = np.maximum(has.sum(0), 1).reshape(-1, *[1] * (len(shape) - 1))
        stand_in /= counts
        if base in names:
            own = lacking & has[names.index(base)]
            stand_in[own] = wide[names.index(base)][self.rows[base or ""][own]]
        found: list[Floats] = []
        for values, name, own in zip(wide, names, has, strict=True):
            merged = np.empty(shape, values.dtype)
            merged[: self.tokens][own] = values[self.rows[name][own]]
            merged[: self.tokens][~own] = stand_in[~own]
            # A row for nobody is as good as any other near the middle.
            merged[self.tokens :] = merged[: self.tokens].mean(0)
            found.append(merged)
        return found


def make_vocabulary(
    tokenizer: str, base: str, models: Mapping[str, Model], *, asked: str, pad: int = 1
) -> Vocabulary:
    """The merged vocabulary of models.

    Args:
        tokenizer: "base", "union", or a model's directory or name in the Hub.
        base: the base model's name among the models.
        models: by name.
        asked: how the user asked for this, for messages.
        pad: rows of embeddings are a multiple of it.

    Raises:
        CheckpointError: a model has no tokenizer where one is needed.
        ImportError: transformers is missing.
    """
    own = {name: _tokenizer(model) for name, model in models.items()}
    if own[base] is None:
        raise CheckpointError(
            f"{base}: got no tokenizer in its directory, which {asked} needs; save one beside the model"
        )
    notes = [f"{name}: has no tokenizer; read as {base}'s" for name, found in own.items() if found is None]
    tokenizers = {name: own[base] if found is None else found for name, found in own.items()}
    if tokenizer == "base":
        merged = tokenizers[base]
    elif tokenizer == "union":
        merged = _union(base, tokenizers, models)
    else:
        merged = _tokenizer(Model(tokenizer))
        if merged is None:
            raise CheckpointError(f"{tokenizer}: got no tokenizer in its directory, expected one")
    vocabulary: dict[str, int] = merged.get_vocab()
    tokens = max(vocabulary.values()) + 1
    size = -(-tokens // pad) * pad
    rows = {}
    for name, found_tokenizer in tokenizers.items():
        theirs, limit = found_tokenizer.get_vocab(), models[name].vocabulary
        found = np.full(tokens, -1, np.int64)
        for token, index in vocabulary.items():
            row = theirs.get(token, -1)
            found[index] = row if row < limit else -1
        rows[name] = found
        lacks = int((found < 0).sum())
        notes.append(f"{name}: {limit} tokens, of the merged {tokens} it lacks {lacks}")
    return Vocabulary(merged, tokens, size, rows, tuple(notes))


def _tokenizer(model: Model) -> Any:
    """A model's tokenizer; None where its directory has none."""
    if not any((model.path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ImportError(
            'tokenizer_source needs transformers, which is not installed; pip install "paretofuse[hf]"'
        ) from error
    return AutoTokenizer.from_pretrained(str(model.path))


def _union(base: str, tokenizers: Mapping[str, Any], models: Mapping[str, Model]) -> Any:
    """The base's tokenizer with every token added that only others have, special ones with their own settings."""
    with tempfile.TemporaryDirectory() as folder:  # a copy: adding tokens changes a tokenizer
        tokenizers[base].save_pretrained(folder)
        from transformers import AutoTokenizer

        merged = AutoTokenizer.from_pretrained(folder)
    known = set(merged.get_vocab())
    for name, tokenizer in tokenizers.items():
        limit = models[name].vocabulary
        special = {str(token.content): token for token in tokenizer.added_tokens_decoder.values()}
        for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
            if index < limit and token not in known:
                merged.add_tokens(special.get(token, token))
                known.add(token)
    return merged
