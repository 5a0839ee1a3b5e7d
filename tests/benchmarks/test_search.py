"""What few points can reach at most: beside every choice there is."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from benchmarks.speed.search import best_of, bound, gains, volume


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [1, 3, 9])
def test_the_best_lies_between_what_is_found_and_the_bound(seed: int, count: int) -> None:
    values = np.random.default_rng(seed).random((9, 3))
    best = max(volume(values[list(chosen)]) for chosen in combinations(range(9), count))
    chosen = best_of(values, count)
    assert len(set(chosen)) == count or count == 9  # points that add nothing are all alike
    assert volume(values[chosen]) == pytest.approx(best, rel=0.01)
    assert best <= bound(values, count) + 1e-12 <= volume(values) + 2e-12


def test_gains_are_what_each_point_adds() -> None:
    values = np.array([[0.5, 0.5], [1.0, 0.25], [0.25, 0.25]])
    np.testing.assert_allclose(gains(values, []), [0.25, 0.25, 0.0625])
    np.testing.assert_allclose(gains(values, [0]), [0, 0.125, 0])
