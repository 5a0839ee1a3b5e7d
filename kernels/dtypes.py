"""The dtypes that can be merged, by every usual name: one reading for Python, the command line and the kernels'."""

from __future__ import annotations

import torch

_WORDS = {
    "float32": torch.float32, "fp32": torch.float32, "f32": torch.float32, "float": torch.float32,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float16": torch.float16, "fp16": torch.float16, "f16": torch.float16, "half": torch.float16,
}  # fmt: skip


def float_dtype(dtype: object) -> torch.dtype | None:
    """The dtype that is meant by torch.bfloat16, "bfloat16", "bf16", "torch.bfloat16" or "BF16"; None for no such."""
    if not isinstance(dtype, (torch.dtype, str)):
        return None
    return _WORDS.get(str(dtype).lower().removeprefix("torch."))
