"""Sources: where the tensors of a base or an expert come from, read block by block.

A source tells the names, shapes and dtypes of its tensors without reading them, and hands out flat blocks. Stacking
therefore never holds more than a few blocks above its result, whatever the size of the checkpoints.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paretofuse.engine.dtypes import TO_NAME, TO_TORCH
from paretofuse.engine.errors import CheckpointError
from paretofuse.engine.layout import ITEM_SIZE, is_text
from paretofuse.engine.stacking.factors import Factors
from paretofuse.engine.stacking.sharding import Sharding, shards
from paretofuse.engine.stacking.skeleton import can_copy, make_skeleton
from paretofuse.engine.stacking.wrappers import unwrap
from paretofuse.engine.store.safetensors_file import SafetensorsFile

BLOCK = 1 << 20
"""Elements read at a time."""

_AHEAD = 1 << 20
"""Bytes read beyond a tensor where tensors are read one after the other, so that small ones cost few reads."""


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class Blueprint:
    """What makes a model of tensors.

    Attributes:
        skeleton: gives the module with meta tensors; None where its class is not known. What it holds on another
            device stays as it is where no tensor of that name is given.
        files: the model directory's other files (config.json, tokenizer, ...), name -> content.
        model_class: qualified class name, where known.
        shardings: how the tensors that are sharded over processes lie, by name; their shapes elsewhere are those of
            this process's shards.
        heads: the blueprint of each objective that has a head of its own, where it differs.
    """

    skeleton: Callable[[], nn.Module] | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)
    model_class: str | None = None
    shardings: Mapping[str, Sharding] = field(default_factory=dict)
    heads: Mapping[str, Blueprint] = field(default_factory=dict)

    def of_head(self, head: str | None) -> Blueprint:
        """How to build a model with an objective's head: as its expert, where that is known."""
        own = self.heads.get(head) if head is not None else None
        return self if own is None or own.skeleton is None else own

    def make(self) -> nn.Module:
        """The skeleton.

        Raises:
            ValueError: how to build the model is not known.
            ImportError: the library of its class is missing.
        """
        if self.skeleton is not None:
            return self.skeleton()
        if self.shardings:
            reason = f"a {self.model_class} under fully_shard cannot be copied"
        elif self.model_class is not None:
            reason = f"nothing here tells how to build a {self.model_class}; pass module= to pf.load"
        else:
            reason = (
                "this engine was stacked from bare tensors and knows no module class; stack an nn.Module or a Hugging "
                "Face directory, or pass module= to pf.load"
            )
        raise ValueError(f"{reason}; merge_state_dict gives the merged tensors")


