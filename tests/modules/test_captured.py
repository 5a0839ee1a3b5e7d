"""Captured switches: where there are none, and on a GPU; tests/kernels/test_captured_interpreted.py does the rest."""

from __future__ import annotations

import pytest
import torch

import paretofuse as pf
from paretofuse.engine.modules.captured import one_gpu
from tests.support.models import net_and_experts, same

CPU, FIRST, SECOND = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)


def test_a_model_on_the_cpu_has_none() -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts)
    with pytest.raises(ValueError, match=r"backend='native' on cpu, expected .*one GPU.*use engine\.switch"):
        engine.capture()


@pytest.mark.parametrize(
    "backends",
    [
        {FIRST: "reference"},
        {CPU: "triton"},
        {FIRST: "triton", SECOND: "triton"},
        {FIRST: "triton", CPU: "native"},
    ],
)
def test_only_the_kernels_of_one_gpu_are_captured(backends: dict[torch.device, str]) -> None:
    with pytest.raises(ValueError, match="expected backend='triton' on one GPU") as caught:
        one_gpu(backends)
    assert all(
        f"backend={backend!r} on {device}" in str(caught.value) for device, backend in backends.items()
    )


def test_the_device_is_named() -> None:
    assert one_gpu({SECOND: "triton"}) == SECOND


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device here")
@pytest.mark.parametrize("family", ["scalar", "rows"])
@pytest.mark.parametrize("planes", ["dense", "int8", "lowrank:2"])
def test_on_the_gpu(planes: str, family: str) -> None:
    """Many switches in a row, none waited for: each result, copied on the stream, has the bits of a switch."""
    base, experts = net_and_experts()
    ours, truth = (pf.stack(base, experts, device="cuda", planes=planes, family=family) for _ in range(2))
    for engine in (ours, truth):
        if engine.routers.rows is not None:
            generator = torch.Generator().manual_seed(1)
            weight = engine.routers.rows.weight
            weight.data.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    captured = ours.capture()
    assert same(ours.module, truth.module)
    preferences = torch.rand(50, 3, dtype=torch.float64).softmax(1)
    found = []
    for preference in preferences:
        captured.switch(preference)
        found.append({name: tensor.clone() for name, tensor in ours.module.state_dict().items()})
    for preference, state in zip(preferences, found, strict=True):
        truth.switch(preference)
        expected = truth.module.state_dict()
        assert all(torch.equal(state[name], expected[name]) for name in expected)
    ours.unload(preferences[0].tolist())
    with pytest.raises(ValueError, match=r"engine\.capture\(\) again"):
        captured.switch(preferences[0])
