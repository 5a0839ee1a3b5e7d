"""Searches over coefficients: what is merged, where it ends, parts, storage, files, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import paretofuse as pf
from paretofuse.engine.engine import Engine
from paretofuse.fronts.coefficients import Coefficients
from tests.python.fronts.test_search import Evaluation, dial

optuna = pytest.importorskip("optuna")


pytestmark = pytest.mark.usefixtures("quiet_optuna")


class Deltas(nn.Module):
    """Four layers of one number each, so that a merged model shows its coefficients."""

    def __init__(self, *numbers: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 1, bias=False) for _ in range(4))
        with torch.no_grad():
            for layer in self.layers:
                layer.weight.copy_(torch.tensor([numbers]))  # type: ignore[operator]


def deep() -> Engine:
    """Four groups and two planes: each layer's weight is its pair of coefficients."""
    return pf.stack(Deltas(0, 0), {"x": Deltas(1, 0), "y": Deltas(0, 1)}, route="tensor")


class Beyond:
    """Two metrics, each best where both coefficients are large, and so out of a preference's reach."""

    def __init__(self) -> None:
        self.asked: list[list[float]] = []

    def __call__(self, module: Deltas) -> dict[str, float]:
        table = torch.cat([layer.weight for layer in module.layers]).double()  # type: ignore[misc]
        self.asked.append(table.flatten().tolist())
        x, y = table.mean(dim=0).tolist()
        return {
            "x": 1 - (x - 0.9) ** 2 - 0.3 * (y - 0.5) ** 2,
            "y": 1 - (y - 0.9) ** 2 - 0.3 * (x - 0.5) ** 2,
        }


def test_it_goes_beyond_the_simplex_and_beats_preferences_there() -> None:
    evaluation = Beyond()
    front = pf.search_coefficients(deep(), evaluation, 16, ref=0, progress=False)
    assert len(front) == len(evaluation.asked) == 16
    assert front.names == front.metrics == ("x", "y")
    np.testing.assert_allclose(np.tile(front.coefficients, 4), evaluation.asked, atol=1e-6)
    np.testing.assert_array_equal(front.coefficients[:3], [[1, 0], [0, 1], [0.5, 0.5]])
    assert front.coefficients.min() >= 0
    assert front.coefficients.max() <= 1
    within = pf.search(deep(), Beyond(), 16, ref=0, progress=False)
    assert front.hypervolume(0) > within.hypervolume(0)
    assert front.coefficients[front.non_dominated()].sum(axis=1).min() > 1.2
    again = pf.search_coefficients(deep(), Beyond(), 16, ref=0, progress=False)
    np.testing.assert_array_equal(again.coefficients, front.coefficients)  # the same seed


def test_what_is_chosen_is_what_was_measured() -> None:
    engine = deep()
    front = pf.search_coefficients(engine, Beyond(), 12, parts=2, high=1.5, progress=False)
    assert front.names == ("1/x", "1/y", "2/x", "2/y")
    chosen = front.choose(best="x")
    assert chosen.values["x"] == front.values[:, 0].max()
    assert Beyond()(engine.merge(weights=chosen.weights)) == pytest.approx(chosen.values, abs=1e-6)
    assert list(chosen.coefficients) == list(front.names)
    bounded = front.choose(at_least={"y": 0.5}, best="x")
    assert bounded.values["y"] >= 0.5
    with pytest.raises(ValueError, match="no point of the front gets there"):
        front.choose(at_least={"y": 2.0})


def test_parts() -> None:
    engine = deep()
    assert len(engine.groups) == 4
    halves = Coefficients(engine, 2)
    assert halves.parts == ("1", "2")
    expected = torch.tensor([[0.1, 0.2], [0.1, 0.2], [0.3, 0.4], [0.3, 0.4]])
    torch.testing.assert_close(halves.weights([0.1, 0.2, 0.3, 0.4]), expected)
    thirds = Coefficients(engine, 3)
    assert [thirds.weights(np.arange(6.0))[group, 0].item() for group in range(4)] == [0, 0, 2, 4]
    named = Coefficients(engine, lambda group: "ends" if "0" in group or "3" in group else "middle")
    assert named.names == ("ends/x", "ends/y", "middle/x", "middle/y")
    torch.testing.assert_close(named.weights([1, 2, 3, 4])[:, 0], torch.tensor([1.0, 3.0, 3.0, 1.0]))


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random"])
def test_samplers_and_bounds(sampler: str) -> None:
    front = pf.search_coefficients(
        deep(), Beyond(), 10, low=-0.5, high=0.25, sampler=sampler, at_least={"x": 0.1}, progress=False
    )
    assert len(front) == 10
    assert front.coefficients.min() >= -0.5
    assert front.coefficients.max() <= 0.25
    np.testing.assert_array_equal(front.coefficients[0], [0.25, 0.0])  # the expert, as far as the box reaches
    assert len({tuple(row) for row in front.coefficients}) == 10


