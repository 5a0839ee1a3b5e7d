"""Samplers: on the simplex, seeded, resumable at any place, and as even as they claim; layered grids."""

from __future__ import annotations

import json
from math import comb

import numpy as np
import pytest

from paretofuse.engine.routing.preference import simplex_grid
from paretofuse.engine.routing.sampling import (
    layered_grid,
    make_sampler,
    sample_preferences,
    to_simplex,
)

NAMES = ["dirichlet", "low_discrepancy"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("objectives", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("corner_every", [0, 4])
def test_streams_are_on_the_simplex_seeded_and_independent_of_the_batch(
    name: str, objectives: int, corner_every: int
) -> None:
    def new(seed: int = 5) -> np.ndarray:
        return make_sampler(name, objectives, seed, corner_every=corner_every)  # type: ignore[arg-type,return-value]

    whole = new().draw(50)
    assert whole.shape == (50, objectives)
    assert (whole >= 0).all()
    np.testing.assert_allclose(whole.sum(axis=1), 1, atol=1e-12)
    pieces = new()
    np.testing.assert_array_equal(np.concatenate([pieces.draw(n) for n in (1, 6, 13, 30)]), whole)
    if objectives > 1:
        assert not np.array_equal(new(6).draw(50), whole)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("corner_every", [0, 3])
@pytest.mark.parametrize("drawn", [0, 1, 7, 8, 23])
def test_a_stream_resumes_exactly_from_its_json(name: str, corner_every: int, drawn: int) -> None:
    first = make_sampler(name, 3, 1, corner_every=corner_every)  # type: ignore[arg-type]
    if drawn:
        first.draw(drawn)
    state = json.loads(json.dumps(first.state()))
    rest = first.draw(20)
    second = make_sampler(name, 3, 1, corner_every=corner_every)  # type: ignore[arg-type]
    second.draw(5)
    second.restore(state)
    np.testing.assert_array_equal(second.draw(20), rest)


def discrepancy(sample: np.ndarray) -> float:
    """Largest gap between the sample's and the exact distribution function of a uniform first share (E = 2)."""
    u = np.sort(sample[:, 0])
    n = len(u)
    return float(max((np.arange(1, n + 1) / n - u).max(), (u - np.arange(n) / n).max()))


def test_low_discrepancy_is_more_even_than_chance() -> None:
    def median(name: str) -> float:
        return float(np.median([discrepancy(make_sampler(name, 2, seed).draw(64)) for seed in range(9)]))  # type: ignore[arg-type]

    chance = median("dirichlet")
    assert median("low_discrepancy") < 0.4 * chance


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("objectives", [3, 16])
def test_moments_are_those_of_the_uniform_simplex(name: str, objectives: int) -> None:
    drawn = make_sampler(name, objectives, 2).draw(8192)  # type: ignore[arg-type]
    sd = np.sqrt((objectives - 1) / (objectives**2 * (objectives + 1)))  # of one share
    np.testing.assert_allclose(drawn.mean(axis=0), 1 / objectives, atol=5 * sd / np.sqrt(8192))
    np.testing.assert_allclose(drawn.std(axis=0), sd, rtol=0.06)


def test_to_simplex_maps_corners_to_corners() -> None:
    np.testing.assert_allclose(
        to_simplex(np.array([[1.0, 0.3], [0.0, 1.0], [0.0, 0.0]])), np.eye(3), atol=1e-15
    )


def test_alpha_moves_the_dirichlet_toward_corners() -> None:
    sharp = make_sampler("dirichlet", 3, 0, alpha=0.2).draw(500).max(axis=1).mean()
    flat = make_sampler("dirichlet", 3, 0, alpha=5).draw(500).max(axis=1).mean()
    assert sharp > 0.75 > 0.6 > flat


def test_corners_come_in_turn() -> None:
    drawn = make_sampler("dirichlet", 3, 0, corner_every=4).draw(24)
    np.testing.assert_array_equal(drawn[3::4], np.eye(3)[[0, 1, 2, 0, 1, 2]])
    others = np.delete(drawn, np.s_[3::4], axis=0)
    np.testing.assert_array_equal(others, make_sampler("dirichlet", 3, 0).draw(18))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "sobol"}, "got sampler 'sobol'"),
        ({"objectives": 0}, "got 0 objectives"),
        ({"alpha": 0.0}, "got alpha=0.0"),
        ({"name": "antithetic"}, "got sampler 'antithetic'"),
        ({"alpha": 2.0, "name": "low_discrepancy"}, "got alpha=2.0 for 'low_discrepancy'"),
        ({"alpha": float("nan")}, "got alpha=nan"),
        ({"corner_every": -1}, "corner_every=-1"),
        ({"corner_every": 1}, "corner_every=1"),
        ({"seed": -1}, "got seed=-1, expected a whole number"),
        ({"seed": 1.5}, "got seed=1.5, expected a whole number"),
        ({"seed": True, "name": "low_discrepancy"}, "got seed=True, expected a whole number"),
    ],
)
def test_bad_samplers(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_sampler(**{"name": "dirichlet", "objectives": 2, "seed": 0, **change})  # type: ignore[arg-type]


def test_drawing_nothing_is_an_error() -> None:
    for name in NAMES:
        with pytest.raises(ValueError, match="got a draw of 0"):
            make_sampler(name, 2, 0).draw(0)  # type: ignore[arg-type]


def test_layers_nest() -> None:
    np.testing.assert_array_equal(layered_grid(3, [4]), simplex_grid(3, 4))
    grid = layered_grid(8, (3, 2))
    assert len(grid) == comb(9, 2) + 8
    np.testing.assert_allclose(grid.sum(axis=1), 1)
    np.testing.assert_allclose(np.sort(grid[-1]), [1 / 16] * 7 + [9 / 16])
    assert (grid[comb(9, 2) :] > 0).all()  # the inner layer lies inside
    with_repeats = layered_grid(2, (3, 3))  # both layers hold the centre
    assert len(with_repeats) == 5
    with pytest.raises(ValueError, match="no layers"):
        layered_grid(3, [])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("objectives", [1, 2, 16])
def test_preferences_to_sweep(name: str, objectives: int) -> None:
    drawn = sample_preferences(objectives, 23, name, seed=3)  # type: ignore[arg-type]
    assert drawn.shape == (23, objectives)
    assert (drawn >= 0).all()
    np.testing.assert_allclose(drawn.sum(axis=1), 1, atol=1e-12)
    np.testing.assert_array_equal(sample_preferences(objectives, 23, name, seed=3), drawn)  # type: ignore[arg-type]
    first = make_sampler(name, objectives, 0).draw(23)  # type: ignore[arg-type]
    np.testing.assert_allclose(sample_preferences(objectives, 23, name), first, atol=1e-15)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected at least 1"):
        sample_preferences(objectives, 0, name)  # type: ignore[arg-type]


def test_alpha_of_either_side_needs_dirichlet() -> None:
    for alpha in (0.5, 2.0):
        with pytest.raises(ValueError, match=f"got alpha={alpha} for 'low_discrepancy'"):
            make_sampler("low_discrepancy", 2, 0, alpha=alpha)


def test_the_sequence_begins_at_its_first_point() -> None:
    """Its place in a checkpoint counts from 0."""
    sampler = make_sampler("low_discrepancy", 3, 0)
    assert sampler.state() == {"drawn": 0}
    sampler.draw(5)
    assert sampler.state() == {"drawn": 5}
