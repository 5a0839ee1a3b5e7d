"""Deltas in one byte stay within the error that their docstring promises."""

from __future__ import annotations

import pytest
import torch

from paretofuse.kernels.quantize import quantize_tiles


def rebuilt(quantized, scales, tile):
    return (quantized.double().unflatten(1, (-1, tile)) * scales.double()[:, :, None]).flatten(1)


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e30])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_error_is_bounded(dtype, size):
    deltas = size * torch.randn(3, 256, generator=torch.Generator().manual_seed(1))
    deltas[0, :64] = 0
    deltas[1, 70] *= 1000
    quantized, scales = quantize_tiles(deltas, dtype, tile=64)
    assert quantized.dtype == dtype
    assert scales.shape == (3, 4)
    assert scales[0, 0] == 0
    error = (rebuilt(quantized, scales, 64) - deltas).abs()
    scale = scales.double().repeat_interleave(64, 1)
    bound = 0.5 * scale if dtype == torch.int8 else torch.maximum(deltas.double().abs() / 16, scale / 1024)
    assert (error <= bound * (1 + 1e-5)).all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_extremes_are_exact_and_never_nan(dtype):
    deltas = torch.tensor([[3.0, -3.0] * 8])
    quantized, scales = quantize_tiles(deltas, dtype, tile=16)
    torch.testing.assert_close(rebuilt(quantized, scales, 16), deltas.double(), rtol=1e-6, atol=0)


def test_bad_input_is_named():
    with pytest.raises(TypeError, match=r"dtype: got torch.uint8, expected torch.int8"):
        quantize_tiles(torch.zeros(1, 16), torch.uint8, tile=16)
    with pytest.raises(ValueError, match=r"got shape \(1, 17\)"):
        quantize_tiles(torch.zeros(1, 17), torch.int8, tile=16)
    with pytest.raises(TypeError, match=r"deltas: got torch.float64"):
        quantize_tiles(torch.zeros(1, 16, dtype=torch.float64), torch.int8, tile=16)
