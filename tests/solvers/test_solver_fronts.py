"""Further known fronts: ZDT1's convex shape without its box; and solvers without a preference on concave ones."""

from __future__ import annotations

import numpy as np
import pytest

from paretofuse.engine.solvers import get_solver
from paretofuse.engine.solvers.small import shortest_in_hull
from tests.support.problems import concave, descend, fonseca


def convex(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """f_2 = g (1 - sqrt(f_1 / g)) with f_1 in (0, 1) (Zitzler, Deb and Thiele, 2000); Pareto set g = 1."""
    u = 1 / (1 + np.exp(-x[0]))
    g = 1 + (x[1:] ** 2).sum()
    root = np.sqrt(u / g)
    along = np.append(u * (1 - u), np.zeros(len(x) - 1))
    across = np.append(0.0, 2 * x[1:])
    # f_2 = g - sqrt(u g)
    return np.array([u, g * (1 - root)]), np.stack([along, across * (1 - root / 2) - along / (2 * root)])


START = np.array([0.3, 0.8, -0.6])


def test_the_problems_gradient() -> None:
    _, gradients = convex(START)
    for axis in range(3):
        step = 1e-6 * np.eye(3)[axis]
        difference = (convex(START + step)[0] - convex(START - step)[0]) / 2e-6
        np.testing.assert_allclose(gradients[:, axis], difference, atol=1e-8)


@pytest.mark.parametrize("name", ["ls", "epo", "tchebycheff", "stch", "cosmos"])
@pytest.mark.parametrize("first", [0.4, 0.7])
def test_preferences_land_where_the_convex_front_says(name: str, first: float) -> None:
    preference = np.array([first, 1 - first])
    options = {"stch": {"smoothing": 0.01}, "cosmos": {"strength": 0.0}}.get(name)
    _, losses, gradients = descend(convex, get_solver(name, options), preference, START, 1200, rate=1.0)
    assert losses[1] == pytest.approx(1 - np.sqrt(losses[0]), abs=0.01)  # on the front
    if name in ("ls", "cosmos"):  # r_1 = r_2 / (2 sqrt f_1), if that lies within (0, 1)
        expected = ((1 - first) / (2 * first)) ** 2
        assert losses[0] == pytest.approx(expected, abs=0.02)
        assert np.linalg.norm(preference @ gradients) < 0.02
    else:  # r_1 f_1 = r_2 f_2
        terms = preference * losses
        assert terms.max() / terms.min() < (1.15 if name == "stch" else 1.05)


# Not MGDA on "concave": f_1's gradient vanishes at the end of its sigmoid, where MGDA stops, as it should.
@pytest.mark.parametrize(
    ("name", "problem"),
    [("mgda", fonseca), ("torchjd", fonseca), ("torchjd", concave)],
    ids=["mgda", "torchjd", "torchjd, concave"],
)
def test_descent_of_all_losses_ends_on_concave_fronts(name: str, problem: object) -> None:
    """Each loss falls, and where it ends no direction lowers both: 0 lies in the hull of the gradients."""
    options = None
    if name == "torchjd":
        pytest.importorskip("torchjd.aggregation")
        pytest.importorskip("quadprog")
        options = {"aggregator": "UPGrad", "preference": "ignore"}
    start = START[:2] if problem is fonseca else START
    first, _ = problem(start)  # type: ignore[operator]
    x, losses, gradients = descend(
        problem,  # type: ignore[arg-type]
        get_solver(name, options),
        np.array([0.5, 0.5]),
        start,
        steps=250 if name == "torchjd" else 2000,
        rate=1.0,
    )
    assert (losses < first + 1e-9).all()
    if problem is fonseca:
        assert abs(x[0] - x[1]) < 0.02
        assert abs(x).max() <= 1 / np.sqrt(2) + 0.02
    else:
        assert losses[1] == pytest.approx(1 - losses[0] ** 2, abs=0.01)
    beta = shortest_in_hull(gradients @ gradients.T)
    assert np.linalg.norm(beta @ gradients) < 0.02
