"""Makes models/base, a small GPT-2 of bytes, and an expert of each text over it, a LoRA of PEFT.

python lora_models.py
"""

from __future__ import annotations

import sys
import time

import torch
from lora_texts import LENGTH, NAMES, rows
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

BATCH = 16


def train(model: nn.Module, data: Tensor, steps: int, rate: float) -> None:
    """AdamW over rows [N, LENGTH], its rate falling to zero on a cosine."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        batch = data[torch.arange(step * BATCH, (step + 1) * BATCH) % len(data)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    print(f"{steps} steps, loss {loss:.2f}, {time.process_time():.0f} s", flush=True)


def main(steps: int) -> None:
    """Train the base on both texts, and each expert on its own."""
    torch.manual_seed(0)
    data = {name: rows(name, held_out=False) for name in NAMES}
    config = GPT2Config(
        vocab_size=256, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    base = GPT2LMHeadModel(config)
    both = torch.cat([own[: min(map(len, data.values()))] for own in data.values()])
    train(base, both[torch.randperm(len(both))], 2 * steps, 2e-3)
    base.save_pretrained("models/base")
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    for name, own in data.items():
        expert = get_peft_model(GPT2LMHeadModel.from_pretrained("models/base"), lora)
        train(expert, own, steps, 5e-3)
        expert.save_pretrained(f"models/{name}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
