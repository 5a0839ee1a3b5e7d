"""The linear layer with a preference for each row: its CPU form, what it refuses, and the GPU."""

from __future__ import annotations

import pytest
import torch

from paretofuse.kernels.reference import routed_linear_reference, routed_rows_reference
from paretofuse.kernels.routed_rows import routed_rows


def case(seed, *, batch=4, per=2, outs=6, ins=7, experts=3, dtype=torch.float32, conv1d=False, device="cpu"):
    """x, base, deltas, weights, bias; the weights laid out [O, I], or [I, O] and transposed."""
    g = torch.Generator().manual_seed(seed)
    shape = (ins, outs) if conv1d else (outs, ins)
    base, deltas = torch.randn(shape, generator=g), torch.randn(experts, *shape, generator=g)
    if conv1d:
        base, deltas = base.T, deltas.mT
    x, bias = torch.randn(batch, per, ins, generator=g), torch.randn(batch, outs, generator=g)
    weights = torch.randn(batch, experts, generator=g) / experts**0.5
    halves = (t.to(device, dtype) for t in (x, base, deltas))
    return *halves, weights.to(device), bias.to(device, dtype)


def forward_and_backward(function, inputs, seed):
    """The result, and the gradients of x, weights and bias for a random upstream gradient."""
    x, base, deltas, weights, bias = inputs
    leaves = [t.clone().requires_grad_() for t in (x, weights, bias)]
    y = function(leaves[0], base, deltas, leaves[1], leaves[2])
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y.device, x.dtype)
    y.backward(upstream)
    return y.detach(), *(leaf.grad for leaf in leaves)


@pytest.mark.parametrize("conv1d", [False, True])
def test_each_row_is_its_own_merged_layer(conv1d):
    x, base, deltas, weights, bias = case(1, conv1d=conv1d)
    found = routed_rows(x, base, deltas, weights, bias)
    for b in range(4):
        torch.testing.assert_close(
            found[b], routed_linear_reference(x[b], base, deltas, weights[b], bias[b]), rtol=1e-4, atol=1e-5
        )


def test_rows_do_not_touch_each_other():
    """A row's result is the same bits whatever the others ask for."""
    x, base, deltas, weights, bias = case(2)
    whole = routed_rows(x, base, deltas, weights, bias)
    others = weights.clone()
    others[1:] = 7.0
    assert torch.equal(routed_rows(x, base, deltas, others, bias)[0], whole[0])


@pytest.mark.parametrize("conv1d", [False, True])
def test_gradients_are_right(conv1d):
    inputs = case(3, conv1d=conv1d)
    ours = forward_and_backward(routed_rows, inputs, 4)
    exact = forward_and_backward(
        lambda *t: routed_rows_reference(*t, accumulate=torch.float64), [t.double() for t in inputs], 4
    )
    for mine, true in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=1e-5, atol=1e-5)


def test_shapes_and_one_bias_for_all():
    x, base, deltas, weights, bias = case(5, per=6)
    found = routed_rows(x.view(4, 2, 3, 7), base, deltas, weights, bias[0])
    assert found.shape == (4, 2, 3, 6)
    plain = routed_rows_reference(x, base, deltas, weights, bias[0].expand(4, -1))
    torch.testing.assert_close(found.view(4, 6, 6), plain)
    assert routed_rows(x[:, 0], base, deltas, weights).shape == (4, 6)
    assert routed_rows(x[:0], base, deltas, weights[:0]).shape == (0, 6, 6)


def test_autocast_converts_the_input():
    x, base, deltas, weights, bias = case(6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = routed_rows(x, base, deltas, weights, bias)
    assert torch.equal(found, routed_rows_reference(x.bfloat16(), base, deltas, weights, bias))


def test_compiles_whole():
    inputs = case(7)
    compiled = torch.compile(routed_rows, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), routed_rows(*inputs))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.zeros(7)}, ValueError, r"x: got shape \(7,\), expected \[B, ..., I\]"),
        ({"x": torch.zeros(5, 2, 7)}, ValueError, r"weights: got shape \(4, 3\), expected \(5, 3\)"),
        ({"weights": torch.zeros(4, 3, dtype=torch.float64)}, TypeError, "weights: got torch.float64"),
        ({"weights": torch.zeros(3, 4).T}, ValueError, "weights: got strides"),
        ({"bias": torch.zeros(3, 6)}, ValueError, r"bias: got shape \(3, 6\), expected \(4, 6\)"),
        ({"deltas": torch.zeros(3, 6, 7, requires_grad=True)}, ValueError, "deltas: got requires_grad=True"),
    ],
)
def test_bad_input_is_named(change, error, words):
    arguments = dict(zip(("x", "base", "deltas", "weights", "bias"), case(8), strict=True))
    with pytest.raises(error, match=words):
        routed_rows(**{**arguments, **change})


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # opcheck's own copies
@pytest.mark.parametrize("conv1d", [False, True])
def test_operators_are_sound(conv1d):
    x, base, deltas, weights, bias = case(9, conv1d=conv1d)
    grad = torch.randn(4, 2, 6)
    torch.library.opcheck(torch.ops.paretofuse.routed_rows_weights_grad.default, (grad, x, deltas))
    leaves = [t.requires_grad_() for t in (x, weights, bias)]
    torch.library.opcheck(
        torch.ops.paretofuse.routed_rows.default, (leaves[0], base, deltas, leaves[1], leaves[2])
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize(("batch", "per", "experts"), [(1, 1, 2), (16, 1, 8), (5, 77, 3)])
def test_on_the_gpu(dtype, conv1d, batch, per, experts):
    inputs = case(
        10,
        batch=batch,
        per=per,
        outs=320,
        ins=768,
        experts=experts,
        dtype=dtype,
        conv1d=conv1d,
        device="cuda",
    )
    ours = forward_and_backward(routed_rows, inputs, 11)
    plain = forward_and_backward(routed_rows_reference, inputs, 11)
    exact = forward_and_backward(
        lambda *t: routed_rows_reference(*t, accumulate=torch.float64), [t.double() for t in inputs], 11
    )
    for mine, theirs, true in zip(ours, plain, exact, strict=True):
        assert (mine - true).abs().max() <= 2 * (theirs - true).abs().max() + 1e-5 * true.abs().max()
