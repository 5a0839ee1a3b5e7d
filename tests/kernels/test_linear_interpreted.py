"""The routed linear layer in Triton's interpreter, against float64; `test_in_interpreter.py` runs it."""

from __future__ import annotations

import os
import random

import pytest
import torch

from paretofuse.kernels.launch import (
    FUSED_ROWS,
    LINEAR_CONFIGS,
    MERGE_CONFIGS,
    WEIGHTS_GRAD_CONFIGS,
    Launch,
)
from paretofuse.kernels.layer_merge import layer_merge_launch
from paretofuse.kernels.reference import inner_reference, merge_tensor_reference, routed_linear_reference
from paretofuse.kernels.routed_linear import fused_linear, routed_linear, run_weights_grad

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in a child process of test_in_interpreter.py", allow_module_level=True)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def make(
    seed,
    *,
    rows,
    outs,
    ins,
    experts,
    x=torch.float32,
    weight=torch.float32,
    delta=torch.float32,
    conv1d=False,
):
    """x, base, deltas, weights, bias, all from one seed; deltas are planes of a wider buffer, as in a flat model."""
    g = torch.Generator().manual_seed(seed)
    shape = (ins, outs) if conv1d else (outs, ins)
    base = torch.randn(shape, generator=g).to(weight)
    planes = torch.full((experts, ins * outs + 13), float("nan"), dtype=delta)
    deltas = planes[:, : ins * outs].unflatten(1, shape)
    deltas.copy_(torch.randn(experts, *shape, generator=g))
    if conv1d:
        base, deltas = base.T, deltas.mT
    weights = torch.randn(experts, generator=g) / experts**0.5
    return (
        torch.randn(rows, ins, generator=g).to(x),
        base,
        deltas,
        weights,
        torch.randn(outs, generator=g).to(weight),
    )


def truth_and_plain(x, base, deltas, weights, bias):
    exact = routed_linear_reference(
        *(t.double() for t in (x, base, deltas, weights, bias)), accumulate=torch.float64
    )
    return exact, routed_linear_reference(x, base, deltas, weights, bias)


