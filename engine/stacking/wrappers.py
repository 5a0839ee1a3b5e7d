"""Wrappers that training leaves around a model, and the prefixes that they leave in its tensors' names."""

from __future__ import annotations

import re
import sys
from typing import Any

from torch import nn

_COMPILED = re.compile(r"(?:^|(?<=\.))_orig_mod\.")


def unwrapped(name: str) -> str:
    """A tensor's name without what wrappers add: `module.` in front, `_orig_mod.` (torch.compile) anywhere."""
    name = _COMPILED.sub("", name)
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def unwrap(module: nn.Module) -> nn.Module:
    """The model inside DataParallel, DistributedDataParallel, AveragedModel and torch.compile; itself otherwise."""
    while True:
        inner = _inner(module)
        if inner is None:
            return module
        module = inner


def _inner(module: Any) -> nn.Module | None:
    """What a wrapper wraps; None of other modules."""
    # Whoever has compiled a module has imported dynamo, and likewise for the others; importing them is slow.
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    if dynamo is not None and isinstance(module, dynamo.OptimizedModule):
        inner: nn.Module = module._orig_mod
        return inner
    swa = sys.modules.get("torch.optim.swa_utils")
    averaged = (swa.AveragedModel,) if swa is not None else ()
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel, *averaged)
    return module.module if isinstance(module, wrappers) else None
