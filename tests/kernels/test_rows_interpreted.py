"""The preference-per-row kernels in Triton's interpreter, against float64; `test_in_interpreter.py` runs it."""

from __future__ import annotations

import os
import random

import pytest
import torch

from paretofuse.kernels.launch import MERGED_AT_ONCE, MERGED_WORK, ROWS_CONFIGS, Launch
from paretofuse.kernels.reference import routed_rows_reference
from paretofuse.kernels.routed_rows import fused_rows, merged_rows, routed_rows, run_weights_grad

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in a child process of test_in_interpreter.py", allow_module_level=True)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def make(seed, *, batch, per, outs, ins, experts, x=torch.float32, weight=torch.float32, conv1d=False):
    """x, base, deltas, weights, bias, all from one seed."""
    g = torch.Generator().manual_seed(seed)
    shape = (ins, outs) if conv1d else (outs, ins)
    base, deltas = torch.randn(shape, generator=g), torch.randn(experts, *shape, generator=g)
    if conv1d:
        base, deltas = base.T, deltas.mT
    weights = torch.randn(batch, experts, generator=g) / experts**0.5
    activations, bias = torch.randn(batch, per, ins, generator=g).to(x), torch.randn(batch, outs, generator=g)
    return activations, base.to(weight), deltas.to(weight), weights, bias.to(weight)


def close(found, exact, plain):
    """At most twice the error of PyTorch's own result in the same dtype, and of float32 sums."""
    assert not found.isnan().any()
    assert (found - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-5 * exact.abs().max()


@pytest.mark.parametrize("use", ROWS_CONFIGS)
@pytest.mark.parametrize(("conv1d", "steps"), [(False, 4), (True, 1)])
def test_every_configuration(use, conv1d, steps):
    """Each does any shape and dtype, also those that the size rule would give to another; over four steps are cut.

    A second tile of rows, of outputs and of inputs is reached in part.
    """
    dtype = torch.float32 if use in ("float32", "tf32") else torch.bfloat16
    config = ROWS_CONFIGS[use]
    batch, per, outs, ins = 5, config.rows // 4, config.outs + 6, steps * config.ins + 5
    inputs = make(
        1, batch=batch, per=per, outs=outs, ins=ins, experts=2, x=dtype, weight=dtype, conv1d=conv1d
    )
    exact = [t.double() for t in inputs]
    close(
        fused_rows(*inputs, config),
        routed_rows_reference(*exact, accumulate=torch.float64),
        routed_rows_reference(*inputs),
    )
    grad = torch.randn(batch, per, outs, generator=torch.Generator().manual_seed(2)).to(dtype)
    found = run_weights_grad(grad, inputs[0], inputs[2], config)
    truth = torch.einsum("bpo,bpi,eoi->be", grad.double(), exact[0], exact[2])
    torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("seed", range(10))
def test_random_shapes_forward_and_backward(seed):
    pick = random.Random(seed)
    dtype = pick.choice(FLOATS)
    inputs = make(
        seed, batch=pick.randint(1, 9), per=pick.choice((1, 1, 2, 7)), outs=pick.randint(1, 90),
        ins=pick.randint(1, 90), experts=pick.choice((1, 2, 5)), x=dtype,
        weight=dtype if dtype == torch.float32 else pick.choice(FLOATS), conv1d=pick.random() < 0.5,
    )  # fmt: skip
    x, base, deltas, weights, bias = inputs
    rounded = (base.to(dtype), deltas.to(dtype))  # what the kernel says it does to them
    upstream = torch.randn(*x.shape[:2], bias.shape[1], generator=torch.Generator().manual_seed(seed)).to(
        dtype
    )

    def run(function, cast, planes=rounded):
        leaves = [cast(t).clone().requires_grad_() for t in (x, weights, bias)]
        y = function(leaves[0], cast(planes[0]), cast(planes[1]), leaves[1], leaves[2])
        y.backward(cast(upstream))
        return y.detach(), *(leaf.grad for leaf in leaves)

    ours = run(routed_rows, lambda t: t, planes=(base, deltas))
    plain = run(routed_rows_reference, lambda t: t)
    exact = run(lambda *t: routed_rows_reference(*t, accumulate=torch.float64), lambda t: t.double())
    for mine, theirs, true in zip(ours, plain, exact, strict=True):
        assert mine.dtype == theirs.dtype
        close(mine, true, theirs)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # opcheck's own copies
def test_operator_is_sound():
    x, base, deltas, weights, bias = make(3, batch=3, per=2, outs=5, ins=6, experts=2)
    leaves = [t.requires_grad_() for t in (x, weights, bias)]
    torch.library.opcheck(
        torch.ops.paretofuse.routed_rows.default, (leaves[0], base, deltas, leaves[1], leaves[2])
    )


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_preferences_with_many_rows_are_merged_first(monkeypatch, conv1d, bias):
    """Some at a time; a weight is then rounded once, and not each plane."""
    names, run = [], Launch.run
    monkeypatch.setattr(Launch, "run", lambda self: (names.append(self.kernel.fn.__name__), run(self))[1])
    per, experts = MERGED_WORK["half"] // 2, 2
    inputs = make(
        4,
        batch=MERGED_AT_ONCE + 2,
        per=per,
        outs=20,
        ins=33,
        experts=experts,
        x=torch.bfloat16,
        conv1d=conv1d,
    )
    inputs = inputs if bias else inputs[:4]
    found = routed_rows(*inputs)
    assert names == ["layer_merge_kernel"] * 2
    exact = routed_rows_reference(*(t.double() for t in inputs), accumulate=torch.float64)
    close(found, exact, routed_rows_reference(*inputs))
    few = [t[:, : per - 1] if i == 0 else t for i, t in enumerate(inputs)]
    close(routed_rows(*few), exact[:, : per - 1], routed_rows_reference(*few))
    assert names[2] == "rows_kernel"


def test_both_ways_agree_in_float32():
    inputs = make(5, batch=3, per=17, outs=21, ins=40, experts=2)
    torch.testing.assert_close(merged_rows(*inputs), fused_rows(*inputs, ROWS_CONFIGS["float32"]))
