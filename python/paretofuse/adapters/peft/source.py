"""What an adapter does to its base, by the base's names, and the source of deltas that the engine reads it through."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from paretofuse.adapters import hf
from paretofuse.engine.errors import CheckpointError
from paretofuse.engine.stacking.factors import Factors
from paretofuse.engine.stacking.sources import BLOCK, Blueprint, Source, TensorInfo


@dataclass(frozen=True)
class Whole:
    """A tensor that stands for the base's.

    Attributes:
        info: its shape and dtype.
        read: (start, stop) -> its flat elements start..stop.
        breaks_tie: the adapter trained a copy of its own, so that tensors tied to the base's keep their values.
    """

    info: TensorInfo
    read: Callable[[int, int], Tensor]
    breaks_tie: bool

    def blocks(self) -> Iterator[Tensor]:
        """The flat blocks, in order."""
        for start in range(0, self.info.numel, BLOCK):
            yield self.read(start, min(start + BLOCK, self.info.numel))


@dataclass(frozen=True)
class Adapter:
    """What an adapter does to its base: W becomes (its own W, where it has one) + the sum of its factors' updates.

    Attributes:
        factors: low-rank updates by the base's name.
        whole: tensors that stand for the base's (modules_to_save, trained biases and tokens), by name.
        keeps_ties: a change of one tied tensor changes all of them (ensure_weight_tying).
    """

    factors: Mapping[str, tuple[Factors, ...]]
    whole: Mapping[str, Whole]
    keeps_ties: bool = False


class Base:
    """A base as adapters see it: its tensors by every name, and the kinds of its modules."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.infos = {**source.infos, **{a: source.infos[n] for a, n in source.aliases.items()}}

    @cached_property
    def _skeleton(self) -> nn.Module | None:
        make = self.source.blueprint.skeleton
        return None if make is None else make()

    def module(self, name: str) -> nn.Module | None:
        """The module of a name; None where the base's modules are not known (bare tensors)."""
        try:
            return None if self._skeleton is None else self._skeleton.get_submodule(name)
        except AttributeError:
            return None

    def parameters(self, module: str) -> tuple[list[str], bool]:
        """The names of a module's direct parameters, and whether they are in the order of their registration."""
        found = self.module(module)
        if found is not None:
            return [f"{module}.{name}" for name, _ in found.named_parameters(recurse=False)], True
        return [name for name in self.infos if name.rpartition(".")[0] == module], False


def to_source(adapter: Adapter, base: Base, label: str) -> Source:
    """An adapter as a source of deltas.

    Raises:
        CheckpointError: factors that do not fit the base, or a change that breaks one of the base's ties.
    """
    source = base.source
    factors, whole = dict(adapter.factors), dict(adapter.whole)
    for name in [n for n, w in whole.items() if not w.breaks_tie]:
        own = whole.pop(name)
        if name in base.infos and base.infos[name].shape != own.info.shape:
            raise CheckpointError(
                f"{label}: comes with a {name!r} of shape {list(own.info.shape)}, and {source.label} has "
                f"{list(base.infos[name].shape)}; give the base the same first, such as by "
                "model.resize_token_embeddings(...) for a vocabulary that has grown"
            )
        if not _is_same(own, name, source):
            whole[source.aliases.get(name, name)] = own
    for owner, names in _tied(source).items():
        _follow_tie(factors, whole, owner, names, adapter.keeps_ties, (label, source.label))
    infos = {name: TensorInfo(base.infos[name].shape, torch.float32) for name in factors}
    infos |= {name: w.info for name, w in whole.items() if name not in factors}

    def read(name: str, start: int, stop: int) -> Tensor:
        blocks = [update.block(start, stop) for update in factors.get(name, ())]
        if name in whole:
            own = whole[name].read(start, stop)
            blocks = [own.to(torch.float32), *blocks] if blocks else [own]
        total = blocks[0]
        for block in blocks[1:]:
            total = total + block
        return total

    return Source(
        label=label,
        infos=infos,
        read=read,
        blueprint=_blueprint(source, whole),
        is_delta=True,
        replaced=frozenset(whole),
        factors={name: updates for name, updates in factors.items() if name not in whole},
    )


