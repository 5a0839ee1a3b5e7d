"""Measures of fronts, against cases whose answer is known and against scipy."""

from __future__ import annotations

import moocore
import numpy as np
import pytest

from paretofuse.engine.evaluation import indicators
from paretofuse.engine.routing.preference import simplex_grid
from paretofuse.fronts.front import Front


def front_of(values: np.ndarray, maximize: bool | tuple[bool, ...] = True) -> Front:
    grid = simplex_grid(2, len(values))
    return Front(grid, values, ("a", "b"), ("a", "b"), maximize)


EVEN = np.stack([np.linspace(1, 0, 11), np.linspace(0, 1, 11)], axis=1)


def test_a_straight_even_front_is_perfect() -> None:
    front = front_of(EVEN)
    assert front.spacing() == pytest.approx(0, abs=1e-12)
    assert front.spread() == pytest.approx(1)
    assert front.spread([2, 2]) == pytest.approx(0.5)
    assert front.rank_correlation() == pytest.approx({"a": 1, "b": 1})
    assert front.share_non_dominated() == 1


def test_a_flat_front_is_worthless() -> None:
    front = front_of(np.full((11, 2), 0.8))
    assert front.spread() == 0
    assert front.rank_correlation() == {"a": 0.0, "b": 0.0}
    assert front.share_non_dominated() == pytest.approx(1 / 11)
    assert front.share_non_dominated(repeats=True) == 1


def test_directions_are_heard() -> None:
    assert front_of(EVEN, maximize=False).rank_correlation() == pytest.approx({"a": -1, "b": -1})
    mixed = front_of(EVEN * [1, -1], maximize=(True, False))
    assert mixed.rank_correlation() == pytest.approx({"a": 1, "b": 1})
    worse = EVEN.copy()
    worse[4] -= 0.5
    assert front_of(worse).share_non_dominated() == pytest.approx(10 / 11)
    assert front_of(-worse, maximize=False).share_non_dominated() == pytest.approx(10 / 11)


def test_metrics_are_matched_by_name() -> None:
    grid = simplex_grid(2, 5)
    swapped = Front(grid, grid[:, ::-1], ("a", "b"), ("b", "a"))
    assert swapped.rank_correlation() == pytest.approx({"a": 1, "b": 1})
    in_order = Front(grid, grid, ("a", "b"), ("a accuracy", "b accuracy"))
    assert in_order.rank_correlation() == pytest.approx({"a": 1, "b": 1})
    with pytest.raises(ValueError, match="expected one for each"):
        Front(grid, grid[:, :1], ("a", "b"), ("a",)).rank_correlation()


@pytest.mark.parametrize("seed", range(5))
def test_rank_correlation_is_spearmans(seed: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(seed)
    preferences, values = (
        rng.dirichlet(np.ones(3), 20).round(1),
        rng.uniform(0, 1, (20, 3)).round(1),
    )  # with ties
    ours = indicators.rank_correlation(preferences, values, [True] * 3)
    for e in range(3):
        assert ours[e] == pytest.approx(stats.spearmanr(preferences[:, e], values[:, e]).statistic)


def test_spacing_by_hand() -> None:
    # Nearest distances 1, 1, 2: their standard deviation with n - 1 is 1 / sqrt 3.
    assert indicators.spacing(np.array([[0.0, 0], [1, 0], [1, 2]])) == pytest.approx(1 / np.sqrt(3))
    assert indicators.spacing(np.zeros((2, 2))) == 0


@pytest.mark.parametrize("span", [[1.0], [1.0, 0.0], [1.0, -2.0]])
def test_bad_spans(span: list[float]) -> None:
    with pytest.raises(ValueError, match="got span="):
        front_of(EVEN).spread(span)


@pytest.mark.parametrize("metrics", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("larger", [True, False])
def test_estimated_hypervolume_is_within_its_stated_error(metrics: int, larger: bool) -> None:
    values = (
        np.random.default_rng(metrics).dirichlet(np.ones(metrics), 25) ** 0.5
        if metrics > 1
        else np.ones((1, 1))
    )
    sign = 1.0 if larger else -1.0
    exact = indicators.exact_hypervolume(sign * values, [0.0] * metrics, [larger] * metrics)
    assert exact == pytest.approx(moocore.hypervolume(-values, ref=[0.0] * metrics))
    value, error = indicators.estimate_hypervolume(
        sign * values, [0.0] * metrics, [larger] * metrics, samples=65536
    )
    assert abs(value - exact) <= 4 * error + 1e-12 * exact
    assert error < 0.02 * exact
    again = indicators.estimate_hypervolume(sign * values, [0.0] * metrics, [larger] * metrics, samples=65536)
    assert again == (value, error)


def test_stated_errors_are_honest() -> None:
    values = np.random.default_rng(0).dirichlet(np.ones(4), 12) ** 0.5
    exact = indicators.exact_hypervolume(values, [0.0] * 4, [True] * 4)
    scores = []
    for seed in range(30):
        value, error = indicators.estimate_hypervolume(values, [0.0] * 4, [True] * 4, samples=8192, seed=seed)
        scores.append((value - exact) / error)
    assert np.mean(np.abs(scores) < 2) > 0.75
    assert 0.5 < np.std(scores) < 1.8


@pytest.mark.parametrize("samples", [2, 3])
def test_the_stated_error_of_few_samples_is_exact(samples: int) -> None:
    """Half of each of two boxes of volume 1 is shared: terms are 1 or 1/2; error = 2 s / sqrt(n), s over n - 1."""
    values = np.array([[1.0, 1.0, 0.5], [1.0, 0.5, 1.0]]) * [1, 2, 1]  # volumes 1 and 1, shared 1 * 1 * .5
    ones = {2: [1], 3: [1, 2]}[samples]
    expected = {2 * np.std([1.0] * k + [0.5] * (samples - k), ddof=1) / np.sqrt(samples) for k in ones}
    found = {
        error
        for seed in range(40)
        if (error := indicators.estimate_hypervolume(values, [0.0] * 3, [True] * 3, samples, seed)[1]) > 0
    }
    assert sorted(found) == pytest.approx(sorted({round(e, 12) for e in expected}))


def test_hopeless_exact_hypervolumes_are_refused_but_estimated() -> None:
    grid = simplex_grid(16, 3)
    names = tuple(f"t{i}" for i in range(16))
    front = Front(grid, np.sqrt(grid) + 0.1, names, names)
    with pytest.raises(ValueError, match="got 136 non-dominated points in 16 metrics, expected at most 20"):
        front.hypervolume(0.0)
    value, error = front.hypervolume_estimate(0.0)
    assert 0 < error < 0.01 * value
    few = Front(grid[:3], front.values[:3], names, names)
    assert few.hypervolume(0.0) == pytest.approx(few.hypervolume_estimate(0.0)[0], rel=0.02)
    dominated = Front(grid, np.linspace(0.1, 1, 136)[:, None] * np.ones(16), names, names)
    assert dominated.hypervolume(0.0) == pytest.approx(1)
    assert front.hypervolume(2.0) == 0
    with pytest.raises(ValueError, match="got samples=1"):
        front.hypervolume_estimate(0.0, samples=1)
