"""Where to evaluate next: predictions against dense linear algebra, and growth against what a grid finds."""

from __future__ import annotations

import moocore
import numpy as np
import pytest

import paretofuse as pf
from paretofuse.engine.evaluation.growth import (
    Process,
    _gain,
    box_candidates,
    next_point,
    simplex_candidates,
)

NOBODY = np.zeros((0, 3))


def bent(preferences: np.ndarray) -> np.ndarray:
    """[P, 3], larger is better: a front that lies mostly near one corner."""
    turned = np.atleast_2d(preferences) ** np.array([0.3, 1.0, 2.0])
    return np.asarray(turned / np.linalg.norm(turned, axis=1, keepdims=True))


def found(budget: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    preferences = np.vstack([np.eye(3), np.full(3, 1 / 3)])
    while len(preferences) < budget:
        chosen = next_point(
            preferences, bent(preferences), NOBODY, simplex_candidates, ref=[0, 0, 0], rng=rng
        )
        assert chosen.shape == (3,)
        assert chosen.min() >= 0
        assert chosen.sum() == pytest.approx(1, abs=1e-12)
        preferences = np.vstack([preferences, chosen])
    return preferences


def volume(values: np.ndarray) -> float:
    return float(moocore.hypervolume(values, ref=[0, 0, 0], maximise=True))


@pytest.mark.parametrize("seed", [0, 1])
def test_fewer_points_than_a_grid_for_more_hypervolume(seed: int) -> None:
    grid = np.asarray(pf.simplex_grid(3, 6))
    assert volume(bent(found(len(grid), seed))) > volume(bent(grid))


def test_a_process_is_exact_where_it_knows_and_unsure_far_away() -> None:
    rng = np.random.default_rng(0)
    known = rng.dirichlet(np.ones(2), 9) * [0.5, 0.5] + [0.5, 0.0]  # one half of the simplex
    known[:, 1] = 1 - known[:, 0]
    values = np.sin(3 * known[:, 0])
    process = Process(known, values)
    mean, error = process.predict(known)
    np.testing.assert_allclose(mean, values, atol=2e-2)
    assert error.max() < 0.05 * values.std() + 1e-3
    far = process.predict(np.array([[0.0, 1.0]]))[1]
    assert far > 3 * error.max()
    constant = Process(known, np.full(9, 2.5))
    np.testing.assert_allclose(constant.predict(known)[0], 2.5)


def test_gain_is_the_difference_of_two_hypervolumes() -> None:
    rng = np.random.default_rng(1)
    floor = np.full(3, -0.1)
    for _ in range(30):
        values, point = rng.random((rng.integers(1, 9), 3)), rng.random(3)
        whole = moocore.hypervolume(np.vstack([values, point]), ref=floor, maximise=True)
        expected = whole - moocore.hypervolume(values, ref=floor, maximise=True)
        assert _gain(values, point, floor) == pytest.approx(expected, abs=1e-12)
    assert _gain(np.zeros((0, 3)), np.ones(3), np.zeros(3)) == 1
    assert _gain(np.zeros((0, 3)), np.array([1.0, 0.0, 1.0]), np.zeros(3)) == 0


def test_two_processes_do_not_go_to_the_same_place() -> None:
    preferences = np.vstack([np.eye(3), np.full(3, 1 / 3)])
    first = next_point(
        preferences, bent(preferences), NOBODY, simplex_candidates, rng=np.random.default_rng(0)
    )
    second = next_point(
        preferences, bent(preferences), first[None], simplex_candidates, rng=np.random.default_rng(0)
    )
    assert np.abs(first - second).max() > 0.02


def test_bounds_are_kept_to_where_that_is_possible_and_come_near_where_not() -> None:
    preferences = np.asarray(pf.simplex_grid(3, 4))
    values = bent(preferences)
    bounds = np.array([-np.inf, -np.inf, 0.6])
    rng = np.random.default_rng(0)
    for _ in range(6):
        chosen = next_point(preferences, values, NOBODY, simplex_candidates, bounds=bounds, rng=rng)
        assert bent(chosen)[0, 2] > 0.5
        preferences, values = np.vstack([preferences, chosen]), np.vstack([values, bent(chosen)])
    impossible = np.array([-np.inf, -np.inf, 5.0])
    chosen = next_point(preferences, values, NOBODY, simplex_candidates, bounds=impossible, rng=rng)
    assert chosen.shape == (3,)


def test_a_flat_front_is_searched_all_over() -> None:
    """Where no candidate promises anything the least known place is next."""
    preferences = np.vstack([np.eye(3)])
    values = np.ones((3, 2))
    chosen = next_point(
        preferences, values, NOBODY, simplex_candidates, ref=[2, 2], rng=np.random.default_rng(0)
    )
    assert chosen.max() < 0.7


def tops(points: np.ndarray) -> np.ndarray:
    """[P, 2], larger is better: two tops in the unit box, apart in each of its dimensions."""
    points = np.atleast_2d(points)
    return np.stack([1 - np.square(points - top).mean(axis=1) for top in (0.2, 0.7)], axis=1)


@pytest.mark.parametrize("dimensions", [1, 6])
def test_in_a_box_it_finds_more_than_chance(dimensions: int) -> None:
    rng = np.random.default_rng(0)
    points = rng.random((4, dimensions))
    while len(points) < 24:
        chosen = next_point(
            points, tops(points), np.zeros((0, dimensions)), box_candidates, ref=[0.5, 0.5], rng=rng
        )
        assert chosen.shape == (dimensions,)
        assert 0 <= chosen.min() <= chosen.max() <= 1
        points = np.vstack([points, chosen])
    chance = tops(np.random.default_rng(1).random((24, dimensions)))
    found, drawn = (
        float(moocore.hypervolume(values, ref=[0.5, 0.5], maximise=True)) for values in (tops(points), chance)
    )
    assert found > drawn
    assert len(np.unique(points, axis=0)) == 24