def _is_same(whole: Whole, name: str, base: Source) -> bool:
    """Whether a tensor is the base's own, value for value (PEFT saves an adapted embedding's weight beside it)."""
    name = base.aliases.get(name, name)
    if name not in base.infos or base.infos[name].shape != whole.info.shape:
        return False
    return _are_equal(whole.blocks(), base.blocks(name))


def _are_equal(blocks: Iterable[Tensor], others: Iterable[Tensor]) -> bool:
    """Whether all values are equal, whatever the dtypes."""
    for a, b in zip(blocks, others, strict=True):
        if a.dtype == b.dtype:
            a, b = a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
        else:
            a, b = a.to(torch.float64), b.to(torch.float64)
        if not torch.equal(a, b.to(a.device)):
            return False
    return True


def _tied(base: Source) -> dict[str, list[str]]:
    """The names of each tied tensor, by the one that is stored."""
    names: dict[str, list[str]] = {}
    for alias, owner in base.aliases.items():
        names.setdefault(owner, [owner]).append(alias)
    return names


def _follow_tie(
    factors: dict[str, tuple[Factors, ...]],
    whole: dict[str, Whole],
    owner: str,
    names: list[str],
    keeps_ties: bool,
    labels: tuple[str, str],
) -> None:
    """Move what is done to any of the tied names to the one that is stored; in place.

    Raises:
        CheckpointError: the tied names would get different values.
    """
    shared = whole.pop(owner) if owner in whole and not whole[owner].breaks_tie else None
    changes = {name: _Change(factors.pop(name, ()), whole.pop(name, shared)) for name in names}
    changed = [c for c in changes.values() if c.factors or c.whole is not shared]
    every = changed if keeps_ties and changed else list(changes.values())
    if not all(_are_alike(every[0], other) for other in every[1:]):
        first = next(name for name, c in changes.items() if c in changed)
        raise CheckpointError(
            f"{labels[0]} changes {first!r} otherwise than {[n for n in names if n != first]}, but {labels[1]} ties "
            "them; untie the base first: give each its own copy of the weight, and set tie_word_embeddings=False in "
            "its configuration"
        )
    if every[0].factors:
        factors[owner] = every[0].factors
    if every[0].whole is not None:
        whole[owner] = every[0].whole


@dataclass(frozen=True)
class _Change:
    """What is done to one of several tied names."""

    factors: tuple[Factors, ...]
    whole: Whole | None


def _are_alike(ours: _Change, theirs: _Change) -> bool:
    """Whether two changes give the same values."""
    if len(ours.factors) != len(theirs.factors):
        return False
    for a, b in zip(ours.factors, theirs.factors, strict=True):
        if not all(torch.equal(x, y) for x, y in zip(a.sides(), b.sides(), strict=True)):
            return False
    if ours.whole is theirs.whole:
        return True
    if ours.whole is None or theirs.whole is None or ours.whole.info.shape != theirs.whole.info.shape:
        return False
    return _are_equal(ours.whole.blocks(), theirs.whole.blocks())


def _blueprint(base: Source, whole: Mapping[str, Whole]) -> Blueprint:
    """The base's blueprint, with as many labels as the adapter's own classifier has."""
    blueprint = base.blueprint
    if hf.CONFIG not in blueprint.files:
        return blueprint
    config = json.loads(blueprint.files[hf.CONFIG])
    count = len(config.get("id2label") or {}) or 2  # transformers leaves out its default of two
    sizes = {
        (base.infos[name].shape[0], w.info.shape[0])
        for name, w in whole.items()
        if name in base.infos and base.infos[name].shape != w.info.shape
    }
    if len(sizes) != 1 or next(iter(sizes))[0] != count:
        return blueprint
    labels = range(next(iter(sizes))[1])
    config["id2label"] = {str(i): f"LABEL_{i}" for i in labels}
    config["label2id"] = {f"LABEL_{i}": i for i in labels}
    files = {**blueprint.files, hf.CONFIG: json.dumps(config, indent=2).encode()}
    return hf.blueprint_from_files(files, base.label)
