"""Modules merged ahead: the same models as by switches, whatever the number of preferences, heads and rows included."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import paretofuse as pf
from paretofuse.engine.engine import Engine
from tests.support.models import net_and_experts, perturbed, same


def engine_of(family: str = "scalar") -> Engine:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts, family=family)
    with torch.no_grad():
        for parameter in engine.routers.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return engine


@pytest.mark.parametrize("family", ["scalar", "rows"])
@pytest.mark.parametrize(("points", "at_once"), [(1, 4), (2, 1), (5, 2), (6, 2), (7, 3), (3, 3)])
def test_they_are_what_switches_make(family: str, points: int, at_once: int) -> None:
    engine = engine_of(family)
    preferences = pf.sample_preferences(3, points, seed=points)
    engine.switch(preferences[0])
    address = engine.module.first.weight.data_ptr()
    before = [t.clone() for t in engine.module.state_dict().values()]
    seen = 0
    for preference, module in zip(preferences, engine.modules(preferences, at_once=at_once), strict=True):
        assert type(module) is type(engine.module)
        assert module is not engine.module
        assert same(module, engine.merge(preference))
        with torch.no_grad():
            module.norm.running_mean.fill_(torch.nan)  # training may change it; merged anew it starts anew
        seen += 1
    assert seen == points
    assert engine.module.first.weight.data_ptr() == address
    assert all(torch.equal(a, b) for a, b in zip(before, engine.module.state_dict().values(), strict=True))


@pytest.mark.parametrize("family", ["scalar", "rows"])
@pytest.mark.parametrize("points", [1, 2, 5])
def test_the_live_module_can_take_turns_and_ends_at_the_last(family: str, points: int) -> None:
    engine = engine_of(family)
    preferences = pf.sample_preferences(3, points, seed=points)
    turns = []
    for preference, module in zip(
        preferences, engine.modules(preferences, at_once=1, live=True), strict=True
    ):
        assert same(module, engine.merge(preference))
        turns.append(module is engine.module)
    assert turns == [(points - 1 - index) % 2 == 0 for index in range(points)]
    assert engine.preference == dict(zip("abc", preferences[-1].tolist(), strict=True))
    assert same(engine.module, engine.merge(preferences[-1]))
    one = list(engine.modules({"a": 1.0, "b": 0.0, "c": 0.0}, at_once=1, live=True))
    assert one == [engine.module]
    assert engine.preference == {"a": 1.0, "b": 0.0, "c": 0.0}


def test_a_caller_that_stops_early_is_told_what_the_live_module_is_merged_for() -> None:
    engine = engine_of()
    modules = engine.modules(pf.simplex_grid(3, 5), at_once=1, live=True)
    for _ in range(4):
        next(modules)
    modules.close()  # type: ignore[attr-defined]
    assert engine.preference is not None
    assert same(engine.module, engine.merge(engine.preference))


def test_many_calls_share_their_modules() -> None:
    engine = engine_of()
    ahead, seen = engine.ahead(2), set[int]()
    for points in (1, 5, 2, 3, 4):
        preferences = pf.sample_preferences(3, points, seed=points)
        for preference, module in zip(preferences, ahead.modules(preferences), strict=True):
            assert same(module, engine.merge(preference))
            if points > 1:
                seen.add(id(module))
    assert len(seen) == 4
    with torch.no_grad():
        engine.routers.output.bias.add_(0.1)  # trained since
    moved = next(modules := ahead.modules(preferences))
    assert same(moved, engine.merge(preferences[0]))
    modules.close()
    moved.double()
    with pytest.raises(ValueError, match="rewritten in place"):
        list(ahead.modules(preferences))
    assert len(list(ahead.modules(preferences))) == 4  # made anew


def test_heads_show_in_them() -> None:
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    engine = pf.stack(base, {"a": perturbed(base, 1), "b": perturbed(base, 2)}, heads=["1"])
    for preference, module in zip(pf.simplex_grid(2, 3), engine.modules(pf.simplex_grid(2, 3)), strict=True):
        for name in "ab":
            assert same(pf.with_head(module, name), engine.merge(preference, head=name))


def test_a_caller_that_stops_early_leaves_no_thread() -> None:
    import threading

    engine = engine_of()
    for _ in engine.modules(pf.simplex_grid(3, 5), at_once=2):
        break
    assert not [t.name for t in threading.enumerate() if t.name.startswith("paretofuse-ahead")]


def test_a_module_that_was_moved_is_told() -> None:
    modules = engine_of().modules(pf.simplex_grid(3, 4), at_once=1)
    next(modules).double()
    next(modules)
    with pytest.raises(ValueError, match="rewritten in place"):
        next(modules)


def test_wrong_arguments() -> None:
    engine = engine_of()
    for wrong in (0, True, 1.5):
        with pytest.raises(ValueError, match=r"got at_once=.*at least 1"):
            engine.modules(pf.simplex_grid(3, 3), at_once=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"got preference .* with sum 1.8"):
        engine.modules([[0.5, 0.6, 0.7]])
    with pytest.raises(ValueError, match=r"got at_once=2 with live=True, expected 1"):
        engine.modules(pf.simplex_grid(3, 3), at_once=2, live=True)


def test_sweeps_take_them() -> None:
    engine = engine_of()
    x = torch.randn(5, 8)

    def evaluate(module: nn.Module) -> list[float]:
        assert not module.training
        return module(x).mean(0)[:3].tolist()

    grid = pf.simplex_grid(3, 4)
    truth = pf.sweep(engine, evaluate, grid, progress=False)
    assert pf.sweep(engine, evaluate, grid, ahead=3, progress=False) == truth
    engine.switch(grid[3])
    assert pf.sweep(engine, evaluate, grid, ahead=3, progress=False) == truth
    assert engine.preference == dict(zip("abc", grid[3].tolist(), strict=True))  # left where it was
    assert pf.sweep(engine, evaluate, grid, ahead=1, progress=False) == truth
    assert engine.preference == dict(zip("abc", grid[-1].tolist(), strict=True))

    class Bare:
        objectives, module = engine.objectives, engine.module

        def switch(self, preference: object) -> None: ...

    with pytest.raises(TypeError, match="got ahead= with Bare"):
        pf.sweep(Bare(), evaluate, grid, ahead=3, progress=False)