def test_a_file_is_read_back_and_left_alone_where_it_is_another(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "found.csv"
    engine = deep()
    front = pf.search_coefficients(engine, Beyond(), 6, parts=2, out=out, progress=False)
    assert [path.name for path in out.parent.iterdir()] == ["found.csv"]
    header = "coefficient:1/x,coefficient:1/y,coefficient:2/x,coefficient:2/y,maximize:x,maximize:y"
    assert out.read_text().splitlines()[0] == header
    read = pf.CoefficientFront.from_csv(out, engine, parts=2)
    np.testing.assert_array_equal(read.coefficients, front.coefficients)
    np.testing.assert_array_equal(read.values, front.values)
    assert torch.equal(read.choose().weights, front.choose().weights)
    with pytest.raises(ValueError, match=r"expected \['x', 'y'\]; give the engine and the parts="):
        pf.CoefficientFront.from_csv(out, engine)
    with pytest.raises(ValueError, match="expected columns preference:NAME"):
        pf.Front.from_csv(out)
    for call in (
        lambda: pf.search(engine, Beyond(), 6, out=out, progress=False),
        lambda: pf.sweep(engine, Beyond(), out=out, progress=False),
    ):
        with pytest.raises(ValueError, match=r"is there already and is no front of preferences"):
            call()


def test_rows_are_kept_until_the_file_is_there(tmp_path: Path) -> None:
    out = tmp_path / "found.csv"

    class Failing(Beyond):
        limit = 5

        def __call__(self, module: Deltas) -> dict[str, float]:
            if len(self.asked) == self.limit:
                raise KeyError("labels")
            return super().__call__(module)

    with pytest.raises(KeyError, match="labels"):
        pf.search_coefficients(deep(), Failing(), 8, out=out, progress=False)
    partial = tmp_path / "found.partial.csv"
    assert partial.read_text().startswith("coefficient:x,coefficient:y,value:x")
    second = Failing()
    second.limit = 100
    front = pf.search_coefficients(deep(), second, 8, out=out, progress=False)
    assert (len(front), len(second.asked)) == (8, 3)
    assert not partial.exists()


def test_a_storage_goes_on_and_holds_one_box(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'search.db'}"
    first = pf.search_coefficients(deep(), Beyond(), 6, parts=2, storage=storage, progress=False)
    evaluation = Beyond()
    both = pf.search_coefficients(deep(), evaluation, 8, parts=2, storage=storage, progress=False)
    assert len(evaluation.asked) == 2
    np.testing.assert_array_equal(both.coefficients[:6], first.coefficients)
    for more in ({"parts": 1}, {"parts": 2, "high": 2.0}, {"parts": lambda group: str("0" in group)}):
        with pytest.raises(ValueError, match="or of other coefficients; give another name="):
            pf.search_coefficients(deep(), Beyond(), 8, storage=storage, progress=False, **more)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is of another engine"):
        pf.search(deep(), Beyond(), 8, storage=storage, progress=False)


def test_what_routers_learned_plays_no_part() -> None:
    engine = dial()
    before = pf.search_coefficients(engine, Evaluation(), 7, progress=False)
    with torch.no_grad():
        engine.routers.output.bias.add_(0.3)
    after = pf.search_coefficients(engine, Evaluation(), 7, progress=False)
    np.testing.assert_array_equal(before.values, after.values)


def test_wrong_arguments() -> None:
    engine, evaluation = deep(), Beyond()

    def refused(error: type[Exception], match: str, **more: object) -> None:
        with pytest.raises(error, match=match):
            pf.search_coefficients(engine, evaluation, 5, progress=False, **more)  # type: ignore[arg-type]

    for low, high in ((1, 0), (0, 0), (0, float("inf")), (float("nan"), 1), ("0", 1), (False, True)):
        refused(ValueError, "got low=.*expected finite numbers, low below high", low=low, high=high)
    for count in (0, 5):
        refused(ValueError, f"got parts={count}, expected 1 to 4, as many as there are groups", parts=count)
    for wrong in (True, 2.0, "2"):
        refused(TypeError, "got parts=.*expected a whole number, or a function", parts=wrong)
    refused(TypeError, "got 3 from parts for the group 'layers.0.weight'", parts=lambda group: 3)
    refused(ValueError, "got sampler='grid'", sampler="grid")
    refused(ValueError, "expected some of the metrics", at_least={"z": 1})

    def broken(module: nn.Module) -> float:
        return 1.0

    with pytest.raises(TypeError, match="from evaluate at coefficient x=1, y=0, expected numbers"):
        pf.search_coefficients(engine, broken, 5, progress=False)
