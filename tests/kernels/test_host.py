"""What the host does for a switch, with Triton's driver stubbed: kernels are compiled for sm_90, launches do nothing.

What matters is counted, not timed: how often Triton is asked to look at arguments, binaries, launches, operators.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import paretofuse as pf
from benchmarks.gpu.host import StubDriver, stub_driver, stub_graphs
from paretofuse.kernels import launch, routed_merge
from tests.support.graphs import Operators
from tests.support.kernels import needs_triton
from tests.support.models import net_and_experts

needs_triton()


@pytest.fixture(scope="module")
def driver() -> Iterator[StubDriver]:
    with stub_driver() as stub:
        yield stub


def stacked(count: int = 3) -> pf.Engine:
    base, experts = net_and_experts(count=count)
    return pf.stack(base, experts, backend="triton")


def test_after_the_warmup_a_switch_compiles_nothing_and_binds_no_argument(
    driver: StubDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = stacked()
    engine.warmup()
    loaded, launches = len(driver.utils.binaries), driver.launches
    monkeypatch.setattr(
        launch.Launch, "run", lambda self: pytest.fail("Triton looked at the arguments again")
    )
    for _ in range(3):
        engine.switch(torch.rand(3).softmax(0))
    assert len(driver.utils.binaries) == loaded > 0
    assert driver.launches - launches == 3 * len(engine._bound.flat)
    assert len(engine._bound.flat) == 1


def test_a_warm_switch_runs_two_operators(driver: StubDriver) -> None:
    """The weights' copy, and one for all buffers that start anew: nothing allocates and nothing reads a value back."""
    engine = stacked()
    engine.warmup()
    assert len(engine._in_place.live()._restored) > 1
    with Operators() as ran:
        engine.switch([0.2, 0.3, 0.5])
    views = {"aten.lift_fresh.default", "aten.unsqueeze.default"}
    assert [name for name in ran.names if name not in views] == [
        "aten.copy_.default",
        "aten._foreach_copy_.default",
    ]


def test_a_captured_switch_is_one_copy_and_one_replay(driver: StubDriver) -> None:
    engine = stacked()
    with stub_graphs():
        captured = engine.capture()
        launches = driver.launches
        with Operators() as ran:
            captured.switch([0.2, 0.3, 0.5])
    views = {"aten.lift_fresh.default", "aten.unsqueeze.default"}
    assert [name for name in ran.names if name not in views] == ["aten.copy_.default"]
    graph: Any = captured._graph
    assert graph.replays == 1
    assert driver.launches == launches


def test_a_backward_pass_takes_one_launch_for_all_small_tensors_and_two_for_the_sums(
    driver: StubDriver,
) -> None:
    engine = stacked()
    for _ in range(2):
        engine.train_at([0.2, 0.3, 0.5])
        launches = driver.launches
        engine.module(torch.randn(4, 8)).sum().backward()
    assert len(engine._in_place.live().collector._kernels) == 8
    assert driver.launches - launches == 1 + 2


def test_one_binary_serves_any_number_of_experts_groups_and_preferences(driver: StubDriver) -> None:
    driver.utils.binaries.clear()
    for experts, k in ((9, 1), (16, 2), (16, 16), (9, 16)):
        engine = stacked(experts)
        engine._bound.merge(torch.rand(k, len(engine.groups), experts))
    assert len(driver.utils.binaries) == 1


@pytest.mark.parametrize("family", ["scalar", "rows"])
def test_a_warmup_compiles_what_the_family_needs(driver: StubDriver, family: str) -> None:
    engine = stacked()
    engine.module  # noqa: B018  merged without row coefficients
    engine.set_family(family)
    engine.warmup()
    loaded = len(driver.utils.binaries)
    engine.switch([0.2, 0.3, 0.5])
    assert len(driver.utils.binaries) == loaded


def test_bound_merges_are_checked_once_and_say_what_is_wrong(driver: StubDriver) -> None:
    base, deltas, tiles = torch.zeros(64), torch.zeros(2, 64), torch.zeros(2, dtype=torch.int32)
    weights, out = torch.zeros(1, 1, 2), torch.zeros(1, 64)
    routed_merge.bind_merge(base, deltas, tiles, weights, out, tile=32)()
    with pytest.raises(ValueError, match=r"out: got shape \(1, 32\), expected \(1, 64\)"):
        routed_merge.bind_merge(base, deltas, tiles, weights, out[:, :32], tile=32)
    with pytest.raises(ValueError, match="weights: got strides"):
        routed_merge.bind_merge(base, deltas, tiles, torch.zeros(1, 2, 2).mT, out, tile=32)
    with pytest.raises(ValueError, match="shared: got 16 with places of none"):
        routed_merge.bind_merge(base, deltas, tiles, weights, out, shared=16, tile=32)