@dataclass(frozen=True)
class Source:
    """A model's tensors.

    Attributes:
        label: what to call it in messages.
        infos: shape and dtype by name; tied tensors appear once.
        read: (name, start, stop) -> the flat elements start..stop of a tensor; never to be written to.
        devices: where tensors lie that are in memory, by name.
        notes: what a user should know of it, a sentence each.
        aliases: further names of tied tensors -> the name in `infos`.
        constants: names of tensors that are never merged but taken from the base as they are: 0-dim buffers, and what
            a file holds that the model's class has no use for.
        blueprint: what is known of the model besides its tensors.
        is_delta: the tensors are deltas already, and absent ones are zero (LoRA).
        replaced: with is_delta, names of tensors that are no deltas but stand for the base's (modules_to_save).
        factors: with is_delta, the low-rank updates whose sum a delta is, by name; `read` multiplies them out.
    """

    label: str
    infos: Mapping[str, TensorInfo]
    read: Callable[[str, int, int], Tensor]
    aliases: Mapping[str, str] = field(default_factory=dict)
    constants: frozenset[str] = frozenset()
    blueprint: Blueprint = field(default_factory=Blueprint)
    is_delta: bool = False
    replaced: frozenset[str] = frozenset()
    factors: Mapping[str, tuple[Factors, ...]] = field(default_factory=dict)
    devices: Mapping[str, torch.device] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def blocks(self, name: str) -> Iterator[Tensor]:
        """The tensor's flat blocks, in order."""
        numel = self.infos[name].numel
        for start in range(0, numel, BLOCK):
            yield self.read(name, start, min(start + BLOCK, numel))

    def equal(self, one: str, two: str) -> bool:
        """Whether two tensors have the same shape and values."""
        pairs = zip(self.blocks(one), self.blocks(two), strict=False)
        return self.infos[one].shape == self.infos[two].shape and all(torch.equal(a, b) for a, b in pairs)

    def renamed(self, names: Mapping[str, str]) -> Source:
        """The tensors that have a name here, under it: new name -> old name."""
        read, infos, devices = self.read, self.infos, self.devices
        now = {old: new for new, old in names.items()}
        return replace(
            self,
            infos={new: infos[old] for new, old in names.items() if old in infos},
            read=lambda name, start, stop: read(names[name], start, stop),
            aliases={
                now[alias]: now[old] for alias, old in self.aliases.items() if {alias, old} <= now.keys()
            },
            constants=frozenset(new for new, old in names.items() if old in self.constants),
            replaced=frozenset(new for new, old in names.items() if old in self.replaced),
            devices={new: devices[old] for new, old in names.items() if old in devices},
        )

    def beside(self, other: Source) -> Source:
        """These tensors and another source's, whose names differ from theirs."""
        mine, others = self.read, other.read
        return replace(
            self,
            infos={**self.infos, **other.infos},
            read=lambda name, start, stop: (others if name in other.infos else mine)(name, start, stop),
        )


