"""The routed linear layer: its CPU form, what it refuses, and the GPU; the interpreter's checks stand beside."""

from __future__ import annotations

import pytest
import torch

from paretofuse.kernels.reference import routed_linear_reference
from paretofuse.kernels.routed_linear import routed_linear


def case(seed, *, rows=5, outs=6, ins=7, experts=3, dtype=torch.float32, conv1d=False, device="cpu"):
    """x, base, deltas, weights, bias; the weights laid out [O, I], or [I, O] and transposed."""
    g = torch.Generator().manual_seed(seed)
    shape = (ins, outs) if conv1d else (outs, ins)
    base, deltas = torch.randn(shape, generator=g), torch.randn(experts, *shape, generator=g)
    if conv1d:
        base, deltas = base.T, deltas.mT
    rest = (torch.randn(experts, generator=g) / experts**0.5, torch.randn(outs, generator=g).to(dtype))
    x = torch.randn(rows, ins, generator=g).to(dtype)
    return tuple(t.to(device) for t in (x, base.to(dtype), deltas.to(dtype), *rest))


def forward_and_backward(function, inputs, seed):
    """The result, and the gradients of x, weights and bias for a random upstream gradient."""
    x, base, deltas, weights, bias = inputs
    leaves = [t.clone().requires_grad_() for t in (x, weights, bias)]
    y = function(leaves[0], base, deltas, leaves[1], leaves[2])
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y.device, x.dtype)
    y.backward(upstream)
    return y.detach(), *(leaf.grad for leaf in leaves)


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_form_is_a_merged_layer(dtype, conv1d):
    """Forward and backward agree with a dense layer of the mixed weight; the weights' gradient does to rounding."""
    inputs = case(1, dtype=dtype, conv1d=conv1d)
    ours = forward_and_backward(routed_linear, inputs, 2)
    dense = forward_and_backward(routed_linear_reference, inputs, 2)
    for mine, plain in zip(ours, dense, strict=True):
        assert mine.dtype == plain.dtype
        torch.testing.assert_close(mine, plain, rtol=1e-4 if dtype == torch.float32 else 0.1, atol=1e-4)


def test_gradients_are_right():
    """Against float64 autograd through the formula."""
    inputs = case(3)
    ours = forward_and_backward(routed_linear, inputs, 4)
    exact = forward_and_backward(
        lambda *t: routed_linear_reference(*t, accumulate=torch.float64), [t.double() for t in inputs], 4
    )
    for mine, true in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=1e-5, atol=1e-5)


def test_any_leading_dimensions_and_no_bias():
    x, base, deltas, weights, _ = case(5, rows=12)
    found = routed_linear(x.view(2, 3, 2, 7), base, deltas, weights)
    assert found.shape == (2, 3, 2, 6)
    torch.testing.assert_close(found.view(12, 6), routed_linear_reference(x, base, deltas, weights))
    assert routed_linear(x[:0], base, deltas, weights).shape == (0, 6)


def test_autocast_converts_the_input():
    x, base, deltas, weights, bias = case(6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = routed_linear(x, base, deltas, weights, bias)
    torch.testing.assert_close(found, routed_linear_reference(x.bfloat16(), base, deltas, weights, bias))


def test_compiles_whole():
    x, base, deltas, weights, bias = case(7)
    compiled = torch.compile(routed_linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(x, base, deltas, weights, bias), routed_linear(x, base, deltas, weights, bias)
    )


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.zeros(5, 8)}, ValueError, r"x: got shape \(5, 8\), expected \(5, 7\)"),
        ({"x": torch.zeros(5, 7, dtype=torch.float64)}, TypeError, "x: got torch.float64"),
        ({"base": torch.zeros(6)}, ValueError, r"expected \[O, I\] and \[E, O, I\]"),
        ({"deltas": torch.zeros(3, 6, 8)}, ValueError, r"deltas: got shape \(3, 6, 8\)"),
        ({"deltas": torch.zeros(3, 7, 6).mT}, ValueError, "got strides"),
        ({"weights": torch.zeros(2)}, ValueError, r"weights: got shape \(2,\), expected \(3,\)"),
        ({"weights": torch.zeros(3, dtype=torch.bfloat16)}, TypeError, "weights: got torch.bfloat16"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias: got shape \(5,\)"),
        (
            {"base": torch.zeros(6, 7, requires_grad=True)},
            ValueError,
            r"base: got requires_grad=True.*detach",
        ),
    ],
)
def test_bad_input_is_named(change, error, words):
    arguments = dict(zip(("x", "base", "deltas", "weights", "bias"), case(8), strict=True))
    with pytest.raises(error, match=words):
        routed_linear(**{**arguments, **change})


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # opcheck's own copies
@pytest.mark.parametrize("conv1d", [False, True])
def test_operators_are_sound(conv1d):
    x, base, deltas, weights, bias = case(9, conv1d=conv1d)
    leaves = [t.requires_grad_() for t in (x, weights, bias)]
    torch.library.opcheck(
        torch.ops.paretofuse.routed_linear.default, (leaves[0], base, deltas, leaves[1], leaves[2])
    )
    grad = torch.randn(5, 6)
    torch.library.opcheck(torch.ops.paretofuse.routed_linear_weights_grad.default, (grad, x.detach(), deltas))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize(("rows", "experts"), [(1, 2), (16, 8), (200, 2), (513, 8), (100, 20)])
def test_on_the_gpu(dtype, conv1d, rows, experts):
    inputs = case(
        10, rows=rows, outs=320, ins=768, experts=experts, dtype=dtype, conv1d=conv1d, device="cuda"
    )
    ours = forward_and_backward(routed_linear, inputs, 11)
    plain = forward_and_backward(routed_linear_reference, inputs, 11)
    exact = forward_and_backward(
        lambda *t: routed_linear_reference(*t, accumulate=torch.float64), [t.double() for t in inputs], 11
    )
    for mine, theirs, true in zip(ours, plain, exact, strict=True):
        assert (mine - true).abs().max() <= 2 * (theirs - true).abs().max() + 1e-5 * true.abs().max()
