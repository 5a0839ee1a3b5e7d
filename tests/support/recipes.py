"""Small models for recipes, and mergekit's own run of one: the truth that ours is compared with."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.support.models import perturbed

Tensors = dict[str, Tensor]


def tiny_llama(seed: int = 0, layers: int = 3, **settings: Any) -> nn.Module:
    """A Llama of a few thousand parameters with odd sizes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 12, "intermediate_size": 21, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(
        num_hidden_layers=layers, vocab_size=37, max_position_embeddings=16, **{**sizes, **settings}
    )
    model: nn.Module = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():  # norms are born as ones, which would hide what happens to them
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


def save_family(
    folder: Path, base: nn.Module, count: int = 3, dtype: torch.dtype = torch.float32
) -> dict[str, Path]:
    """A base and its experts a, b, c, ... as directories."""
    models = {"base": base, **{"abcdef"[i]: perturbed(base, i + 1, 0.05) for i in range(count)}}
    for name, model in models.items():
        model.to(dtype).save_pretrained(folder / name)
    return {name: folder / name for name in models}


def written(folder: Path, text: str, models: Mapping[str, Path]) -> Path:
    """A recipe's file, with every <name> in the text replaced by that model's directory."""
    for name, path in models.items():
        text = text.replace(f"<{name}>", str(path))
    config = folder / "recipe.yml"
    config.write_text(text)
    return config


def by_mergekit(config: Path, out: Path, **options: Any) -> Tensors:
    """The tensors that mergekit makes of a recipe on the CPU."""
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its libraries
        parsed = MergeConfiguration.model_validate(yaml.safe_load(config.read_text()))
        run_merge(parsed, str(out), MergeOptions(quiet=True, device="cpu", copy_tokenizer=False, **options))
    return tensors_of(out)


def tensors_of(folder: Path) -> Tensors:
    """A directory's tensors, whatever files they are in."""
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}
