"""`pf.fit(capture=True)`: where there is none, and on a GPU; tests/kernels/test_captured_step_interpreted.py does the
rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paretofuse as pf
from tests.support.models import net_and_experts


def loss(module: nn.Module, batch: Tensor) -> Tensor:
    out: Tensor = module(batch)
    return out.square().mean()


def objectives(device: str = "cpu") -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(4, 8, generator=generator).to(device) for _ in range(3)]
    return {name: (data, loss) for name in "abc"}


def test_on_the_cpu_nothing_is_captured() -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts)
    before = {name: tensor.clone() for name, tensor in engine.routers.state_dict().items()}
    words = r"backend='native' on cpu, expected backend='triton' on one GPU.*leave out capture="
    with pytest.raises(ValueError, match=words):
        pf.fit(engine, objectives(), steps=2, capture=True, progress=False)
    with pytest.raises(ValueError, match=r"capture=True with materialize=False, expected only one of them"):
        pf.fit(engine, objectives(), steps=2, capture=True, materialize=False, progress=False)
    assert engine.routers.state_dict().keys() == before.keys()
    assert engine.training is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device here")
@pytest.mark.parametrize("family", ["scalar", "rows"])
@pytest.mark.parametrize("planes", ["dense", "int8", "lowrank:2"])
@pytest.mark.parametrize("rank", [None, 1])
def test_on_the_gpu(planes: str, family: str, rank: int | None) -> None:
    """Replays learn what steps learn, one after the other, with a validation's switches between."""
    base, experts = net_and_experts()
    found = []
    for capture in (False, True):
        engine = pf.stack(base, experts, device="cuda", planes=planes)
        if rank is not None:
            pf.add_planes(engine, rank=rank)
        engine.module.train()
        records = pf.fit(
            engine,
            objectives("cuda"),
            steps=30,
            family=family,
            capture=capture,
            progress=False,
            callback=lambda record, engine=engine: engine.switch([0.2, 0.3, 0.5]),  # type: ignore[misc]
        )
        found.append((records, engine.routers.state_dict()))
    (plain, routers), (captured, ours) = found
    for one, other in zip(plain, captured, strict=True):
        assert one == pytest.approx(other, rel=1e-3)
    for name, tensor in routers.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-2, atol=1e-4)