def close(found, exact, plain):
    """At most twice the error of PyTorch's own result in the same dtype, and of float32 sums."""
    assert not found.isnan().any()
    assert (found - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-5 * exact.abs().max()


@pytest.mark.parametrize("use", LINEAR_CONFIGS)
@pytest.mark.parametrize(("conv1d", "steps"), [(False, 4), (True, 4), (True, 1)])
@pytest.mark.parametrize("experts", [1, 9])
def test_every_configuration(use, conv1d, steps, experts):
    """Each does any shape and dtype, also those that the size rule would give to another; over four steps are cut."""
    dtype = torch.float32 if use == "float32" else torch.bfloat16
    plane = torch.float32 if "wide planes" in use else dtype
    config = LINEAR_CONFIGS[use]
    inputs = make(
        1, rows=config.rows + 1, outs=config.outs + 6, ins=steps * config.ins + 5, experts=experts, x=dtype,
        weight=plane, delta=plane, conv1d=conv1d,
    )  # fmt: skip
    close(fused_linear(*inputs, config), *truth_and_plain(*inputs))


@pytest.mark.parametrize("use", WEIGHTS_GRAD_CONFIGS)
@pytest.mark.parametrize("conv1d", [False, True])
def test_every_configuration_of_the_gradient(use, conv1d):
    config = WEIGHTS_GRAD_CONFIGS[use]
    rows, outs, ins = config.rows + 6, config.outs + 2, config.ins + 3
    x, _, deltas, _, _ = make(2, rows=rows, outs=outs, ins=ins, experts=3, conv1d=conv1d)
    grad = torch.randn(rows, outs, generator=torch.Generator().manual_seed(3))
    found = run_weights_grad(grad, x, deltas, config)
    torch.testing.assert_close(
        found.double(), inner_reference(grad.T @ x, list(deltas)), rtol=1e-4, atol=1e-2
    )


@pytest.mark.parametrize("seed", range(12))
def test_random_shapes_forward_and_backward(seed):
    pick = random.Random(seed)
    dtype = pick.choice(FLOATS)
    inputs = make(
        seed, rows=pick.randint(1, 150), outs=pick.randint(1, 100), ins=pick.randint(1, 100),
        experts=pick.choice((1, 2, 3, 7, 12, 64)), x=dtype, weight=pick.choice(FLOATS), delta=pick.choice(FLOATS),
        conv1d=pick.random() < 0.5,
    )  # fmt: skip
    x, base, deltas, weights, bias = inputs
    upstream = torch.randn(len(x), len(bias), generator=torch.Generator().manual_seed(seed)).to(dtype)

    def run(function, cast):
        leaves = [cast(t).clone().requires_grad_() for t in (x, weights, bias)]
        y = function(leaves[0], cast(base), cast(deltas), leaves[1], leaves[2])
        y.backward(cast(upstream))
        return y.detach(), *(leaf.grad for leaf in leaves)

    ours = run(routed_linear, lambda t: t)
    plain = run(routed_linear_reference, lambda t: t)
    exact = run(lambda *t: routed_linear_reference(*t, accumulate=torch.float64), lambda t: t.double())
    for mine, theirs, true in zip(ours, plain, exact, strict=True):
        assert mine.dtype == theirs.dtype
        close(mine, true, theirs)


def test_no_bias_and_no_rows():
    x, base, deltas, weights, _ = make(4, rows=3, outs=5, ins=6, experts=2)
    close(
        routed_linear(x, base, deltas, weights),
        routed_linear_reference(*(t.double() for t in (x, base, deltas, weights)), accumulate=torch.float64),
        routed_linear_reference(x, base, deltas, weights),
    )
    weights.requires_grad_()
    empty = routed_linear(x[:0], base, deltas, weights)
    assert empty.shape == (0, 5)
    empty.sum().backward()
    assert (weights.grad == 0).all()


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # opcheck's own copies
def test_operator_is_sound():
    x, base, deltas, weights, bias = make(5, rows=3, outs=5, ins=6, experts=2)
    leaves = [t.requires_grad_() for t in (x, weights, bias)]
    torch.library.opcheck(
        torch.ops.paretofuse.routed_linear.default, (leaves[0], base, deltas, leaves[1], leaves[2])
    )


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that run from now on."""
    names, run = [], Launch.run
    monkeypatch.setattr(Launch, "run", lambda self: (names.append(self.kernel.fn.__name__), run(self))[1])
    return names


@pytest.mark.parametrize(
    ("rows", "ins", "kernels"),
    [
        (1, 60, ["linear_kernel"]),
        (1, 260, ["linear_kernel", "add_pieces_kernel"]),
        (FUSED_ROWS, 260, ["linear_kernel", "add_pieces_kernel"]),
        (FUSED_ROWS + 1, 260, ["layer_merge_kernel"]),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_few_rows_are_mixed_on_the_way_and_many_merged_first(launched, rows, ins, kernels, bias):
    inputs = make(6, rows=rows, outs=40, ins=ins, experts=3, x=torch.bfloat16, weight=torch.bfloat16)
    inputs = inputs if bias else inputs[:4]
    exact = routed_linear_reference(*(t.double() for t in inputs), accumulate=torch.float64)
    close(routed_linear(*inputs), exact, routed_linear_reference(*inputs))
    assert launched == kernels


@pytest.mark.parametrize("use", [use for use in MERGE_CONFIGS if use not in ("small groups", "any row")])
@pytest.mark.parametrize("layout", ["linear", "conv1d", "apart", "one output"])
def test_a_layer_is_merged_for_several_preferences(use, layout):
    """In any layout, also with lines that lie apart; as exact as PyTorch's own sum."""
    experts = min(MERGE_CONFIGS[use].e_chunk, 9) + (use == "any")
    _, base, deltas, _, _ = make(
        7, rows=1, outs=1 if layout == "one output" else 9, ins=61, experts=experts, weight=torch.bfloat16,
        delta=torch.float16, conv1d=layout == "conv1d",
    )  # fmt: skip
    if layout == "apart":
        base, deltas = base[:, 3:-8], deltas[:, :, 3:-8]
        assert not base.is_contiguous()
    weights = torch.randn(3, experts, generator=torch.Generator().manual_seed(8))
    mixed, launch = layer_merge_launch(base, deltas, weights, torch.bfloat16, MERGE_CONFIGS[use])
    mixed.fill_(float("nan"))
    launch.run()
    for found, own in zip(mixed, weights, strict=True):
        exact = base.double() + torch.einsum("e,eoi->oi", own.double(), deltas.double())
        close(found, exact, merge_tensor_reference(base, list(deltas), own, torch.bfloat16))


@pytest.mark.parametrize("rows", [5, 33])
def test_float32_is_multiplied_as_torch_was_told(rows):
    """Exactly, or as TF32, whose products are off by at most 2^-9 of each; also in the weights' gradient."""
    x, base, deltas, weights, _ = make(9, rows=rows, outs=30, ins=70, experts=2)
    exact = routed_linear_reference(
        *(t.double() for t in (x, base, deltas, weights)), accumulate=torch.float64
    )
    mixed = base + torch.einsum("e,eoi->oi", weights, deltas)
    bound = x.abs().double() @ mixed.abs().double().T
    grad = torch.randn(rows, 30, generator=torch.Generator().manual_seed(10))
    outer, size = inner_reference(grad.T @ x, list(deltas)), (grad.abs().T @ x.abs()).double()
    errors = {}
    for precision in ("highest", "high", "medium"):
        torch.set_float32_matmul_precision(precision)
        try:
            off = (
                fused_linear(x, base, deltas, weights, None, LINEAR_CONFIGS["float32"]) - exact
            ).abs() / bound
            sums = run_weights_grad(grad, x, deltas, WEIGHTS_GRAD_CONFIGS["float32"]) - outer
        finally:
            torch.set_float32_matmul_precision("highest")
        errors[precision] = (
            off.max(),
            (sums.abs() / torch.einsum("oi,eoi->e", size, deltas.abs().double())).max(),
        )
    assert all(error < 1e-6 for error in errors["highest"])
    assert errors["high"] == errors["medium"]
    assert all(1e-6 < error < 2**-9 for error in errors["high"])
