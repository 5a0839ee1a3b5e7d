"""The safetensors names of torch dtypes."""

from __future__ import annotations

import torch

from paretofuse.kernels.dtypes import float_dtype

TO_TORCH: dict[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16, "BF16": torch.bfloat16,
    "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32,
    "I64": torch.int64, "U64": torch.uint64, "F64": torch.float64, "C64": torch.complex64,
}  # fmt: skip

TO_NAME: dict[torch.dtype, str] = {dtype: name for name, dtype in TO_TORCH.items()}


def merged_dtype_name(dtype: torch.dtype | str | None, argument: str) -> str | None:
    """The safetensors name of a dtype that can be merged; None stays None.

    Args:
        dtype: torch.bfloat16, or any usual name of it: "bfloat16", "bf16", "torch.bfloat16", "BF16".
        argument: what the caller calls it, for messages.

    Raises:
        ValueError: the dtype is not float32, bfloat16 or float16.
    """
    if dtype is None:
        return None
    found = float_dtype(dtype)
    if found is None:
        raise ValueError(f"got {argument}={dtype}, expected torch.float32, torch.bfloat16 or torch.float16")
    return TO_NAME[found]
