"""The engine on the Triton backend, in Triton's interpreter; `test_in_interpreter.py` runs it."""

from __future__ import annotations

import os

import pytest
import torch

import paretofuse as pf
from paretofuse.engine.merging.flat import FlatOutputs
from tests.support.models import Net, net_and_experts, perturbed, same, tiny_gpt2

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in a child process of test_in_interpreter.py", allow_module_level=True)

R = [0.2, 0.3, 0.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merge_equals_the_reference(dtype: torch.dtype) -> None:
    base, experts = net_and_experts()
    ours = pf.stack(base, experts, dtype=dtype, backend="triton")
    truth = pf.stack(base, experts, dtype=dtype, backend="reference")
    rounding = torch.finfo(dtype).eps
    grid = torch.from_numpy(pf.simplex_grid(3, 3))
    for left, right in zip(ours.merge_state_dict(grid), truth.merge_state_dict(grid), strict=True):
        assert left.keys() == right.keys()
        for name in left:
            torch.testing.assert_close(left[name], right[name], rtol=rounding, atol=rounding * 0.1)


def test_switch_keeps_addresses_and_equals_merge() -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts, backend="triton", route=lambda n: None if n.startswith("norm") else n)
    addresses = [t.data_ptr() for t in engine.module.state_dict().values()]
    for _ in range(20):
        engine.switch(torch.rand(3).softmax(0))
    engine.switch(R)
    assert [t.data_ptr() for t in engine.module.state_dict().values()] == addresses
    assert same(engine.module, engine.merge(R))
    assert type(engine.merge(R)) is Net


def test_replicas_are_merged_models() -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts, backend="triton", replicas=2)
    for preference in (R, [1, 0, 0], R, [0, 0, 1]):
        with engine.replica(preference) as module:
            assert same(module, engine.merge(preference))


def test_gradients_equal_the_native_ones() -> None:
    base, experts = net_and_experts()
    x = torch.randn(6, 8)
    jacobians = []
    for backend in ("triton", "native"):
        engine = pf.stack(base, experts, backend=backend)
        engine.train_at(R)
        jacobians.append(engine.jacobian([engine.module(x).square().mean()]))
    torch.testing.assert_close(jacobians[0], jacobians[1], rtol=1e-4, atol=1e-6)


def test_a_tied_model_with_mixed_dtypes() -> None:
    base = tiny_gpt2()
    expert = tiny_gpt2(1).to(torch.bfloat16)
    engine = pf.stack(base, {"a": expert, "b": base}, backend="triton", delta_dtype=torch.float16)
    assert same(engine.merge([0.0, 1.0]), base)
    assert engine.module.lm_head.weight is engine.module.transformer.wte.weight


class Scaled(torch.nn.Module):
    """A routed parameter without dimensions, as CLIP's logit_scale, and one of a single element."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(5, 1)
        self.scale = torch.nn.Parameter(torch.tensor(1.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, 5] -> [B, 1]."""
        y: torch.Tensor = self.linear(x) * self.scale.exp()
        return y


def test_parameters_without_dimensions_are_trained() -> None:
    base = Scaled()
    experts = {name: perturbed(base, seed) for seed, name in enumerate("ab")}
    x = torch.randn(4, 5)
    jacobians = []
    for backend in ("triton", "native"):
        engine = pf.stack(base, experts, backend=backend, route="tensor")
        engine.train_at([0.25, 0.75])
        jacobians.append(engine.jacobian([engine.module(x).square().mean()]))
    assert jacobians[1][0, engine.groups.index("scale")].abs().min() > 0
    torch.testing.assert_close(jacobians[0], jacobians[1], rtol=1e-4, atol=1e-6)


def test_more_experts_than_any_chunk_holds() -> None:
    base = Scaled()
    experts = {f"e{i}": perturbed(base, i) for i in range(67)}
    preference = torch.rand(67).softmax(0)
    ours = pf.stack(base, experts, backend="triton", route="tensor")
    native = pf.stack(base, experts, backend="native", route="tensor")
    ours.switch(preference)
    native.switch(preference)
    for name, tensor in native.module.state_dict().items():
        torch.testing.assert_close(ours.module.state_dict()[name], tensor, rtol=1e-6, atol=1e-6)
    x = torch.randn(4, 5)
    jacobians = []
    for engine in (ours, native):
        engine.train_at(preference)
        jacobians.append(engine.jacobian([engine.module(x).square().mean()]))
    torch.testing.assert_close(jacobians[0], jacobians[1], rtol=1e-4, atol=1e-6)
    batch = ours.batched([preference, preference])(x[:2])
    torch.testing.assert_close(batch, native.module(x[:2]), rtol=1e-5, atol=1e-5)


def test_some_tensors_of_a_buffer_are_merged() -> None:
    """Two runs of neighbours, with tensors before, between and after them that nobody wants."""
    base = torch.nn.Sequential(*(torch.nn.Linear(40, 40) for _ in range(4)))
    experts = {name: perturbed(base, seed) for seed, name in enumerate("ab")}
    ours, truth = (pf.stack(base, experts, backend=b, route="tensor")._bound for b in ("triton", "reference"))
    wanted = ["0.bias", "1.weight", "2.weight", "2.bias", "3.weight"]
    specs = [ours.layout.by_name[name] for name in wanted]
    out = FlatOutputs(specs, 2, ours.places)
    for buffer in out.buffers.values():
        buffer.fill_(torch.nan)
    weights = torch.rand(2, 8, 2)
    ours.routed_merger(specs, out, out.views)(weights)
    for merged, whole in zip(out.views, truth.merge(weights), strict=True):
        assert list(merged) == wanted
        for name, tensor in merged.items():
            torch.testing.assert_close(tensor, whole[name], rtol=1e-6, atol=1e-7)
