"""Numbers as files hold them: every rounding is torch's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from paretofuse.engine.methods.numbers import Numbers, promoted

TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def awkward() -> np.ndarray:
    values = np.random.default_rng(0).standard_normal(4096).astype(np.float32)
    bits = np.random.default_rng(1).integers(0, 1 << 32, 60000, np.uint64).astype(np.uint32).view(np.float32)
    return np.concatenate(
        [values, bits, np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 65504.0, 65520.0], np.float32)]
    )


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # signalling NaNs among the random bits
def test_rounding_and_back_are_torchs(dtype: str) -> None:
    values = awkward()
    numbers = Numbers.of(values, dtype)
    truth = torch.from_numpy(values).to(TORCH[dtype])
    stored = torch.frombuffer(bytearray(numbers.data.tobytes()), dtype=TORCH[dtype])
    assert torch.equal(stored.nan_to_num(7.0), truth.nan_to_num(7.0))
    assert torch.equal(stored.isnan(), truth.isnan())
    wide = torch.float64 if dtype == "F64" else torch.float32
    assert torch.equal(torch.from_numpy(numbers.floats()).nan_to_num(7.0), truth.to(wide).nan_to_num(7.0))


@pytest.mark.parametrize("first", TORCH)
@pytest.mark.parametrize("second", TORCH)
def test_promotion_is_torchs(first: str, second: str) -> None:
    assert TORCH[promoted([first, second])] == torch.promote_types(TORCH[first], TORCH[second])
