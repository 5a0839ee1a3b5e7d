"""Preferences: what is accepted, what is refused in which words; grids against an enumeration."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paretofuse.engine.routing.preference import as_preference, simplex_grid

NAMES = ("cola", "sst2", "mrpc")


@pytest.mark.parametrize(
    "given_preference",
    [
        {"cola": 0.5, "sst2": 0.25, "mrpc": 0.25},
        {"mrpc": 0.25, "cola": 0.5, "sst2": 0.25},
        [0.5, 0.25, 0.25],
        (0.5, 0.25, 0.25),
        np.array([0.5, 0.25, 0.25]),
        torch.tensor([0.5, 0.25, 0.25]),
        torch.tensor([0.5, 0.25, 0.25], dtype=torch.bfloat16),
        torch.tensor([0.5, 0.25, 0.25], requires_grad=True),
        [np.float32(0.5), torch.tensor(0.25), 0.25],
    ],
)
def test_accepted_forms(given_preference: object) -> None:
    result = as_preference(given_preference, NAMES)  # type: ignore[arg-type]
    assert result.dtype == np.float64
    np.testing.assert_array_equal(result, [0.5, 0.25, 0.25])


def test_dict_may_leave_out_zeros() -> None:
    np.testing.assert_array_equal(as_preference({"sst2": 1}, NAMES), [0, 1, 0])


def test_float32_rounding_is_accepted_and_kept() -> None:
    thirds = np.full(3, 1 / 3, dtype=np.float32)
    np.testing.assert_array_equal(as_preference(thirds, NAMES), thirds.astype(np.float64))
    many = np.full(1000, 1e-3, dtype=np.float32)
    assert as_preference(many, [str(i) for i in range(1000)]).shape == (1000,)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"cola": 0.5, "sts2": 0.5}, ["'sts2'", "'sst2'", "correct the name"]),
        ({"cola": 0.5}, ["sum 0.5", "'sst2', 'mrpc'", "[1, 0, 0]"]),
        ({}, ["sum 0", "'cola', 'sst2', 'mrpc'"]),
        ([0.5, 0.5], ["2 numbers", "expected 3", "'mrpc'"]),
        ([], ["0 numbers"]),
        ([2, 1, 1], ["sum 4", "divide by the sum: [0.5, 0.25, 0.25]"]),
        ([0, 0, 0], ["sum 0", "[0.333333, 0.333333, 0.333333]"]),
        ([1.5, -0.5, 0], ["-0.5", "'sst2'", ">= 0"]),
        ([math.nan, 0.5, 0.5], ["nan", "'cola'"]),
        ([0, 0, math.inf], ["inf", "'mrpc'"]),
        ([0.5, 0.25, 0.2501], ["sum 1.0001"]),
    ],
)
def test_refused_values(bad: object, words: list[str]) -> None:
    with pytest.raises(ValueError, match="got ") as caught:
        as_preference(bad, NAMES)  # type: ignore[arg-type]
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "bad",
    [
        "cola", b"abc", 1.0, None, {0.5, 0.3}, torch.tensor(1.0), np.float64(1.0),
        [[1.0], [0.0], [0.0]], ["1", "0", "0"], [True, False, False], [None, 0.5, 0.5],
        torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]), {"cola": "1"}, {"cola": [1.0]},
    torch.zeros(3, device="meta"),
    ],
)  # fmt: skip
def test_refused_types(bad: object) -> None:
    with pytest.raises(TypeError, match=r"got .*expected"):
        as_preference(bad, NAMES)  # type: ignore[arg-type]


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=9).filter(lambda values: sum(values) > 1e-3))
def test_dividing_by_the_sum_is_always_accepted(values: list[float]) -> None:
    array = np.array(values)
    names = [f"objective {i}" for i in range(len(values))]
    for dtype in (np.float64, np.float32):
        shares = (array / array.sum()).astype(dtype)
        np.testing.assert_array_equal(as_preference(shares, names), shares.astype(np.float64))


def test_grid_of_two_objectives() -> None:
    grid = simplex_grid(2, 11)
    assert grid.dtype == np.float64
    np.testing.assert_allclose(grid, [[1 - i / 10, i / 10] for i in range(11)], rtol=0, atol=1e-15)


@pytest.mark.parametrize(("objectives", "points"), [(1, 2), (1, 5), (2, 2), (3, 2), (3, 7), (4, 4), (5, 3)])
def test_grid_is_every_multiple_once(objectives: int, points: int) -> None:
    grid = simplex_grid(objectives, points)
    steps = points - 1
    expected = [row for row in product(range(points), repeat=objectives) if sum(row) == steps]
    np.testing.assert_allclose(grid, np.array(sorted(expected, reverse=True)) / steps, rtol=0, atol=1e-15)
    for row in grid:
        as_preference(row, [str(i) for i in range(objectives)])


@pytest.mark.parametrize(("objectives", "points"), [(0, 5), (-1, 5), (2, 1), (2, 0), (60, 60)])
def test_grid_refuses(objectives: int, points: int) -> None:
    with pytest.raises(ValueError, match=r"got .*expected"):
        simplex_grid(objectives, points)


@pytest.mark.parametrize(("objectives", "points"), [(2.0, 5), ("2", 5), (2, None)])
def test_grid_refuses_types(objectives: int, points: int) -> None:
    with pytest.raises(TypeError, match="integers"):
        simplex_grid(objectives, points)
