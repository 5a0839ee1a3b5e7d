"""Two configurations compared: which settings make another model of the same tensors, and which only differ."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from paretofuse.adapters.files import json_object
from paretofuse.adapters.hf import CONFIG
from paretofuse.engine.errors import CheckpointError
from paretofuse.engine.stacking.sources import Source

_DECISIVE = re.compile(
    r"(^model_type$|rope|rotary|theta|eps|heads?$|head_dim|hidden_act|activation|_act$|window|norm|position_embedding_type|"
    r"experts_per_tok|top_k|scal|multiplier|softcap|alibi|causal|is_decoder|pool|layer_types)"
)
"""Settings that a forward pass computes with, by words in their names; no shape shows them."""

_HARMLESS = re.compile(
    r"(^_|architectures|version|dtype|label|problem_type|finetuning|dropout|drop_|_drop$|pdrop|use_cache|^output_|return_"
    r"|_token_id|_token$|task_specific|initializer|tokenizer|checkpointing|max_length|min_length|^tie_|chunk_size|"
    r"_loss|loss_|z_loss|aux_|_bias_update|torchscript|pruned_heads|attn_implementation|name_or_path|auto_map)"
)
"""Settings that differ between a base and what was fine-tuned from it, and change nothing of a merge."""


def check_configurations(base: Source, expert: Source, allow_misfit: bool) -> tuple[str, ...]:
    """Compare the configurations of a base and an expert, where both have one.

    Returns:
        what a user should know, a sentence each.

    Raises:
        CheckpointError: a setting differs that makes another model of the same tensors, and no misfit is allowed.
    """
    one, two = (_settings(source) for source in (base, expert))
    if not one or not two:
        return ()
    differing = [
        f"{key}={two[key]!r} instead of {one[key]!r}"
        for key in one
        if key in two and one[key] != two[key] and not _HARMLESS.search(_last(key))
    ]
    decisive = [text for text in differing if _DECISIVE.search(_last(text.partition("=")[0]))]
    if decisive and not allow_misfit:
        raise CheckpointError(
            f"{expert.label} is configured as another model than {base.label}, with {', '.join(decisive[:4])}: a merge "
            "of them is neither; check that it was fine-tuned from this base, or pass allow_misfit=True"
        )
    return (f"{expert.label} is configured with {', '.join(differing[:4])}",) if differing else ()


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _settings(source: Source) -> dict[str, Any]:
    """A configuration with its defaults, flat: nested names joined by dots."""
    files = source.blueprint.files
    if CONFIG not in files:
        return {}
    config = json_object(files[CONFIG], CONFIG, source.label)
    try:
        from transformers import CONFIG_MAPPING

        # What a file leaves out has the class's default; files of several versions write down different settings.
        config = CONFIG_MAPPING[config["model_type"]].from_dict(config).to_dict()
    except (ImportError, KeyError, TypeError, ValueError):
        pass  # no class of transformers: the files alone are compared
    return dict(_flat(config, ""))


def _flat(settings: Mapping[str, Any], prefix: str) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in settings.items():
        found += (
            _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
        )
    return found
