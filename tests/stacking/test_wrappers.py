"""Wrappers around modules, and the prefixes that they leave in state dicts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import paretofuse as pf
from paretofuse.engine.stacking.wrappers import unwrap, unwrapped
from tests.support.models import net_and_experts, same


def compiled(module: nn.Module) -> nn.Module:
    """Compiled when first called, which is never."""
    return torch.compile(module, backend="eager")


WRAPPERS = {
    "data parallel": nn.DataParallel,
    "compiled": compiled,
    "averaged": torch.optim.swa_utils.AveragedModel,
    "two": lambda module: nn.DataParallel(compiled(module)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_module_is_the_module_within(wrapper: str) -> None:
    base, experts = net_and_experts()
    truth = pf.stack(base, experts).merge([0.2, 0.3, 0.5])
    wrap = WRAPPERS[wrapper]
    assert type(unwrap(wrap(base))) is type(base)
    engine = pf.stack(wrap(base), {name: wrap(expert) for name, expert in experts.items()})
    assert same(engine.merge([0.2, 0.3, 0.5]), truth)
    engine.switch([0.2, 0.3, 0.5])
    assert same(engine.module, truth)
    states = {
        name: {k: t for k, t in wrap(e).state_dict().items() if k != "n_averaged"}
        for name, e in experts.items()
    }
    assert same(pf.stack(base, states).merge([0.2, 0.3, 0.5]), truth)
    assert same(
        pf.stack(base, {name: wrap(expert) for name, expert in experts.items()}).merge([0.2, 0.3, 0.5]), truth
    )


def test_a_compiled_layer_within_an_expert_or_the_base() -> None:
    base, experts = net_and_experts()
    truth = pf.stack(base, experts).merge_state_dict([0.2, 0.3, 0.5])
    for module in (base, *experts.values()):
        module.second = compiled(module.second)  # type: ignore[attr-defined]
        assert "second._orig_mod.weight" in module.state_dict()
        merged = pf.stack(base, experts).merge_state_dict([0.2, 0.3, 0.5])
        assert all(torch.equal(merged[name], truth[unwrapped(name)]) for name in merged)
    engine = pf.stack(base, experts)
    engine.switch([0.2, 0.3, 0.5])
    live = engine.module.state_dict()
    assert all(torch.equal(live[name], truth[unwrapped(name)]) for name in live)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("module.w", "w"), ("_orig_mod.w", "w"), ("module.module._orig_mod.a.w", "a.w"), ("a._orig_mod.w", "a.w"),
        ("_orig_mod.module.w", "w"), ("submodule.w", "submodule.w"), ("a.module.w", "a.module.w"),
        ("my_orig_mod.w", "my_orig_mod.w"), ("module", "module"),
    ],
)  # fmt: skip
def test_names(name: str, plain: str) -> None:
    assert unwrapped(name) == plain


def test_names_that_only_look_like_a_wrapper_stay() -> None:
    """A model whose only child is called module keeps its names."""
    base = nn.ModuleDict({"module": nn.Linear(3, 2)})
    expert = nn.ModuleDict({"module": nn.Linear(3, 2)})
    engine = pf.stack(base, {"a": expert.state_dict(), "b": expert})
    assert list(engine.merge_state_dict([0.5, 0.5])) == ["module.weight", "module.bias"]
