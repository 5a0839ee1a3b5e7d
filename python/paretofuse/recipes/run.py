"""Runs a recipe: tensor by tensor from the models' mapped files into a new model directory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from paretofuse.engine.errors import CheckpointError
from paretofuse.engine.layout import ITEM_SIZE
from paretofuse.engine.merging.disk import SHARD_BYTES
from paretofuse.engine.methods.method import Group, Method
from paretofuse.engine.methods.numbers import Numbers, promoted
from paretofuse.engine.store.atomic import fresh
from paretofuse.engine.store.reader import Progress
from paretofuse.engine.store.safetensors_file import SafetensorsFile, SafetensorsWriter
from paretofuse.engine.store.shards import index_name, index_text, shard_ends, shard_name
from paretofuse.recipes.config import Recipe, read_recipe
from paretofuse.recipes.files import RECIPE, files_beside
from paretofuse.recipes.models import Model
from paretofuse.recipes.plan import Output, Part, make_plan
from paretofuse.recipes.vocabulary import Vocabulary, make_vocabulary

_METADATA = {"format": "pt", "written_by": "paretofuse recipe"}
"""In the header of every file: the first for transformers, the second so that only recipes' outputs are replaced."""


@dataclass(frozen=True)
class Outcome:
    """What a recipe wrote.

    Attributes:
        path: the model's directory.
        method: the merge method's name.
        tensors: how many.
        nbytes: theirs.
        notes: what a user should know, a sentence each.
    """

    path: Path
    method: str
    tensors: int
    nbytes: int
    notes: tuple[str, ...]


def run_recipe(
    config: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    methods: Sequence[Method] = (),
    seed: int = 0,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Run a recipe of mergekit's into a complete model directory, tensor by tensor from disk to disk.

    The arithmetic is in float32 (float64 where a model is), and each result is rounded once. The directory is written
    beside its place, synced and renamed: it is there whole or not at all. Weights of more than 5 GB are cut into
    several files with an index. Beside them: the base's own files, fitted, a model card, and the recipe.

    Args:
        config: the YAML file; docs/recipes.md says which keys and methods.
        out: the directory; an earlier recipe's output there is replaced, and nothing else is.
        methods: merge methods of your own, beside those that there are.
        seed: what the random methods (dare, della) start from; the same seed gives the same model on every machine.
        threads: threads of the native kernels; unless told, as many as this process may use.
        progress: called with the bytes written and the bytes in all.

    Raises:
        ValueError: the recipe is wrong or not supported (names its line), the models do not fit together (as
            CheckpointError), or `out` holds something else.
        OSError: reading or writing failed; what was there before is untouched.
        ImportError: PyYAML is missing.
    """
    place = Path(out)
    _check_place(place)
    recipe = read_recipe(Path(config), methods)
    models = {name: Model(name) for name in recipe.models}
    vocabulary = None
    if recipe.tokenizer is not None:
        vocabulary = make_vocabulary(
            recipe.tokenizer,
            recipe.base or recipe.models[0],
            models,
            asked=f"tokenizer_source: {recipe.tokenizer}",
            pad=recipe.pad_vocabulary_to or 1,
        )
    plan = make_plan(recipe, models, None if vocabulary is None else vocabulary.size)
    outputs = sorted(plan.outputs, key=lambda output: -ITEM_SIZE[output.dtype])  # each on its alignment
    files = files_beside(recipe, plan, models, vocabulary)
    with fresh(place, directory=True) as folder:
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        nbytes = _write_weights(folder, recipe, outputs, vocabulary, seed, threads, progress)
    notes = (*recipe.notes, *plan.notes, *(() if vocabulary is None else vocabulary.notes))
    return Outcome(place, recipe.method.name, len(outputs), nbytes, notes)


def _write_weights(
    folder: Path,
    recipe: Recipe,
    outputs: Sequence[Output],
    vocabulary: Vocabulary | None,
    seed: int,
    threads: int | None,
    progress: Progress | None,
) -> int:
    """Write every output, in as many files as it takes; returns the bytes."""
    sizes = [_nbytes(output) for output in outputs]
    ends = shard_ends(sizes, SHARD_BYTES)
    total, done = sum(sizes), 0
    where: dict[str, str] = {}
    for number, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        name = shard_name("model", number, len(ends))
        with SafetensorsWriter(
            folder / name, metadata=_METADATA, reserve=max(1024, 256 * (end - start))
        ) as file:
            for output in outputs[start:end]:
                merged = _merge(recipe, output, vocabulary, seed, threads)
                file.add(output.name, merged.dtype, merged.shape, [merged.data])
                where[output.name] = name
                done += _nbytes(output)
                if progress is not None:
                    progress(done, total)
    if len(ends) > 1:
        numbers = sum(int(np.prod(output.shape, dtype=np.int64)) for output in outputs)
        (folder / index_name("model")).write_text(index_text(numbers, total, where), encoding="utf-8")
    return total


def _nbytes(output: Output) -> int:
    return int(np.prod(output.shape, dtype=np.int64)) * ITEM_SIZE[output.dtype]


def _merge(
    recipe: Recipe, output: Output, vocabulary: Vocabulary | None, seed: int, threads: int | None
) -> Numbers:
    """One merged tensor."""
    given = {id(part): part.model.numbers(part.tensor) for part in output.inputs}
    if output.by_token and vocabulary is not None:
        names = [part.model.name for part in output.inputs]
        base_name = None if output.base is None else output.base.model.name
        fitted = vocabulary.fitted(names, list(given.values()), base_name or recipe.base)
        given = dict(zip(given, fitted, strict=True))
    first = given[id(output.inputs[0])]
    if not first.is_float:
        for part in output.inputs[1:]:
            if not np.array_equal(given[id(part)].data, first.data):
                raise CheckpointError(
                    f"tensor {output.name!r} holds {first.dtype}, which are not merged, and they differ between "
                    f"{output.inputs[0].model.name} and {part.model.name}; make them equal first"
                )
        return first

    def numbers(part: Part) -> Numbers:
        own = given[id(part)]
        # Rounding to a smaller dtype changes the numbers, widening to a larger one does not.
        narrows = recipe.dtype is not None and promoted([own.dtype, recipe.dtype]) != recipe.dtype
        return own.rounded_to(recipe.dtype) if narrows and recipe.dtype else own

    group = Group(
        name=output.name,
        base=None if output.base is None else numbers(output.base),
        models=tuple(numbers(part) for part in output.parts),
        each=tuple(part.parameters for part in output.parts),
        shared=output.shared,
        seed=seed,
        threads=threads,
    )
    merged = Numbers.empty(output.dtype, output.shape)
    try:
        recipe.method.merge(group, merged)
    except ValueError as error:
        raise ValueError(f"{recipe.where(output.line)}: tensor {output.name!r}: {error}") from error
    for own in given.values():
        own.release()
    return merged


def _check_place(place: Path) -> None:
    """ValueError where something stands that is no earlier recipe's output."""
    if not os.path.lexists(place):
        return
    if not place.is_dir():
        raise ValueError(f"got {place}, which is a file, expected a directory to write; choose another")
    entries = list(place.iterdir())
    weights = [entry for entry in entries if entry.suffix == ".safetensors"]
    own = (place / RECIPE).is_file() and all(
        SafetensorsFile(path).metadata.get("written_by") == _METADATA["written_by"] for path in weights
    )
    if entries and not (own and weights):
        raise ValueError(
            f"got {place}, which holds other files than a recipe's output; choose another place or remove it"
        )
