"""The merge kernel: its references, what it refuses, and the GPU. `test_in_interpreter.py` does the rest."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from paretofuse.kernels import reference
from paretofuse.kernels.routed_merge import routed_merge


def case(seed: int, n_tiles: int = 3, tile: int = 32, experts: int = 3, k: int = 2, device: str = "cpu"):
    g = torch.Generator().manual_seed(seed)
    n = n_tiles * tile
    base = torch.randn(n, generator=g)
    deltas = torch.randn(experts, n, generator=g)
    tile_group = torch.randint(2, (n_tiles,), generator=g, dtype=torch.int32)
    weights = torch.randn(k, 2, experts, generator=g)
    return tuple(t.to(device) for t in (base, deltas, tile_group, weights))


def test_reference_is_the_formula():
    base, deltas, tile_group, weights = (t.double() for t in case(0))
    merged = reference.routed_merge_reference(
        base, deltas, tile_group.int(), weights, tile=32, accumulate=torch.float64
    )
    for k in range(2):
        for t in range(0, 96, 7):
            w = weights[k, int(tile_group[t // 32])]
            assert merged[k, t].item() == pytest.approx((base[t] + w @ deltas[:, t]).item(), abs=1e-12)


def test_one_tensor_reference():
    base = torch.randn(5, 3, dtype=torch.bfloat16)
    deltas = [torch.randn(5, 3, dtype=torch.float16), None, torch.randn(5, 3)]
    row = torch.tensor([0.5, float("nan"), -2.0])
    before = base.clone()
    merged = reference.merge_tensor_reference(base, deltas, row, torch.float32)
    torch.testing.assert_close(merged, base.float() + 0.5 * deltas[0].float() - 2 * deltas[2])
    assert torch.equal(base, before)


def test_gradient_references_agree_with_autograd():
    base, deltas, tile_group, weights = (t.double() for t in case(1, k=1))
    weights.requires_grad_()
    grad = torch.randn(96, dtype=torch.float64)
    merged = reference.routed_merge_reference(
        base, deltas, tile_group.int(), weights, tile=32, accumulate=torch.float64
    )
    merged.backward(grad[None])
    found = reference.routed_grad_reference(grad, deltas, tile_group.int(), 2, tile=32)
    torch.testing.assert_close(found, weights.grad[0])
    parts = sum(
        reference.inner_reference(grad[32 * i : 32 * i + 32], [*deltas[:, 32 * i : 32 * i + 32], None])
        for i in range(3)
    )
    torch.testing.assert_close(parts, torch.cat([found.sum(0), torch.zeros(1, dtype=torch.float64)]))


def test_never_falls_back_on_the_cpu():
    base, deltas, tile_group, weights = case(2)
    with pytest.raises(ValueError, match=r"got tensors on 'cpu'.*TRITON_INTERPRET"):
        routed_merge(base, deltas, tile_group, weights, tile=32)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(tile=24), ValueError, "power of two"),
        (dict(tile=64), ValueError, "multiple of tile"),
        (dict(base=torch.zeros(96, dtype=torch.int32)), TypeError, "base: got torch.int32"),
        (dict(base=torch.zeros(96, 1)), ValueError, r"base: got shape \(96, 1\)"),
        (dict(deltas=torch.zeros(2, 96)), ValueError, r"deltas: got shape \(2, 96\), expected \(3, 96\)"),
        (dict(deltas=torch.zeros(96, 3).T), ValueError, "deltas: got strides"),
        (dict(tile_group=torch.zeros(3, dtype=torch.int64)), TypeError, "tile_group: got torch.int64"),
        (dict(tile_group=torch.zeros(4, dtype=torch.int32)), ValueError, "tile_group: got shape"),
        (dict(weights=torch.zeros(2, 2, 3, dtype=torch.float64)), TypeError, "weights: got torch.float64"),
        (dict(weights=torch.zeros(3)), ValueError, r"weights: got shape \(3,\)"),
        (dict(weights=torch.zeros(1, 2, 0)), ValueError, "got no experts"),
        (dict(weights=torch.zeros(2, 3, 2).mT), ValueError, "weights: got strides"),
        (dict(deltas=torch.zeros(3, 96, dtype=torch.int8)), ValueError, "scales: got None with deltas of torch.int8"),
        (dict(scales=torch.ones(3, 3)), TypeError, "deltas: got torch.float32, expected torch.int8 or"),
        (
            dict(deltas=torch.zeros(3, 96, dtype=torch.int8), scales=torch.ones(3, 2)),
            ValueError, "scales: got 2 for 96 elements, expected one for each group",
        ),
        (dict(weights=torch.zeros(2, 2, 3, device="meta")), ValueError, "weights: got device meta"),
    ],
)  # fmt: skip
def test_bad_input_is_named(change, error, words):
    arguments = dict(zip(("base", "deltas", "tile_group", "weights"), case(3), strict=True), tile=32)
    with pytest.raises(error, match=words):
        routed_merge(**{**arguments, **change})


def test_imports_without_triton():
    """The module imports where Triton is missing, and a call says what to do."""
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from paretofuse.kernels.routed_merge import routed_merge\n"
        "try:\n"
        "    routed_merge(torch.zeros(16), torch.zeros(1, 16), torch.zeros(1, dtype=torch.int32),\n"
        "                 torch.zeros(1, 1), tile=16)\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "pip install triton" in done.stdout, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device here")
@pytest.mark.parametrize("k", [1, 3, 11])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_the_gpu(k, dtype):
    base, deltas, tile_group, weights = case(4, n_tiles=2048, tile=1024, experts=7, k=k, device="cuda")
    base, deltas = base.to(dtype), deltas.to(dtype)
    truth = reference.routed_merge_reference(
        base, deltas, tile_group, weights, tile=1024, dtype=torch.float64, accumulate=torch.float64
    )
    plain = reference.routed_merge_reference(base, deltas, tile_group, weights, tile=1024)
    out = torch.full_like(plain, float("nan"))
    routed_merge(base, deltas, tile_group, weights, out=out)
    assert (out - truth).abs().max() <= 2 * (plain - truth).abs().max()
