"""A class of transformers: its skeleton, and its own rules for which of its tensors a file's keys become."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from paretofuse.engine.errors import CheckpointError, some
from paretofuse.engine.stacking.skeleton import make_skeleton, stored_tensors
from paretofuse.engine.stacking.sources import Blueprint, Source, from_state_dict
from paretofuse.engine.stacking.wrappers import unwrapped

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MINIMUM = (5, 0)
"""The oldest version of transformers whose loading rules can be asked for."""


def check_transformers() -> None:
    """ImportError, with the remedy, unless a transformers that is new enough is installed."""
    try:
        from transformers import __version__
    except ImportError as error:
        raise ImportError(
            f"a Hugging Face directory needs transformers, which tells its classes and loads its files ({error}); pip "
            "install 'paretofuse[hf]', or give the .safetensors file itself to stack its tensors by their bare names"
        ) from error
    if tuple(int(part) for part in __version__.split(".")[:2]) < MINIMUM:
        raise ImportError(
            f"got transformers {__version__}, expected at least {'.'.join(map(str, MINIMUM))}; pip install -U "
            "'paretofuse[hf]'"
        )


def find_class(name: str) -> Any:
    """A class of transformers by its full name; None where the installed version has none of that name.

    Raises:
        ImportError: transformers is missing or too old.
    """
    check_transformers()
    import transformers

    return getattr(transformers, name.removeprefix("transformers."), None)


def make_model(name: str, config: dict[str, Any], owners: Mapping[str, str] | None = None) -> nn.Module:
    """The model of a configuration, in eval mode, its stored tensors on the meta device.

    Args:
        name: the class's full name.
        config: what config.json says.
        owners: the tensors that there will be: each name, also of tied ones -> the name that it is stored by. Where
            the class ties names that are stored apart, the model is untied; tensors that are not there at all keep
            the initial values that from_pretrained would give them, always the same ones. None: all, tied as the
            class ties them.

    Raises:
        ImportError: transformers is missing or too old.
        ValueError: this version of transformers has no class of that name.
    """
    cls = find_class(name)
    if cls is None:
        from transformers import __version__

        raise ValueError(
            f"got a model of class {name}, which transformers {__version__} does not have; pass module= to pf.load, or "
            "install the version that has it"
        )
    from transformers.initialization import no_init_weights

    settings = cls.config_class.from_dict(config)
    with no_init_weights():
        model = cls(settings)
    model.tie_weights()  # left out together with the initial values
    if owners is None:
        return make_skeleton(model).eval()
    _untie(model, owners)
    lacking = _lacking(model, owners)
    if lacking:
        _initialize(model, set(lacking), getattr(settings, "dtype", None))
    return make_skeleton(model, keep=lacking).eval()


def _lacking(model: nn.Module, owners: Mapping[str, str]) -> list[str]:
    """The model's stored tensors that are neither among the owned names nor tied to one of them."""
    tensors = stored_tensors(model)
    held = {id(tensors[name]) for name in owners if name in tensors}
    return [name for name, tensor in tensors.items() if id(tensor) not in held]


def _untie(model: PreTrainedModel, owners: Mapping[str, str]) -> None:
    """Give names that the class ties a parameter each where they are stored apart, as from_pretrained does."""
    first: dict[int, str] = {}
    for name, tensor in stored_tensors(model).items():
        owner = owners.get(name)
        if owner is None or first.setdefault(id(tensor), owner) == owner:
            continue
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, nn.Parameter(torch.empty_like(tensor)))
        getattr(model, "all_tied_weights_keys", {}).pop(name, None)  # or save_pretrained would tie them again


