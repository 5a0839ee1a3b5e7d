"""Models whose config.json names no class of transformers but an architecture of timm, or a class of diffusers."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretofuse.engine.stacking.skeleton import make_skeleton

if TYPE_CHECKING:
    from torch import nn


def class_name(config: Mapping[str, Any]) -> str | None:
    """`timm.` and the architecture, or `diffusers.` and the class, that a configuration names, if it names any."""
    if isinstance(config.get("architecture"), str) and "pretrained_cfg" in config:
        return f"timm.{config['architecture']}"
    if isinstance(config.get("_class_name"), str) and "_diffusers_version" in config:
        return f"diffusers.{config['_class_name']}"
    return None


def skeleton(name: str, config: Mapping[str, Any]) -> nn.Module:
    """The model of a configuration, with meta tensors.

    Args:
        name: from `class_name`.
        config: what config.json holds.

    Raises:
        ImportError: the library is missing.
        ValueError: the library has no such model.
    """
    library, _, kind = name.partition(".")
    make = _of_timm if library == "timm" else _of_diffusers
    try:
        module = make(kind, config)
    except ImportError as error:
        raise ImportError(
            f"a model of {name} needs {library} ({error}); pip install {library}, or pass module= to pf.load"
        ) from error
    return make_skeleton(module).eval()


def _of_timm(_: str, config: Mapping[str, Any]) -> nn.Module:
    import timm

    with tempfile.TemporaryDirectory(prefix="paretofuse-") as folder:
        Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
        try:
            module: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=False)
        except (RuntimeError, TypeError, KeyError) as error:
            raise ValueError(f"got a config.json of which timm makes no model: {error}") from error
    return module


def _of_diffusers(kind: str, config: Mapping[str, Any]) -> nn.Module:
    import diffusers

    made: Any = getattr(diffusers, kind, None)
    is_model = isinstance(made, type) and issubclass(made, diffusers.ModelMixin)
    if not is_model:
        raise ValueError(
            f"got config.json of the class {kind}, expected a model of diffusers {diffusers.__version__}; a newer one "
            "may have it, or pass module= to pf.load"
        )
    module: nn.Module = made.from_config(dict(config))
    return module
