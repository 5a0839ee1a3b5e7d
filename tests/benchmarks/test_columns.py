"""Models that hold their weights transposed compute the same; the engine's rows of them are the columns."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

import paretofuse as pf
from benchmarks.experiments import ablation, vision
from benchmarks.experiments.columns import Held, Turned, TurnedModels, turn, turn_expert
from benchmarks.experiments.experiment import Models
from benchmarks.experiments.run import Plan
from tests.support.models import net_and_experts, perturbed, tiny_gpt2

BOTH = pytest.mark.parametrize("held", get_args(Held))


def models(kind: str) -> tuple[nn.Module, dict[str, nn.Module]]:
    if kind == "linear":
        return net_and_experts(count=2)
    base = tiny_gpt2()
    return base, {"a": perturbed(base, 1), "b": perturbed(base, 2)}


def turned(base: nn.Module, experts: dict[str, nn.Module], held: Held):
    base = turn(copy.deepcopy(base), held)
    return base, {name: turn_expert(copy.deepcopy(e), base, held) for name, e in experts.items()}


def outputs(module: nn.Module, kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        if kind == "linear":
            return module(torch.randn(4, 8, generator=generator))
        return module(input_ids=torch.randint(101, (2, 7), generator=generator)).logits


@BOTH
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_turned_models_give_the_same_outputs(kind, held):
    base, experts = models(kind)
    other, others = turned(base, experts, held)
    layers = [m for m in other.modules() if isinstance(m, Turned)]
    assert len(layers) == (2 if kind == "linear" else 8), "all but the tied ones"
    assert {layer.inputs_first for layer in layers} == {kind == "conv1d"}
    for one, same in [(base, other), *((experts[name], others[name]) for name in experts)]:
        torch.testing.assert_close(outputs(same, kind), outputs(one, kind), rtol=1e-5, atol=1e-5)
    # All weight on one expert, and between the experts: the straight line of before.
    engines = [
        pf.stack(*both, route="tensor", family="scalar") for both in ((base, experts), (other, others))
    ]
    for preference in ([1.0, 0.0], [0.3, 0.7]):
        line, turned_line = (outputs(engine.merge(preference), kind) for engine in engines)
        torch.testing.assert_close(turned_line, line, rtol=1e-5, atol=1e-5)


@BOTH
@pytest.mark.parametrize(("kind", "name"), [("linear", "second"), ("conv1d", "transformer.h.1.attn.c_attn")])
def test_the_engines_rows_are_the_columns(kind, name, held):
    base, experts = models(kind)
    engine = pf.stack(*turned(base, experts, held), route="tensor", family="rows")
    layer = base.get_submodule(name)
    rows, columns = layer.weight.shape
    weights = torch.zeros(engine.routers.width, 2)
    column, row, before = 3, 2, layer.weight.detach()
    spans = engine.layout.row_spans
    assert spans[f"{name}.turned"].stop - spans[f"{name}.turned"].start == columns
    weights[spans[f"{name}.turned"].start + column, 0] = 0.6
    delta = experts["a"].get_submodule(name).weight.detach() - before
    expected = before.clone()
    share = 1.0 if held == "columns" else 0.5
    expected[:, column] += share * 0.6 * delta[:, column]
    if held == "rows and columns":
        assert spans[f"{name}.weight"].stop - spans[f"{name}.weight"].start == rows
        weights[spans[f"{name}.weight"].start + row, 0] = 0.2
        expected[row] += share * 0.2 * delta[row]
    merged = engine.merge(weights=weights).get_submodule(name)
    assert isinstance(merged, Turned)
    effective = merged.turned.mT if merged.weight is None else merged.weight + merged.turned.mT
    torch.testing.assert_close(effective.detach(), expected, rtol=1e-6, atol=1e-6)


def test_its_settings_learn_on_turned_models(tmp_path: Path):
    """The whole way, tiny: a number is learned for each column, and for each row where both are asked for."""
    pytest.importorskip("sklearn", reason="the quick experiment is about scikit-learn's digits")
    plan = Plan([3], 1, 1, True, tmp_path, ["columns @ 3"])
    found = ablation.run(vision.two, plan, tmp_path / "out", say=lambda line: None)
    assert [row.contender for row in found] == ["ablation columns @ 3", "ablation rows and columns @ 3"]
    [folder] = [path for path in tmp_path.iterdir() if path.name != "out"]
    plain = Models(vision.two(True), 3, folder / "seed3")
    for row, held in zip(found, get_args(Held), strict=True):
        own = TurnedModels(plain, held)
        engine = pf.stack(own.base(), own.experts(), route="tensor", family="rows")
        assert row.parameters == sum(p.numel() for p in engine.routers.parameters())