def _initialize(model: PreTrainedModel, fresh: set[str], dtype: Any) -> None:
    """Fill the tensors of some names as transformers fills those that a checkpoint lacks."""
    for name, tensor in stored_tensors(model).items():
        tensor._is_hf_initialized = name not in fresh  # type: ignore[attr-defined]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.initialize_weights()
    for name, tensor in stored_tensors(model).items():
        if name in fresh and isinstance(dtype, torch.dtype) and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def read_keys(model: PreTrainedModel, keys: Iterable[str]) -> tuple[dict[str, str], list[str], list[str]]:
    """What transformers makes of a file's keys.

    Returns:
        each of the class's names that a key is read into as it is -> that key (which may carry the prefix of a
        wrapper); the keys that are converted into other tensors (experts put together, projections cut apart); and
        those that the class has no use for.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )  # fmt: skip

    wanted, prefix = model.state_dict(), model.base_model_prefix
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]

    def rename(key: str) -> tuple[str, bool]:
        name, converter = rename_source_key(key, renamings, converters, prefix, wanted)
        if name not in wanted and key in wanted:
            name, converter = rename_source_key(key, [], [], prefix, wanted)
        return name, converter is not None

    names: dict[str, str] = {}
    converted, unused = [], []
    for key in sorted(keys, key=dot_natural_key):
        name, is_converted = rename(key)
        if name not in wanted:
            name, is_converted = rename(unwrapped(key))
        if name not in wanted or name in names:
            unused.append(key)
        elif is_converted:
            converted.append(key)
        else:
            names[name] = key
    return names, converted, unused


def in_class(files: Source, name: str, config: dict[str, Any]) -> Source:
    """A source whose tensors are those of a class of transformers, read from files as from_pretrained reads them.

    Tensors that the class has no use for stay beside them, as they are; those that it would like and no file holds
    are not among them.

    Args:
        files: the tensors by the files' own keys.
        name: the class's full name.
        config: what config.json says.

    Raises:
        ValueError, ImportError: as `make_model`.
        CheckpointError: a shape is not the configuration's.
    """
    model = make_model(name, config)
    names, converted, unused = read_keys(model, files.infos)
    read = _from_pretrained(files, name, config, unused) if converted else _tied(files.renamed(names), model)
    wrong = [n for n, info in read.infos.items() if info.shape != tuple(model.state_dict()[n].shape)]
    if wrong:
        raise CheckpointError(
            f"{files.label}: tensor {wrong[0]!r} has shape {list(read.infos[wrong[0]].shape)}, but config.json makes "
            f"it {list(model.state_dict()[wrong[0]].shape)}; the configuration and the weights are of different models"
        )
    owners = {own: own for own in read.infos} | dict(read.aliases)
    lacking, beside = _lacking(model, owners), [key for key in unused if key not in owners]
    notes = []
    if beside:
        notes.append(
            f"{files.label}: {name} has no use for {some(beside)}; merged models keep what the base has of it"
        )
    # A class may say itself that it fills a tensor without a checkpoint (sinusoidal positions).
    filled = [
        re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    ]
    told = [own for own in lacking if not any(pattern.search(own) for pattern in filled)]
    if told:
        notes.append(
            f"{files.label}: no file holds {some(told)} of {name}; initial values are taken, as by from_pretrained, "
            "and not merged"
        )
    return replace(
        read.beside(files.renamed({key: key for key in beside})),
        constants=frozenset(beside),
        blueprint=Blueprint(
            skeleton=cache(lambda: make_model(name, config, owners)),
            files=files.blueprint.files,
            model_class=name,
        ),
        notes=(*files.notes, *notes),
    )


def _tied(source: Source, model: nn.Module) -> Source:
    """The same tensors, each of those that the class ties once; those whose values differ stay apart."""
    groups: dict[int, list[str]] = {}
    for name, tensor in stored_tensors(model).items():
        groups.setdefault(id(tensor), []).append(name)
    aliases: dict[str, str] = {}
    for names in groups.values():
        held = [name for name in names if name in source.infos]
        for name in names if held else ():
            if name not in held or (name != held[0] and source.equal(held[0], name)):
                aliases[name] = held[0]
    infos = {name: info for name, info in source.infos.items() if name not in aliases}
    return replace(source, infos=infos, aliases=aliases)


def _from_pretrained(files: Source, name: str, config: dict[str, Any], unused: list[str]) -> Source:
    """The tensors that from_pretrained computes from the files' own, in memory; without those that they lack."""
    from transformers.utils import logging

    sizes: dict[torch.dtype, int] = {}
    for info in files.infos.values():
        if info.dtype.is_floating_point:
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.numel
    state: dict[str, Tensor] = {
        unwrapped(key): files.read(key, 0, info.numel).view(info.shape)
        for key, info in files.infos.items()
        if key not in unused
    }
    cls, bars = find_class(name), logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, loading = cls.from_pretrained(
            None,
            config=cls.config_class.from_dict(config),
            state_dict=state,
            dtype=max(sizes, key=lambda dtype: sizes[dtype]),
            output_loading_info=True,
        )
    finally:
        if bars:
            logging.enable_progress_bar()
    tensors = {n: t for n, t in stored_tensors(model).items() if n not in loading["missing_keys"]}
    return from_state_dict(tensors, files.label)
