"""Captured switches, in Triton's interpreter and with a CUDA graph's stand-in; `test_in_interpreter.py` runs it."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

import paretofuse as pf
from benchmarks.gpu.host import stub_graphs
from paretofuse.engine.engine import Engine
from paretofuse.engine.routing.preference import Preference, by_name
from tests.support.graphs import LateDevice
from tests.support.models import perturbed, same

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in a child process of test_in_interpreter.py", allow_module_level=True)

A, B = [0.2, 0.3, 0.5], [0.6, 0.4, 0.0]


@pytest.fixture
def late() -> Iterator[LateDevice]:
    device = LateDevice()
    with stub_graphs(device.graph, device.event):
        yield device


def stacked(planes: str = "dense", family: str = "scalar") -> Engine:
    """An engine whose routers are away from their start; always the same one."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16)).eval()
    experts = {name: perturbed(base, seed) for seed, name in enumerate("abc")}
    engine = pf.stack(base, experts, backend="triton", planes=planes, family=family)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in engine.routers.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return engine


def switch_as_on_a_gpu(engine: Engine, preference: Preference) -> None:
    """Row coefficients are computed by PyTorch there, all routing weights with them; on the CPU by the core."""
    if engine.routers.rows is None:
        engine.switch(preference)
    else:
        with torch.no_grad():
            engine.switch(weights=engine.routers(preference))


@pytest.mark.parametrize(
    ("planes", "family"),
    [("dense", "scalar"), ("int8", "rows"), ("lowrank:2", "rows"), ("dense", "rows+columns")],
)
def test_its_bits_are_those_of_a_switch(planes: str, family: str, late: LateDevice) -> None:
    ours, truth = stacked(planes, family), stacked(planes, family)
    for engine in (ours, truth):
        engine.switch(B)
    captured = ours.capture()
    late.catch_up()
    assert same(ours.module, truth.module)  # to capture is not to switch
    assert ours.preference == truth.preference
    for preference in ({"c": 1.0}, torch.rand(3, dtype=torch.float64).softmax(0)):
        for parameter in ours.module.parameters():
            parameter.data.fill_(torch.nan)
        ours.module.get_buffer("1.num_batches_tracked").add_(1)  # what training changes starts anew
        captured.switch(preference)
        late.catch_up()
        switch_as_on_a_gpu(truth, preference)
        assert same(ours.module, truth.module)
        assert ours.preference == by_name(preference, "abc")
    ours.warmup()  # merges what is merged
    assert same(ours.module, truth.module)


def test_a_switch_waits_before_it_overwrites_what_the_last_one_has_yet_to_fetch(late: LateDevice) -> None:
    engine = stacked()
    captured, seen = engine.capture(), list[torch.Tensor]()
    for preference in (A, B):
        captured.switch(preference)
        late.asked.append(lambda: seen.append(engine.module.get_parameter("0.weight").clone()))
    late.catch_up()
    for found, preference in zip(seen, (A, B), strict=True):
        assert torch.equal(found, engine.merge_state_dict(preference)["0.weight"])


def test_who_lets_go_of_it_waits_for_the_last_one(late: LateDevice) -> None:
    engine = stacked()
    captured = engine.capture()
    captured.switch(A)
    assert late.asked
    del captured
    gc.collect()
    assert not late.asked
    assert same(engine.module, engine.merge(A))


def test_routers_that_are_trained_further_count(late: LateDevice) -> None:
    for family in ("scalar", "rows"):
        engine = stacked(family=family)
        captured = engine.capture()
        captured.switch(A)
        with torch.no_grad():
            for parameter in engine.routers.parameters():
                parameter.mul_(0.9)
        captured.switch(A)
        late.catch_up()
        found = {name: tensor.clone() for name, tensor in engine.module.state_dict().items()}
        switch_as_on_a_gpu(engine, A)
        assert all(torch.equal(found[name], tensor) for name, tensor in engine.module.state_dict().items())


def test_training_and_switches_take_turns(late: LateDevice) -> None:
    engine = stacked()
    captured, x = engine.capture(), torch.randn(4, 16)
    engine.train_at(A)
    loss = engine.module(x).square().mean()
    captured.switch(B)
    late.catch_up()
    assert not any(parameter.requires_grad for parameter in engine.module.parameters())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    engine.train_at(A)
    engine.module(x).square().mean().backward()
    assert any(parameter.grad is not None for parameter in engine.routers.parameters())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda engine: engine.unload(A), r"has let go of .*engine\.capture\(\) again"),
        (lambda engine: pf.add_planes(engine, rank=1), r"has let go of .*engine\.capture\(\) again"),
        (lambda engine: engine.set_family("rows"), r"routers of another family.*engine\.capture\(\) again"),
        (
            lambda engine: engine.module[1].num_batches_tracked.resize_(1000),
            r"live module whose tensor '1\.num_batches_tracked'",
        ),
    ],
)
def test_what_a_graph_would_do_wrong_is_refused(
    change: Callable[[Engine], object], words: str, late: LateDevice
) -> None:
    engine = stacked()
    captured = engine.capture()
    change(engine)
    for _ in range(2):
        with pytest.raises(ValueError, match=words):
            captured.switch(A)
    assert not late.asked
    engine.unload(A)
    engine.capture().switch(A)
    late.catch_up()
    assert same(engine.module, engine.merge(A))


def test_a_module_that_was_moved_and_a_bad_preference_are_told(late: LateDevice) -> None:
    engine = stacked()
    captured = engine.capture()
    with pytest.raises(ValueError, match="expected a sum of 1"):
        captured.switch([0.5, 0.6, 0.0])
    assert not late.asked
    engine.module.get_submodule("0").half()
    with pytest.raises(ValueError, match=r"live module whose tensor '0\."):
        captured.switch(A)
    assert engine.preference != dict(zip("abc", A, strict=True))
