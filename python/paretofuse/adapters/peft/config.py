"""What an adapter's configuration says: whether it is a plain sum, its scales, and which modules it saves whole.

Source: Hu et al., LoRA, arXiv 2106.09685; rank-stabilized scale: Kalajdzievski, arXiv 2312.03732. The names are those
of PEFT's adapter_config.json.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from paretofuse.engine.errors import CheckpointError

_NO_WEIGHTS = {
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "ADAPTION_PROMPT", "CARTRIDGE",
}  # fmt: skip
"""Kinds that add inputs or attention states and leave every weight as it is."""

_VARIANTS = {
    "use_dora": "DoRA",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "arrow_config": "Arrow routing",
    "layer_replication": "LoRA with layer_replication",
    "megatron_config": "LoRA on Megatron's parallel layers",
}
"""Settings under which base + scale * B A is not all that PEFT computes."""

_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to start a LoRA that change the weights that it is added to."""

OUT_PROJ_ADDED = 2
"""How often PEFT adds the update of out_proj to an adapted nn.MultiheadAttention, in its forward pass and its merge."""


def check_plain_sum(config: Mapping[str, Any], label: str) -> None:
    """Refuse by its name whatever is not base + scale * B A.

    Raises:
        CheckpointError: another kind of adapter, or a variant of LoRA.
    """
    kind = str(config.get("peft_type")).removeprefix("PeftType.")
    if kind in _NO_WEIGHTS:
        raise CheckpointError(
            f"{label}: {kind} changes no weight of the model, so no merge can hold it; train a LoRA instead"
        )
    found = None if kind == "LORA" else kind
    if found is None:
        found = next((name for key, name in _VARIANTS.items() if config.get(key)), None)
    if found is not None:
        raise CheckpointError(
            f"{label}: {found} is not of the form scale * B A; call merge_and_unload() and stack the merged model"
        )


def check_start(config: Mapping[str, Any], label: str) -> None:
    """Refuse a saved LoRA whose start was taken out of the base's weights, which the file does not hold.

    Saved with path_initial_model_for_weight_conversion, PEFT says True here, and the sum is right again.

    Raises:
        CheckpointError: PiSSA, OLoRA, CorDA, LoftQ or LoRA-GA.
    """
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_CHANGE_THE_BASE):
        raise CheckpointError(
            f"{label}: LoRA started by init_lora_weights={start!r}, which takes its start away from the base's "
            "weights, is not of the form base + scale * B A; call merge_and_unload() and stack the merged model, or "
            "save the adapter with path_initial_model_for_weight_conversion"
        )


def rank_and_scale(config: Mapping[str, Any], name: str, label: str) -> tuple[int, float]:
    """The rank that a module (or a targeted parameter) should have, and alpha / rank or alpha / sqrt(rank).

    Raises:
        CheckpointError: no positive rank, or no alpha.
    """
    rank = _by_pattern(config.get("rank_pattern"), name, config.get("r"))
    alpha = _by_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha"))
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
        raise CheckpointError(
            f"{label}: the configuration gives {name!r} rank {rank!r} and alpha {alpha!r}, expected numbers"
        )
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that is the module's name or matches it from a dot on."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def is_saved_whole(config: Mapping[str, Any], name: str) -> bool:
    """Whether a tensor belongs to one of modules_to_save: a copy that the adapter trained for itself."""
    modules = name.split(".")[:-1]
    prefixes = [".".join(modules[: i + 1]) for i in range(len(modules))]
    return any(p.endswith(target) for target in config.get("modules_to_save") or () for p in prefixes)


def is_targeted(config: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT would give a module factors; it ignores those of any other."""
    targets = config.get("target_modules")
    if targets is None or str(targets).lower() == "all-linear":
        targets = ".*"
    if not _matches(targets, module):
        return False
    if _matches(config.get("exclude_modules") or [], module):
        return False
    if any(re.match(rf"(^|.*\.){saved}($|\..*)", module) for saved in config.get("modules_to_save") or ()):
        return False
    layers = config.get("layers_to_transform")
    if layers is None or layers == [] or isinstance(targets, str):
        return True
    patterns = config.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    rules = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(\d+)\."]
    found = next((match for rule in rules if (match := re.match(rule, module))), None)
    return found is not None and int(found[1]) in (layers if isinstance(layers, list) else [layers])


def _matches(targets: str | Sequence[str], module: str) -> bool:
    """A regular expression for the whole name, or the last parts of names."""
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets)
