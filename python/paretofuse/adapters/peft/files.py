"""LoRA directories as PEFT saves them: adapter_config.json and adapter_model.safetensors, read without PEFT.

Every key of the file is used, or refused by its name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paretofuse.adapters.files import json_object
from paretofuse.adapters.hf import CONFIG as MODEL_CONFIG
from paretofuse.adapters.peft.config import (
    OUT_PROJ_ADDED,
    check_plain_sum,
    check_start,
    is_saved_whole,
    is_targeted,
    rank_and_scale,
)
from paretofuse.adapters.peft.source import Adapter, Base, Whole, to_source
from paretofuse.engine.errors import CheckpointError
from paretofuse.engine.stacking.factors import Factors
from paretofuse.engine.stacking.sources import Source, from_safetensors

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PART = re.compile(
    r"(?:(?P<module>.+)\.)?(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B"
    r"|token_adapter\.trainable_tokens_delta)"
)
_PAIRS = {"lora_A.weight": "lora_B.weight", "lora_embedding_A": "lora_embedding_B"}


def adapter_folder(path: Path, label: str) -> Path | None:
    """Where the adapter of a directory is: the directory itself, or its only sub-folder with one; None without any.

    PEFT saves the adapter "default" in the directory itself, and every other one in a sub-folder of its name.

    Raises:
        CheckpointError: several sub-folders hold one.
    """
    if (path / CONFIG).is_file():
        return path
    found = sorted(config.parent for config in path.glob(f"*/{CONFIG}"))
    if len(found) > 1:
        raise CheckpointError(
            f"{label}: holds the adapters {[folder.name for folder in found]}; name the folder of one, such as "
            f"'{found[0]}'"
        )
    return found[0] if found else None


def from_directory(path: Path, label: str, base: Source) -> Source:
    """A source of deltas over a PEFT LoRA directory.

    Args:
        path: the directory, from `adapter_folder`.
        label: what to call it in messages.
        base: the model that the adapter was trained on.

    Raises:
        CheckpointError: not a LoRA, a kind that is not a plain sum (DoRA), a key that is not known, or tensors that
            do not fit the base or the configuration.
    """
    config = json_object((path / CONFIG).read_bytes(), CONFIG, label)
    check_plain_sum(config, label)
    check_start(config, label)
    if not (path / WEIGHTS).is_file():
        raise CheckpointError(f"{label}: expected {WEIGHTS} beside {CONFIG}; pickles are never read")
    files = from_safetensors([path / WEIGHTS], label)
    reader = _Reader(config, files, Base(base), label)
    return to_source(reader.adapter(), reader.base, label)


@dataclass(frozen=True)
class _Pair:
    """The factors of one tensor: the keys of A and B, and what the tensor is called in rank_pattern."""

    target: str
    a: str
    b: str
    pattern_name: str
    embedding: bool


class _Reader:
    """Gives the keys of one adapter file their meaning."""

    def __init__(self, config: Mapping[str, Any], files: Source, base: Base, label: str) -> None:
        self.config, self.files, self.base, self.label = config, files, base, label

    def adapter(self) -> Adapter:
        """What the file does to the base.

        Raises:
            CheckpointError: a key that is not known, or tensors that fit neither the base nor the configuration.
        """
        parts: dict[str, dict[str, str]] = {}  # module -> its parts -> their keys
        others = []
        for key in self.files.infos:
            match = _PART.fullmatch(key.removeprefix(_PREFIX))
            if match is None:
                others.append(key)
            else:
                parts.setdefault(match["module"] or "", {})[match["part"]] = key
        whole: dict[str, Whole] = {}
        for key in others:
            self._add_whole(whole, key)
        pairs = [pair for module, own in parts.items() for pair in self._pairs(module, own)]
        transposed = self._orientations(pairs)
        factors: dict[str, tuple[Factors, ...]] = {
            pair.target: (self._factors(pair, transposed[pair.target]),) for pair in pairs
        }
        for module, own in parts.items():
            if "lora_B.bias" in own:
                self._add_bias(factors, module, own)
            if "token_adapter.trainable_tokens_delta" in own:
                self._add_tokens(whole, module, own["token_adapter.trainable_tokens_delta"])
        return Adapter(factors, whole, keeps_ties=bool(self.config.get("ensure_weight_tying")))

    def _pairs(self, module: str, own: Mapping[str, str]) -> list[_Pair]:
        """The factors of a module, with the tensor that they change."""
        pairs = []
        for a, b in _PAIRS.items():
            for one, other in ((a, b), (b, a)):
                if one in own and other not in own:
                    raise CheckpointError(
                        f"{self.label}: {own[one]!r} has no {other!r} beside it; the file is incomplete, save it again"
                    )
            if a in own:
                target, pattern_name = self._target(module, own[a])
                pairs.append(_Pair(target, own[a], own[b], pattern_name, embedding=a == "lora_embedding_A"))
        return pairs

    def _target(self, module: str, key: str) -> tuple[str, str]:
        """The base's tensor that a module's factors change, and its name in rank_pattern.

        PEFT wraps a module with several targeted parameters once for each, in the order of their registration, so
        that the outermost wrapper, whose key has no "base_layer", is the last parameter's.
        """
        bare = module.replace(".base_layer", "")
        parameters, in_order = self.base.parameters(bare)
        targets = self.config.get("target_parameters") or []
        chosen = [p for p in parameters if p in targets or any(p.endswith(f".{t}") for t in targets)]
        depth = len(module) - len(module.removesuffix(".base_layer" * module.count(".base_layer")))
        depth //= len(".base_layer")
        if chosen and depth < len(chosen):
            if len(chosen) > 1 and not in_order:
                raise CheckpointError(
                    f"{self.label}: {key!r} may belong to any of {chosen}; pass the base as a module or a model "
                    "directory, whose parameters have an order"
                )
            return chosen[-1 - depth], chosen[-1 - depth]
        for name in (f"{bare}.weight", f"{bare}.in_proj_weight"):
            if name in self.base.infos:
                self._check_targeted(module, bare, key)
                return name, bare
        raise CheckpointError(
            f"{self.label}: {key!r} belongs to no tensor of {self.base.source.label}; was it trained on another base?"
        )

    def _check_targeted(self, module: str, bare: str, key: str) -> None:
        """Refuse factors that PEFT would not read."""
        if ".base_layer.out_proj" in module:
            bare = bare.removesuffix(".out_proj")  # comes with the nn.MultiheadAttention around it
        ties = self.config.get(
            "ensure_weight_tying"
        )  # the other names of a tied weight are left out on purpose
        if not ties and not is_targeted(self.config, bare):
            raise CheckpointError(
                f"{self.label}: {key!r} is of a module that the configuration leaves out (target_modules, "
                "exclude_modules, modules_to_save, layers_to_transform), so that PEFT would ignore it; correct "
                f"{CONFIG}, or save the adapter again"
            )

    def _orientations(self, pairs: list[_Pair]) -> dict[str, bool]:
        """Whether each target stores its weight transposed, by its shape, else its module's kind, else the flag.

        Raises:
            CheckpointError: the factors fit neither way, or a square weight's way cannot be known.
        """
        found: dict[str, bool] = {}
        square = []
        for pair in pairs:
            fitting = [turned for turned in (False, True) if self._fits(pair, turned)]
            known = self._known_orientation(pair)
            if known is not None:
                fitting = [turned for turned in fitting if turned == known]
            if not fitting:
                a, b = self.files.infos[pair.a].shape, self.files.infos[pair.b].shape
                raise CheckpointError(
                    f"{self.label}: {pair.a!r} of shape {list(a)} and {pair.b!r} of shape {list(b)} do not fit tensor "
                    f"{pair.target!r}, which has shape {list(self.base.infos[pair.target].shape)} in "
                    f"{self.base.source.label}; was it trained on another base?"
                )
            found[pair.target] = fitting[0]
            if len(fitting) > 1:
                square.append(pair)
        flag = bool(self.config.get("fan_in_fan_out"))
        for pair in square:
            rest = {found[other.target] for other in pairs if other not in square and not other.embedding}
            if not rest <= {flag} or len(self.base.infos[pair.target].shape) == 3:
                raise CheckpointError(
                    f"{self.label}: {pair.target!r} is square, and bare tensors do not tell whether it is stored "
                    "transposed; pass the base as a module or a model directory"
                )
            found[pair.target] = flag
        return found

    def _known_orientation(self, pair: _Pair) -> bool | None:
        """Whether a tensor is stored transposed, where its kind tells."""
        shape = self.base.infos[pair.target].shape
        if pair.embedding or len(self.files.infos[pair.a].shape) > 2:
            return pair.embedding
        module = self.base.module(pair.target.rpartition(".")[0])
        if len(shape) == 3:
            return None if module is None else bool(getattr(module, "is_transposed", False))
        if pair.pattern_name == pair.target or not pair.target.endswith(".weight"):
            return False  # targeted parameters and in_proj_weight are [O, I]
        if module is None:
            return None
        return any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)

    def _fits(self, pair: _Pair, transposed: bool) -> bool:
        """Whether the factors' product has the target's shape."""
        a, b = self.files.infos[pair.a].shape, self.files.infos[pair.b].shape
        shape = self.base.infos[pair.target].shape
        if len(a) < 2 or len(b) < 2 or a[0] != b[1]:
            return False
        if len(a) > 2:
            return not transposed and (b[0], *a[1:]) == shape and set(b[2:]) <= {1}
        return shape[-2:] == ((a[1], b[0]) if transposed else (b[0], a[1])) and len(shape) in (2, 3)

    def _factors(self, pair: _Pair, transposed: bool) -> Factors:
        """The factors of a pair, with the scale that the configuration gives them.

        Raises:
            CheckpointError: their rank is not the configuration's.
        """
        rank, scale = rank_and_scale(self.config, pair.pattern_name, self.label)
        if (
            ".base_layer.out_proj." in pair.a
            and pair.target.replace(".out_proj.", ".in_proj_") in self.base.infos
        ):
            scale *= OUT_PROJ_ADDED
        shapes = [self.files.infos[key].shape for key in (pair.a, pair.b)]
        target = self.base.infos[pair.target].shape
        stacked = target[0] if len(target) == 3 and len(shapes[0]) == 2 else None
        if shapes[0][0] != rank * (stacked or 1):
            raise CheckpointError(
                f"{self.label}: {pair.a!r} has rank {shapes[0][0] // (stacked or 1)}, and the configuration says "
                f"{rank} (r, rank_pattern); correct {CONFIG}, or save the adapter again"
            )

        @lru_cache(maxsize=1)
        def read() -> tuple[Tensor, Tensor]:
            a, b = (_tensor(self.files, key) for key in (pair.a, pair.b))
            if stacked is None:
                return a.flatten(1), b.flatten(1)
            # A is [X R, I] with the weights one after the other, B is [O, R X] with them innermost.
            return a.view(stacked, rank, -1), b.view(-1, rank, stacked).permute(2, 0, 1)

        return Factors(rank, scale, transposed, read)

    def _add_bias(self, factors: dict[str, tuple[Factors, ...]], module: str, own: Mapping[str, str]) -> None:
        """The bias of B (lora_bias) moves the layer's own bias: a factor b [O, 1] with A = 1."""
        if "lora_B.weight" not in own:
            raise CheckpointError(f"{self.label}: {own['lora_B.bias']!r} has no 'lora_B.weight' beside it")
        key = own["lora_B.bias"]
        bare = module.replace(".base_layer", "")
        target = f"{bare}.bias"
        shape = self.files.infos[key].shape
        if target not in self.base.infos or self.base.infos[target].shape != shape:
            raise CheckpointError(
                f"{self.label}: {key!r} needs a bias {target!r} of shape {list(shape)}, which {self.base.source.label} "
                "does not have; PEFT cannot merge it either: train it without lora_bias"
            )
        _, scale = rank_and_scale(self.config, bare, self.label)
        factors[target] = (
            Factors(1, scale, False, lambda: (torch.ones(1, 1), _tensor(self.files, key).unsqueeze(1))),
        )

    def _add_tokens(self, whole: dict[str, Whole], module: str, key: str) -> None:
        """Trained rows of an embedding (trainable_token_indices): they replace the base's."""
        indices = self.config.get("trainable_token_indices") or []
        if isinstance(indices, Mapping):
            indices = next((own for name, own in indices.items() if module.endswith(name)), [])
        target = f"{module}.weight"
        shape = self.files.infos[key].shape
        info = self.base.infos.get(target)
        if info is None or shape != (len(indices), *info.shape[1:]):
            raise CheckpointError(
                f"{self.label}: {key!r} of shape {list(shape)} does not fit {len(indices)} tokens of {target!r}, which "
                f"has shape {list(info.shape) if info else None} in {self.base.source.label}"
            )
        if target in whole or any(not 0 <= row < info.shape[0] for row in indices):
            raise CheckpointError(
                f"{self.label}: trainable_token_indices do not fit the {info.shape[0]} rows of {target!r}"
            )
        stored = self.base.source.aliases.get(target, target)
        width = info.numel // info.shape[0]

        def read(start: int, stop: int) -> Tensor:
            block = self.base.source.read(stored, start, stop).clone()
            rows = self.files.read(key, 0, len(indices) * width).view(len(indices), width).to(block)
            for row, values in zip(indices, rows, strict=True):
                first, last = max(row * width, start), min((row + 1) * width, stop)
                if first < last:
                    block[first - start : last - start] = values[first - row * width : last - row * width]
            return block

        whole[target] = Whole(info, read, breaks_tie=not self._ties_tokens())

    def _ties_tokens(self) -> bool:
        """Whether PEFT makes tied weights follow trained tokens: in Transformers' models that say they are tied."""
        files = self.base.source.blueprint.files
        if MODEL_CONFIG not in files:
            return False
        config = json_object(files[MODEL_CONFIG], MODEL_CONFIG, self.base.source.label)
        return bool(config.get("tie_word_embeddings", True))

    def _add_whole(self, whole: dict[str, Whole], key: str) -> None:
        """A tensor that stands for the base's: of modules_to_save, a trained bias, a saved embedding.

        Raises:
            CheckpointError: the key is none of these.
        """
        plain = key.removeprefix(_PREFIX)
        if "lora_" in plain:
            raise CheckpointError(
                f"{self.label}: {key!r} is no key of a LoRA as PEFT saves it (lora_A.weight, lora_B.weight, without "
                "the adapter's name); load it where it was trained, and save it with save_pretrained"
            )
        if ".original_module." in plain:
            return  # what modules_to_save has replaced; PEFT saves its biases too under bias="all"
        wrappers = (r"\.modules_to_save\.\w+\.", r"\.modules_to_save\.", r"\.base_layer\.")
        names = [plain, *(re.sub(wrapper, ".", plain) for wrapper in wrappers)]
        name = next((n for n in names if n in self.base.infos), plain)
        info = self.files.infos[key]
        own = Whole(
            info,
            lambda start, stop: self.files.read(key, start, stop),
            breaks_tie=is_saved_whole(self.config, name),
        )
        if name in whole and not _are_equal(whole[name], own):
            raise CheckpointError(f"{self.label}: {key!r} gives {name!r} once more, with other values")
        whole[name] = own


def _tensor(files: Source, key: str) -> Tensor:
    """A whole tensor in float32."""
    info = files.infos[key]
    return files.read(key, 0, info.numel).to(torch.float32).view(info.shape)


def _are_equal(first: Whole, second: Whole) -> bool:
    if first.info != second.info:
        return False
    return all(torch.equal(a, b) for a, b in zip(first.blocks(), second.blocks(), strict=True))
