"""The live module stays an ordinary module: torch.compile, DistributedDataParallel, deepcopy, save_pretrained."""

from __future__ import annotations

import copy
import socket
from collections.abc import Iterator

import pytest
import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

import paretofuse as pf
from tests.support.models import net_and_experts, same, tiny_gpt2

R = [0.2, 0.3, 0.5]


def jacobian_of(engine: pf.Engine, forward: object, x: torch.Tensor) -> torch.Tensor:
    engine.train_at(R)
    return engine.jacobian([forward(x).square().mean()])  # type: ignore[operator]


@pytest.mark.filterwarnings("ignore")
def test_torch_compile_sees_each_switch() -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts)
    compiled = torch.compile(engine.module, backend="aot_eager")
    x = torch.randn(6, 8)
    for r in ([1.0, 0.0, 0.0], R, [0.0, 0.0, 1.0]):
        engine.switch(r)
        torch.testing.assert_close(compiled(x), engine.merge(r)(x))
    if torch.__version__ < (2, 7):
        pytest.skip("what torch 2.6 has compiled does not see that parameters begin to need gradients")
    torch.testing.assert_close(jacobian_of(engine, compiled, x), jacobian_of(engine, engine.module, x))


@pytest.fixture
def gloo() -> Iterator[None]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_distributed_data_parallel(gloo: None) -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts)
    x = torch.randn(6, 8)
    expected = jacobian_of(engine, engine.module, x)
    engine.train_at(R)  # DDP wants parameters that require gradients
    wrapped = DistributedDataParallel(engine.module)
    for _ in range(2):
        torch.testing.assert_close(jacobian_of(engine, wrapped, x), expected)


def test_copies_of_the_live_module_are_free_of_the_engine() -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts)
    engine.train_at(R)
    free = copy.deepcopy(engine.module)
    free(torch.randn(3, 8)).sum().backward()
    assert all(p.grad is not None for p in free.parameters())
    engine.switch([1.0, 0.0, 0.0])
    assert not same(free, engine.module)


def test_a_live_hf_model_generates_and_saves(tmp_path: object) -> None:
    base = tiny_gpt2()
    engine = pf.stack(base, {"a": tiny_gpt2(1), "b": tiny_gpt2(2)})
    prompt = torch.arange(4).unsqueeze(0)
    engine.switch([0.5, 0.5])
    live = engine.module.generate(prompt, max_new_tokens=5, do_sample=False)
    assert torch.equal(live, engine.merge([0.5, 0.5]).generate(prompt, max_new_tokens=5, do_sample=False))
    engine.module.save_pretrained(tmp_path)
    again = type(base).from_pretrained(tmp_path)
    assert same(again, engine.module)
