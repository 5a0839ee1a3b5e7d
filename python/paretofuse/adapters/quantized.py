"""Quantized checkpoints, refused by their format's name: packed integers are no numbers that a merge could mix.

Recognized by the configuration, and by names and dtypes alone where there is none (bare tensors). Whatever is not
recognized cannot slip through either: integer weights, and integer tables in which base and expert differ, are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from paretofuse.engine.errors import CheckpointError
from paretofuse.engine.stacking.sources import Source

_CONFIG = "config.json"
_METHODS = {
    "bitsandbytes": "bitsandbytes", "gptq": "GPTQ", "awq": "AWQ", "compressed-tensors": "compressed-tensors",
    "mxfp4": "MXFP4", "fp8": "fp8 with scales", "fbgemm_fp8": "fp8 with scales", "quanto": "quanto", "hqq": "HQQ",
    "torchao": "torchao", "aqlm": "AQLM", "eetq": "EETQ", "gguf": "GGUF", "bitnet": "BitNet",
}  # fmt: skip
"""The formats' own names, by transformers' quant_method."""

_MARKS = (
    (
        "bitsandbytes",
        r"\.(absmax|quant_map|nested_absmax|nested_quant_map|SCB|weight_format)$|\.quant_state\.",
    ),
    ("GPTQ", r"(^|\.)g_idx$"),
    ("AWQ", r"(^|\.)qweight$"),
    ("compressed-tensors", r"\.weight_(packed|zero_point|global_scale)$"),
    ("MXFP4", r"_blocks$"),
    ("HQQ", r"(^|\.)W_q$"),
    ("quanto", r"\.(_data|_scale|_shift)$"),
    ("torchao", r"(:|_weight_)_?qdata$"),
    ("AQLM", r"(^|\.)codebooks$"),
)
"""A format, and the end of a name that no other kind of tensor has."""

_ANY_MARK = re.compile("|".join(end for _, end in _MARKS))

_LIBRARIES = {"torchao": "torchao", "bitsandbytes": "bitsandbytes", "optimum": "quanto", "hqq": "HQQ"}
"""The formats of tensors that are of a library's own class."""

_SCALES = ("_scale_inv", "_scale", "_scales")
_FLOAT8 = tuple(
    dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype) and "float8" in str(dtype)
)


def check_module(module: nn.Module, label: str) -> None:
    """Refuse a module that a library has packed: its layers or tensors are of classes of their own.

    Raises:
        CheckpointError: names the library and the layer or tensor.
    """
    for name, part in module.named_modules():
        if re.match(r"torch\.ao\.nn\..*quantized", type(part).__module__):
            raise _refusal(label, "torch.ao", f"layer {name!r} is a {type(part).__name__}")
    check_tensors({**dict(module.named_parameters()), **dict(module.named_buffers())}, label)


def check_tensors(tensors: Mapping[str, Any], label: str) -> None:
    """Refuse tensors in memory that a library has packed: they are of classes of its own.

    Raises:
        CheckpointError: names the library and the tensor.
    """
    for name, tensor in tensors.items():
        library = type(tensor).__module__.partition(".")[0]
        if isinstance(tensor, Tensor) and library in _LIBRARIES:
            raise _refusal(label, _LIBRARIES[library], f"tensor {name!r} is a {type(tensor).__name__}")


def check_source(source: Source) -> None:
    """Refuse a quantized checkpoint.

    Raises:
        CheckpointError: names the format, how it was recognized, and what to do.
    """
    config = json.loads(source.blueprint.files.get(_CONFIG, b"{}"))
    settings = config.get("quantization_config") or config.get("compression_config")
    if (
        isinstance(settings, dict) and settings and not source.is_delta
    ):  # an adapter's configuration is its base's
        method = str(
            settings.get("quant_method", "compressed-tensors" if "format" in settings else "unknown")
        )
        raise _refusal(source.label, _METHODS.get(method, method), f"{_CONFIG} has a quantization_config")
    found = _packed(source)
    if found is not None:
        name, info = found[1], source.infos[found[1]]
        raise _refusal(source.label, found[0], f"tensor {name!r} is {info.dtype} of shape {list(info.shape)}")


def check_kinds(expert: Source, base: Source) -> None:
    """Refuse integers where the base has floats, and integer tables other than the base's.

    Integers are taken from the base: they would stay while everything around them moves.

    Raises:
        CheckpointError: names the tensor.
    """
    for name, info in base.infos.items():
        own = expert.aliases.get(name, name)
        if own not in expert.infos or name in base.constants:
            continue
        theirs = expert.infos[own]
        if theirs.dtype.is_floating_point != info.dtype.is_floating_point:
            raise CheckpointError(
                f"{expert.label}: tensor {name!r} is {theirs.dtype}, and {info.dtype} in {base.label}; floats and "
                "other numbers do not mix: dequantize or convert it first"
            )
        if len(info.shape) < 2 or not _is_integer(info.dtype):
            continue
        pairs = zip(base.blocks(name), expert.blocks(own), strict=False)
        if theirs.shape != info.shape or not all(
            torch.equal(a.cpu(), b.to("cpu", a.dtype)) for a, b in pairs
        ):
            raise CheckpointError(
                f"{expert.label}: tensor {name!r} holds other integers than {base.label}'s; integers are not merged, "
                "so the base's would stay. Packed weights must be dequantized first; anything else must be equal"
            )


def gguf_refusal(label: str) -> CheckpointError:
    """The error for a GGUF file."""
    return CheckpointError(
        f"{label}: GGUF holds packed weights under other names; convert it: from_pretrained(directory, gguf_file=...) "
        "of transformers unpacks it, and save_pretrained writes what is read here"
    )


def _packed(source: Source) -> tuple[str, str] | None:
    """A packed format, and the tensor that tells; None where all are ordinary.

    A format's own names go first: integer weights alone tell that there is one, not which.
    """
    marked = [name for name in source.infos if _ANY_MARK.search(name)]
    for found, end in _MARKS:
        for name in marked:
            if re.search(end, name) and (found != "MXFP4" or _is_integer(source.infos[name].dtype)):
                return found, name
    for name, info in source.infos.items():
        scaled = any(f"{name}{end}" in source.infos for end in _SCALES)
        if scaled and info.dtype in _FLOAT8:
            return "fp8 with scales", name
        if scaled and _is_integer(info.dtype):
            return "compressed-tensors", name
        if _is_integer(info.dtype) and len(info.shape) > 1 and name.rpartition(".")[2].startswith("weight"):
            return "integer weights of an unknown format", name
    return None


def _is_integer(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def _refusal(label: str, found: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{label}: quantized ({found}): {reason}, and packed weights cannot be merged; stack the checkpoint from "
        "before quantization, or load it with transformers, call model.dequantize(), and save it again (if its weights "
        "are plain floats already, remove quantization_config from config.json)"
    )
