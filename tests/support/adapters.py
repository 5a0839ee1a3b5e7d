"""PEFT adapters for tests, and what PEFT itself makes of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paretofuse as pf
from tests.support.models import tiny_gpt2

peft = pytest.importorskip("peft")


def wrapped(base: nn.Module, seed: int = 1, name: str = "default", **settings: Any) -> Any:
    """A PeftModel over a copy of the base, every trainable tensor of it filled with random values."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 7, "init_lora_weights": False, **settings})
    model = peft.get_peft_model(copy.deepcopy(base), config, adapter_name=name)
    fill(model, seed)
    return model


def fill(model: nn.Module, seed: int) -> None:
    """Random factors, and random steps for all else that is trainable."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                step = 0.1 * torch.randn(p.shape)
                p.copy_(step if "lora_" in name else p + step)


def saved(base: nn.Module, path: Path, seed: int = 1, **settings: Any) -> Path:
    """A LoRA directory with random factors, as PEFT saves it."""
    wrapped(base, seed, **settings).save_pretrained(path)
    return path


def merged_by_peft(base: nn.Module, path: Path) -> dict[str, Tensor]:
    """The tensors of PeftModel.from_pretrained(base, path).merge_and_unload()."""
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), path)
    return {name: t.detach() for name, t in model.merge_and_unload().state_dict().items()}


def merged_by_us(base: Any, expert: Any, **settings: Any) -> dict[str, Tensor]:
    """The tensors of the expert's own corner of a stack."""
    return pf.stack(base, {"x": expert}, static_weight=1.0, **settings).merge_state_dict({"x": 1.0})


def check(ours: dict[str, Tensor], theirs: dict[str, Tensor], base: nn.Module) -> None:
    """Equal within rounding, and not the base (an adapter that does nothing proves nothing)."""
    before = base.state_dict()
    assert any(
        before[name].shape != t.shape or not torch.equal(before[name], t) for name, t in theirs.items()
    )
    for name, tensor in theirs.items():
        if name in ours:  # the other names of a tied tensor
            torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    assert set(ours) <= set(theirs)


def llama(tied: bool = False) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=30, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def roberta(labels: int = 2) -> nn.Module:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=30, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=20, num_labels=labels,
    )  # fmt: skip
    return RobertaForSequenceClassification(config).eval()


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=30, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    return MixtralForCausalLM(config).eval()


class Stacked(nn.Module):
    """Square weights of a stack, stored [X, I, O]."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.experts = nn.Module()
        self.experts.first = nn.Parameter(torch.randn(3, 6, 6))
        self.experts.second = nn.Parameter(torch.randn(3, 6, 6))
        self.experts.is_transposed = is_transposed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.experts.first.sum(0) @ self.experts.second.sum(0)


def stacked(is_transposed: bool) -> nn.Module:
    torch.manual_seed(0)
    return Stacked(is_transposed)


def attention() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 8)).eval()


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(3, 5, 3), nn.Conv2d(3, 5, (3, 2)), nn.Conv3d(3, 5, 2), nn.Conv2d(4, 4, 1), nn.Embedding(7, 7)
    )  # fmt: skip


def squares() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    return nn.Sequential(Conv1D(6, 6), nn.Linear(6, 6))


C_ATTN = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
Q = {"target_modules": ["q_proj"]}
FIRST_AND_SECOND = {"target_modules": [], "target_parameters": ["experts.second", "experts.first"]}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "Conv1D": (tiny_gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "rslora": (tiny_gpt2, {**C_ATTN, "use_rslora": True}),
    "patterns": (
        tiny_gpt2,
        {
            "target_modules": ["c_fc", "c_attn"],
            "rank_pattern": {"c_fc": 2},
            "alpha_pattern": {"h.0.mlp.c_fc": 3},
        },
    ),
    "position embedding": (tiny_gpt2, {"target_modules": ["c_attn", "wpe"]}),
    "modules_to_save": (tiny_gpt2, {**C_ATTN, "modules_to_save": ["ln_f"]}),
    "bias all": (tiny_gpt2, {**C_ATTN, "bias": "all"}),
    "embedding, saved with its weight": (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "head, saved with its weight": (llama, {"target_modules": ["lm_head", "embed_tokens"]}),
    "trained tokens": (llama, {**Q, "trainable_token_indices": [29, 1]}),
    "trained tokens by module": (llama, {**Q, "trainable_token_indices": {"embed_tokens": [0, 3], "lm_head": [2]}}),
    "trained tokens, tied": (lambda: llama(tied=True), {**Q, "trainable_token_indices": [1, 29]}),
    "excluded": (llama, {"target_modules": "all-linear", "exclude_modules": ["q_proj"]}),
    "regular expression": (
        llama,
        {
            "target_modules": r".*\.1\..*(q|v)_proj",
            "rank_pattern": {"v_proj": 2},
            "alpha_pattern": {"1.self_attn.q_proj": 3},
            "use_rslora": True,
        },
    ),
    "layers": (llama, {**Q, "layers_to_transform": [1]}),
    "mica": (llama, {**Q, "init_lora_weights": "mica"}),
    "orthogonal": (llama, {**Q, "init_lora_weights": "orthogonal"}),
    "targeted weights": (llama, {"target_modules": [], "target_parameters": ["q_proj.weight", "lm_head.weight"]}),
    "classifier and all biases": (
        roberta,
        {"target_modules": ["query", "dense"], "modules_to_save": ["classifier"], "bias": "all"},
    ),
    "biases of adapted layers": (roberta, {"target_modules": ["query", "dense"], "bias": "lora_only"}),
    "bias of B": (roberta, {"target_modules": ["query", "dense"], "lora_bias": True}),
    "attention": (attention, {"target_modules": ["self_attn", "1"]}),
    "attention, all biases": (attention, {"target_modules": ["self_attn"], "bias": "all"}),
    "convolutions": (convolutions, {"target_modules": ["0", "1", "2", "3", "4"]}),
    "square Conv1D beside Linear": (squares, {"target_modules": ["0", "1"]}),
    "square Conv1D beside Linear, flag": (squares, {"target_modules": ["0", "1"], "fan_in_fan_out": True}),
    "experts": (
        mixtral,
        {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
    "one of the experts' parameters": (
        mixtral,
        {**Q, "target_parameters": ["experts.down_proj"], "rank_pattern": {"experts.down_proj": 2}},
    ),
    "square stack": (lambda: stacked(False), FIRST_AND_SECOND),
    "square stack, transposed": (lambda: stacked(True), FIRST_AND_SECOND),
}  # fmt: skip
