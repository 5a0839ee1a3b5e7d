"""What a recipe comes to: each tensor of the merged model, what goes into it, and with which parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from paretofuse.engine.errors import CheckpointError
from paretofuse.engine.methods.numbers import FLOATS, promoted
from paretofuse.recipes.config import Input, Recipe, Slice
from paretofuse.recipes.models import Model, is_head, is_vocabulary, split_layer
from paretofuse.recipes.settings import Settings, resolve

_BUFFERS = re.compile(r"\.attn\.(masked_)?bias$|rotary_emb\.inv_freq$|\.position_ids$")
"""Buffers of older transformers, which some checkpoints of a model hold and others do not, and no class needs."""

_FIRST = re.compile(r"(^|[._])(embed\w*|wte|wpe|tok_embeddings|shared)[._]", re.I)
"""Names of what comes before the first layer; all else that is no layer's comes behind the last."""


@dataclass(frozen=True)
class Part:
    """One model's tensor that goes into an output, with its parameters."""

    model: Model
    tensor: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class Output:
    """One tensor of the merged model.

    Attributes:
        name: its name.
        dtype: safetensors dtype that it is written in.
        shape: its shape; of vocabulary tensors without their rows' number, which is the merged tokenizer's.
        base: the base's tensor, for methods that take it apart.
        parts: the models' tensors.
        shared: the method's parameters that hold for all of them.
        by_token: it has a row for each token.
        line: where the recipe speaks of it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    base: Part | None
    parts: tuple[Part, ...]
    shared: Mapping[str, Any]
    by_token: bool
    line: int

    @property
    def inputs(self) -> tuple[Part, ...]:
        """Everything that is read for it, the base first."""
        return self.parts if self.base is None else (self.base, *self.parts)


@dataclass(frozen=True)
class Plan:
    """All outputs, the model whose files and names they take, the layers by source, and what to tell users."""

    outputs: tuple[Output, ...]
    donor: Model
    layers: tuple[tuple[Model, int], ...]
    notes: tuple[str, ...]


def make_plan(recipe: Recipe, models: Mapping[str, Model], rows: int | None) -> Plan:
    """Lay out the merged model.

    Args:
        recipe: the recipe.
        models: every model that it names, opened.
        rows: tokens of the merged tokenizer, to which embeddings are fitted; None to take them as they are.

    Raises:
        CheckpointError: a tensor is missing, or shapes or kinds differ; names the tensor and both models.
        ValueError: layers that are not there, or a parameter that is required.
    """
    return _Planner(recipe, models, rows).plan()


class _Planner:
    def __init__(self, recipe: Recipe, models: Mapping[str, Model], rows: int | None) -> None:
        self.recipe, self.models, self.rows = recipe, models, rows
        self.donor = models[recipe.base or recipe.slices[0].inputs[0].model]
        self.whole = recipe.slices[0].inputs[0].layers is None
        self.notes: list[str] = []

    def plan(self) -> Plan:
        outputs: list[Output | None] = []
        layers: list[tuple[Model, int]] = []
        if not self.whole and len(self.donor.stacks) != 1:
            raise CheckpointError(
                f"{self.recipe.where(self.recipe.slices[0].line)}: slices need a model with one stack of layers, and "
                f"{self.donor.name} has {len(self.donor.stacks)}; list models: instead"
            )
        for name in self._loose():
            piece = self._slice_of(name)
            outputs.append(self._output(name, piece, [name] * len(piece.inputs), t=0.0))
        if self.whole:
            for name in [n for n in self.donor.tensors if split_layer(n) is not None]:
                stack, layer, _ = split_layer(name) or ("", 0, "")
                count = self.donor.stacks[stack]
                t = layer / (count - 1) if count > 1 else 1.0
                piece = self.recipe.slices[0]
                outputs.append(self._output(name, piece, [name] * len(piece.inputs), t))
        else:
            (stack,) = self.donor.stacks
            for piece in self.recipe.slices:
                first, end = piece.inputs[0].layers or (0, 0)
                for offset in range(end - first):
                    t = offset / (end - first - 1) if end - first > 1 else 1.0
                    outputs += self._layer(piece, stack, len(layers), offset, t)
                    layers.append((self.models[piece.inputs[0].model], first + offset))
        self._note_extras()
        return Plan(
            tuple(output for output in outputs if output is not None),
            self.donor,
            tuple(layers),
            tuple(self.notes),
        )

    def _loose(self) -> list[str]:
        """Names of the tensors that are of no layer: the donor's, and an output head that another model has untied."""
        names = [name for name in self.donor.tensors if split_layer(name) is None]
        for model in self.models.values():
            heads = [n for n in model.tensors if is_head(n) and not model.ties_head and n not in names]
            names += heads if not any(map(is_head, names)) else []
        return names

    def _slice_of(self, name: str) -> Slice:
        """The slice whose models a tensor of no layer is made of: the first before the layers, the last behind."""
        return self.recipe.slices[0 if _FIRST.search(name) else -1]

    def _layer(self, piece: Slice, stack: str, number: int, offset: int, t: float) -> list[Output | None]:
        """One layer of the output, by the names that the slice's first model has in the layer it takes."""
        sources = []
        for source in piece.inputs:
            model, first = self.models[source.model], (source.layers or (0, 0))[0]
            if len(model.stacks) != 1 or first + offset >= next(iter(model.stacks.values())):
                raise CheckpointError(
                    f"{self.recipe.where(source.line)}: got layer {first + offset} of {source.model}, which has "
                    f"{sum(model.stacks.values())} layers"
                )
            sources.append((next(iter(model.stacks)), first + offset))
        own_stack, own_layer = sources[0]
        outputs = []
        for name in self.models[piece.inputs[0].model].tensors:
            split = split_layer(name)
            if split is not None and split[:2] == (own_stack, own_layer):
                names = [f"{theirs}{layer}{split[2]}" for theirs, layer in sources]
                outputs.append(self._output(f"{stack}{number}{split[2]}", piece, names, t))
        return outputs

    def _output(self, name: str, piece: Slice, names: list[str], t: float) -> Output | None:
        """An output made of a tensor of each of a slice's models; None for a buffer that only some have."""
        recipe, method = self.recipe, self.recipe.method
        base_name = (piece.base or recipe.base) if method.base != "none" else None
        found: list[tuple[Input, Model, str]] = []
        for source, wanted in zip(piece.inputs, names, strict=True):
            model = self.models[source.model]
            tensor = model.find(wanted)
            if tensor is None:
                if _BUFFERS.search(wanted):
                    self.notes.append(f"{name}: a buffer that {model.name} lacks; left out")
                    return None
                raise CheckpointError(
                    f"tensor {name!r} is not in {model.name}, expected all models to have the same tensors"
                )
            found.append((source, model, tensor))
        by_token = self.rows is not None and is_vocabulary(name)
        self._check(name, found, by_token)
        shared = {
            p.name: resolve(p, (piece.parameters, recipe.parameters), name, t, recipe.where(piece.line))
            for p in method.parameters
            if not p.each
        }
        base, parts = None, []
        for source, model, tensor in found:
            if source.model == base_name:
                base = Part(model, tensor, {})
                continue
            blocks: tuple[Settings, ...] = (source.parameters, piece.parameters, recipe.parameters)
            where = f"{recipe.where(source.line)} ({source.model})"
            own = {p.name: resolve(p, blocks, tensor, t, where) for p in method.parameters if p.each}
            parts.append(Part(model, tensor, own))
        dtypes = [model.tensors[tensor].dtype for _, model, tensor in found]
        shape = tuple(found[0][1].tensors[found[0][2]].shape)
        dtype = recipe.out_dtype or recipe.dtype or promoted(dtypes)
        return Output(
            name=name,
            dtype=dtype if dtypes[0] in FLOATS else dtypes[0],
            shape=(self.rows or 0, *shape[1:]) if by_token else shape,
            base=base,
            parts=tuple(parts),
            shared=shared,
            by_token=by_token,
            line=piece.line,
        )

    def _check(self, name: str, found: list[tuple[Input, Model, str]], by_token: bool) -> None:
        """CheckpointError where the tensors of one output do not fit together."""
        _, first, tensor = found[0]
        ours = first.tensors[tensor]
        for _, model, other in found[1:]:
            theirs = model.tensors[other]
            if (ours.dtype in FLOATS) != (theirs.dtype in FLOATS):
                raise CheckpointError(
                    f"tensor {name!r} is {ours.dtype} in {first.name} and {theirs.dtype} in {model.name}; floats and "
                    "other numbers do not mix"
                )
            skip = 1 if by_token else 0
            if ours.shape[skip:] != theirs.shape[skip:]:
                remedy = (
                    "; give tokenizer_source: base or union, which fits their rows token by token"
                    if is_vocabulary(name) and ours.shape[1:] == theirs.shape[1:]
                    else ""
                )
                raise CheckpointError(
                    f"tensor {name!r} has shape {list(ours.shape)} in {first.name} and {list(theirs.shape)} in "
                    f"{model.name}, expected equal ones{remedy}"
                )

    def _note_extras(self) -> None:
        """Note what other models hold and the merged one will not."""
        if not self.whole:
            return
        for model in self.models.values():
            taken = {model.find(name) for name in self.donor.tensors}
            extra = [n for n in model.tensors if n not in taken and not is_head(n) and not _BUFFERS.search(n)]
            if extra:
                self.notes.append(
                    f"{model.name}: {len(extra)} tensors that {self.donor.name} lacks, such as {extra[0]!r}, are left "
                    "out"
                )