def from_state_dict(tensors: Mapping[str, Tensor], label: str) -> Source:
    """A source over a state dict; names that share their whole memory are tied. Of DTensors, over the shards here.

    Raises:
        TypeError: a name is no text, or a value is not a tensor.
        CheckpointError: a tensor has no data or is sparse, or a DTensor is a pending sum.
    """
    owners: dict[tuple[object, ...], str] = {}
    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{label}: entry {name!r} is {type(tensor).__name__}, expected a tensor")
        if not is_text(name):
            raise TypeError(f"{label}: a tensor has the name {name!r}, expected a text")
        if tensor.device.type == "meta":
            raise CheckpointError(f"{label}: tensor {name!r} is on the meta device; load its weights first")
        if tensor.layout != torch.strided:
            raise CheckpointError(f"{label}: tensor {name!r} is sparse; stack what tensor.to_dense() gives")
    tensors, shardings = shards(tensors, label)
    for name, tensor in tensors.items():
        place = (tensor.device, tensor.dtype, tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        owner = owners.setdefault(place, name) if tensor.numel() else name
        if owner == name:
            kept[name] = tensor.detach()
        else:
            aliases[name] = owner
    return Source(
        label=label,
        infos={name: TensorInfo(tuple(t.shape), t.dtype) for name, t in kept.items()},
        read=lambda name, start, stop: kept[name].reshape(-1)[start:stop],
        aliases=aliases,
        blueprint=Blueprint(shardings=shardings),
        devices={name: tensor.device for name, tensor in kept.items()},
    )


def from_module(module: nn.Module, label: str) -> Source:
    """A source over a module's state dict, with its skeleton and, for HF models, its configuration."""
    module = unwrap(module)
    state = {k: v for k, v in module.state_dict(keep_vars=True).items() if isinstance(v, Tensor)}
    plain = from_state_dict(state, label)
    skeleton = make_skeleton(module) if can_copy(module) else None
    buffers = dict(module.named_buffers())
    return Source(
        label=label,
        infos=plain.infos,
        read=plain.read,
        aliases=plain.aliases,
        constants=frozenset(n for n, b in buffers.items() if b.dim() == 0),
        blueprint=Blueprint(
            skeleton=None if skeleton is None else lambda: skeleton,
            files=_configuration(module),
            model_class=f"{type(module).__module__}.{type(module).__qualname__}",
            shardings=plain.blueprint.shardings,
        ),
        devices=plain.devices,
    )


def _configuration(module: nn.Module) -> dict[str, bytes]:
    """The files that save_pretrained would write beside an HF model's weights; none for other modules."""
    config: Any = getattr(module, "config", None)
    if not hasattr(config, "to_json_string"):
        return {}
    # Only save_pretrained notes the class and the dtype in the configuration; a model in memory may lack both.
    settings = json.loads(config.to_json_string(use_diff=False))
    settings["architectures"] = settings.get("architectures") or [type(module).__name__]
    if settings.get("dtype") is None and hasattr(module, "dtype"):
        settings["dtype"] = str(module.dtype).removeprefix("torch.")
    files = {"config.json": json.dumps(settings, indent=2).encode()}
    generation: Any = getattr(module, "generation_config", None)
    if generation is not None:
        files["generation_config.json"] = generation.to_json_string().encode()
    return files


def from_safetensors(paths: list[Path], label: str) -> Source:
    """A source over one or several (sharded) .safetensors files, read block by block without mapping them.

    Raises:
        StoreError: a file is not a valid safetensors file.
        CheckpointError: two shards hold the same tensor.
    """
    infos: dict[str, TensorInfo] = {}
    places: dict[str, tuple[Path, int, str]] = {}
    for path in paths:
        for name, entry in SafetensorsFile(path).tensors.items():
            if name in infos:
                raise CheckpointError(
                    f"{label}: tensor {name!r} is in {places[name][0].name} and again in {path.name}"
                )
            infos[name] = TensorInfo(entry.shape, TO_TORCH[entry.dtype])
            places[name] = (path, entry.offset, entry.dtype)

    read_bytes = _reader()

    def read(name: str, start: int, stop: int) -> Tensor:
        path, offset, dtype = places[name]
        item, count = ITEM_SIZE[dtype], stop - start
        if not count:
            return torch.empty(0, dtype=TO_TORCH[dtype])
        buffer, place = read_bytes(path, offset + start * item, count * item, item)
        if len(buffer) < place + count * item:
            raise CheckpointError(
                f"{label}: {path.name} ended while reading tensor {name!r}; is it truncated?"
            )
        return torch.frombuffer(buffer, dtype=TO_TORCH[dtype], count=count, offset=place)

    return Source(label=label, infos=infos, read=read)


def _reader() -> Callable[[Path, int, int, int], tuple[bytearray, int]]:
    """A function (path, offset, bytes, bytes an element) -> (buffer, place of the bytes in it).

    Where small tensors are read one after the other, it reads ahead and serves the next ones of the same buffer. The
    buffer ends early where the file does.
    """
    held: tuple[Path | None, int, bytearray] = (None, 0, bytearray())

    def read_bytes(path: Path, offset: int, size: int, item: int) -> tuple[bytearray, int]:
        nonlocal held
        whose, start, buffer = held
        place = offset - start
        follows = whose == path and 0 <= place <= len(buffer)
        if follows and place + size <= len(buffer) and place % item == 0:  # torch wants elements aligned
            return buffer, place
        buffer = bytearray(max(size, _AHEAD) if follows else size)
        view, done = memoryview(buffer), 0
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            while done < len(buffer) and (count := os.readv(file.fileno(), [view[done:]])):
                done += count
        view.release()
        del buffer[done:]
        held = path, offset, buffer
        return buffer, 0

    return read_bytes


def dtype_name(info: TensorInfo, label: str, name: str) -> str:
    """The safetensors name of a tensor's dtype.

    Raises:
        CheckpointError: a store has no such dtype.
    """
    if info.dtype not in TO_NAME:
        raise CheckpointError(
            f"{label}: tensor {name!r} is {info.dtype}, which no store holds; convert it to float32 first"
        )
    return TO_NAME[info.dtype]
