"""A LoRA expert of one text, by PEFT: minutes on two cores.

python -m examples.serve_llm.experts BASE news OUT
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.serve_llm.texts import rows

STEPS, BATCH, RATE, RANK = 24, 2, 2e-3, 8


def main(base: Path, name: str, out: Path) -> None:
    """Fine-tune rank-8 adapters of all linear modules in the blocks and write them as PEFT does."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    batches = rows(name, tokenizer, STEPS * BATCH, held_out=False).split(BATCH)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    start = time.perf_counter()
    for step, batch in enumerate(batches, start=1):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 4 == 0:
            print(
                f"{name}: step {step} of {STEPS}, loss {loss:.2f}, {time.perf_counter() - start:.0f} s",
                flush=True,
            )
    model.save_pretrained(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
