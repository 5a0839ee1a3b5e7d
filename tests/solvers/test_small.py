"""The two small programs: the shortest vector in a hull, and a linear program on the simplex."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paretofuse.engine.solvers.small import maximize_on_simplex, shortest_in_hull


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 16), size=st.integers(1, 20), seed=st.integers(0, 10**6), twins=st.booleans())
def test_shortest_vector_meets_its_kkt_conditions(count: int, size: int, seed: int, twins: bool) -> None:
    vectors = np.random.default_rng(seed).normal(size=(count, size)) + 0.3
    if twins:
        vectors[-1], vectors[count // 2] = vectors[0], -vectors[0]
    gram = vectors @ vectors.T
    beta = shortest_in_hull(gram)
    product, length = gram @ beta, beta @ gram @ beta
    assert beta.sum() == pytest.approx(1)
    assert (beta >= 0).all()
    tolerance = 1e-8 * max(1.0, gram.max())
    assert (product >= length - tolerance).all()  # no vector lies nearer to 0 along the solution
    assert abs(beta * (product - length)).max() <= tolerance  # only the nearest take part


def test_shortest_vector_of_unequal_lengths() -> None:
    beta = shortest_in_hull(np.diag([1.0, 1e8]))
    assert beta[0] / beta[1] == pytest.approx(1e8)
    beta = shortest_in_hull(np.diag([1.0, 1e6, 1e6]))
    np.testing.assert_allclose(beta, np.array([1, 1e-6, 1e-6]) / (1 + 2e-6), rtol=1e-6)
    np.testing.assert_allclose(shortest_in_hull(np.zeros((3, 3))), 1 / 3)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 16])
def test_linear_program_against_highs(count: int) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(count)
    infeasible = 0
    for trial in range(40):
        vectors = rng.normal(size=(count, rng.integers(1, 20)))
        if trial % 3 == 0 and count > 1:
            vectors[1] = -vectors[0]  # degenerate: descent of one is ascent of the other
        gram = vectors @ vectors.T
        gain = gram @ rng.normal(size=count)
        bound = np.where(gain > 0, -np.inf, gain) + (0.5 * gram.max() if trial % 5 == 4 else 0.0)
        bound[rng.integers(count)] = 0.0
        kept = np.isfinite(bound)
        truth = optimize.linprog(
            -gain, A_ub=-gram[kept], b_ub=-bound[kept], A_eq=np.ones((1, count)), b_eq=[1], method="highs"
        )
        beta = maximize_on_simplex(gain, gram, bound)
        if beta is None:
            infeasible += 1
            assert truth.status == 2
            continue
        assert truth.status == 0
        assert beta.sum() == pytest.approx(1)
        assert (beta >= 0).all()
        scale = gram.max()
        assert (gram[kept] @ beta >= bound[kept] - 1e-7 * scale).all()
        assert gain @ beta == pytest.approx(-truth.fun, abs=1e-7 * max(scale, abs(gain).max()))
    assert infeasible < 20
