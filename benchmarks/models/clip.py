"""A vision tower of CLIP ViT-B/32's size with eight experts, and PWEMoE's own module around the same weights.

The weights are drawn at random from a seed: nothing here depends on their values. PWEMoE's code is fusion-bench's
(Tang et al., arXiv 2406.09770), fetched from PyPI; only its one file of modules is loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

from benchmarks.harness.record import fetched, load_file_as_module

FUSION_BENCH = "0.2.33"
EXPERTS = 8
SIZE = 0.002
"""Standard deviation of the deltas; that of the base's weights is about 0.02."""


def vision_tower(quick: bool = False, seed: int = 0) -> CLIPVisionModel:
    """The model in float32: 87.5 million parameters, or 60 thousand when quick."""
    torch.manual_seed(seed)
    if quick:
        config = CLIPVisionConfig(
            hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, image_size=64
        )
    else:
        config = CLIPVisionConfig()
    return CLIPVisionModel(config).eval()


def write_experts(base: nn.Module, folder: Path, count: int = EXPERTS) -> dict[str, Path]:
    """Write experts (the base plus noise) as one safetensors file each; files keep memory free for contenders."""
    paths = {}
    for index in range(count):
        generator = torch.Generator().manual_seed(1000 + index)
        expert = {
            name: tensor + SIZE * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
            for name, tensor in base.state_dict().items()
        }
        paths[f"task{index}"] = folder / f"task{index}.safetensors"
        save_file(expert, paths[f"task{index}"])
    return paths


def write_adapters(base: nn.Module, folder: Path, rank: int, count: int = EXPERTS) -> dict[str, Path]:
    """Write LoRA experts of every linear layer, as PEFT writes them."""
    from peft import LoraConfig, get_peft_model  # here, so that processes which measure memory do not hold it

    paths = {}
    for index in range(count):
        torch.manual_seed(2000 + index)
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", init_lora_weights=False)
        adapted = get_peft_model(copy.deepcopy(base), config)
        with torch.no_grad():
            for name, factor in adapted.named_parameters():
                if "lora_B" in name:
                    factor.mul_(SIZE)
        paths[f"task{index}"] = folder / f"lora{index}"
        adapted.save_pretrained(str(paths[f"task{index}"]))
    return paths


def parts(model: nn.Module) -> dict[str, nn.Module]:
    """The towers' parts by their dotted names: embeddings, norms and each encoder layer; together they hold it all."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if any(name == done or name.startswith(f"{done}.") for done in found) or not list(
            module.parameters()
        ):
            continue
        if name.endswith("embeddings") or name.rpartition(".")[2].isdigit() or not list(module.children()):
            found[name] = module
    return found


@cache
def pwemoe_class() -> Any:
    """fusion-bench's ParetoWeightEnsemblingModule.

    Raises:
        MissingContender: fusion-bench cannot be had.
    """
    folder = fetched(f"fusion-bench-{FUSION_BENCH}", f"fusion-bench=={FUSION_BENCH}")
    path = folder / "fusion_bench" / "method" / "pwe_moe" / "module.py"
    return load_file_as_module(path, "fusion_bench_pwe_moe").ParetoWeightEnsemblingModule


def pwemoe_module(block: nn.Module, name: str, experts: Sequence[Path], start: float) -> Any:
    """PWEMoE's module around one block of the model, its routers E -> 2E -> E as published.

    Args:
        block: of the base.
        name: its dotted name in the model.
        experts: the files.
        start: where every routing weight starts (their init_lambda).
    """
    blocks = [copy.deepcopy(block) for _ in experts]
    for path, expert in zip(experts, blocks, strict=True):
        with safe_open(path, "pt") as file:
            expert.load_state_dict({key: file.get_tensor(f"{name}.{key}") for key in block.state_dict()})
    return pwemoe_class()(block, blocks, init_lambda=start, router_hidden_layers=2)


def upscale(model: nn.Module, experts: Mapping[str, Path], start: float = 0.3) -> None:
    """Turn a base into PWEMoE's model in place, as its code does for CLIP with MLP and attention upscaled.

    The rest becomes the base plus `start` times every delta.
    """
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    blocks = [name for name, _ in model.named_modules() if name.endswith((".mlp", ".self_attn"))]
    with torch.no_grad():
        for path in experts.values():
            with safe_open(path, "pt") as file:
                for name, tensor in model.state_dict().items():
                    if not name.startswith(tuple(f"{block}." for block in blocks)):
                        tensor.add_(file.get_tensor(name) - base[name], alpha=start)
    model.requires_grad_(False)
    for name in blocks:
        parent, _, child = name.rpartition(".")
        wrapped = pwemoe_module(model.get_submodule(name), name, list(experts.values()), start)
        setattr(model.get_submodule(parent), child, wrapped)


def batches(model: nn.Module, size: int, count: int = 2) -> list[tuple[Tensor, Tensor]]:
    """A batch of random images and labels (of 10) for each task, the model's image size."""
    config: Any = model.config
    generator = torch.Generator().manual_seed(7)
    shape = (size, 3, config.image_size, config.image_size)
    return [
        (torch.randn(shape, generator=generator), torch.randint(10, (size,), generator=generator))
        for _ in range(count)
    ]


def classify(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy under a fixed random head with ten classes, as CLIP's text embeddings are fixed."""
    images, labels = batch
    features = model(pixel_values=images).pooler_output
    head = torch.randn(features.shape[1], 10, generator=torch.Generator().manual_seed(9))
    return F.cross_entropy(features @ head / features.shape[1] ** 0.5, labels)
