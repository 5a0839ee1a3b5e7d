"""Choosing a point of a front, against plain loops and plane geometry."""

from __future__ import annotations

import numpy as np
import pytest

from paretofuse.fronts.front import Front

NAMES = ("news", "poems", "code")


def random_front(seed: int, metrics: int = 2, points: int = 9) -> Front:
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.ones(metrics), points)
    directions = tuple(bool(flag) for flag in rng.integers(0, 2, metrics))
    return Front(shares, rng.normal(0, 10, (points, metrics)), NAMES[:metrics], NAMES[:metrics], directions)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("metrics", [2, 3])
def test_best_and_bounds_as_a_plain_loop_finds_them(seed: int, metrics: int) -> None:
    front = random_front(seed, metrics)
    rng = np.random.default_rng(seed + 100)
    limits = {name: float(v) for name, v in zip(front.metrics, rng.choice(front.values, 1)[0], strict=True)}
    at_most, at_least = {"news": limits["news"]}, {"poems": limits["poems"]}
    for name, larger in zip(front.metrics, front.directions, strict=True):
        column = front.metrics.index(name)
        expected = (max if larger else min)(row[column] for row in front.values.tolist())
        assert front.best(name).values[name] == expected
        inside = [
            row for row in front.values.tolist() if row[0] <= at_most["news"] and row[1] >= at_least["poems"]
        ]
        chosen = front.choose(at_most=at_most, at_least=at_least, best=name)
        assert chosen.values[name] == (max if larger else min)(row[column] for row in inside)
        row = front.values.tolist().index(list(chosen.values.values()))
        assert list(chosen.preference.values()) == front.preferences[row].tolist()
        assert list(chosen.preference) == list(front.objectives)


@pytest.mark.parametrize("seed", range(12))
def test_knee_is_farthest_beyond_the_line_between_the_ends(seed: int) -> None:
    front = random_front(seed, points=15)
    kept = front.filtered()
    goods = kept.values * np.where(front.directions, 1.0, -1.0)
    scaled = (goods - goods.min(0)) / np.where(np.ptp(goods, axis=0) > 0, np.ptp(goods, axis=0), 1)
    first, last = scaled[scaled[:, 0].argmin()], scaled[scaled[:, 0].argmax()]
    (x1, y1), (x2, y2) = first, last
    beyond = [
        (x2 - x1) * (y - y1) - (y2 - y1) * (x - x1) for x, y in scaled
    ]  # twice the triangle's area, signed
    assert list(front.knee().values.values()) == kept.values[int(np.argmax(beyond))].tolist()


def test_knee_within_bounds_and_on_a_flat_metric() -> None:
    shares = np.linspace(0, 1, 5)
    values = np.column_stack([shares, 1 - shares**4])
    front = Front(np.column_stack([shares, 1 - shares]), values, NAMES[:2], NAMES[:2])
    assert front.knee().values["news"] == 0.5  # sums 1, 1.25 - 1/256, 1.5 - 1/16, 1.75 - 81/256, 1
    assert front.choose(at_most={"news": 0.5}).values["news"] == 0.25  # scaled anew: sums 1, 0.5 + 15/16, 1
    flat = Front(front.preferences, np.column_stack([shares, np.ones(5)]), NAMES[:2], NAMES[:2])
    assert flat.knee().values == {"news": 1.0, "poems": 1.0}


def test_of_equally_good_points_the_undominated_one() -> None:
    shares = np.eye(3)[:, :2] + [[0, 0], [0, 0], [0.5, 0.5]]
    front = Front(shares, np.array([[1.0, 0.0], [1.0, 2.0], [0.0, 3.0]]), NAMES[:2], NAMES[:2])
    assert front.best("news").values == {"news": 1.0, "poems": 2.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"best": "prose"}, r"got metric 'prose', expected one of \['news', 'poems'\]"),
        ({"at_most": {"prose": 1}}, "got metric 'prose'"),
        ({"at_most": {"news": -1}}, r"at_most=\{'news': -1\}, but no point .* \(lowest 0\)"),
        ({"at_least": {"poems": 9}}, r"at_least=\{'poems': 9\}, but no point .* \(highest 1\)"),
        ({"at_least": {"news": 1, "poems": 1}}, "news >= 1, poems >= 1, and no point of the front keeps all"),
        ({"at_most": {"news": float("nan")}}, "expected a finite number"),
    ],
)
def test_what_cannot_be_chosen(arguments: dict[str, object], message: str) -> None:
    front = Front(np.eye(2), np.eye(2), NAMES[:2], NAMES[:2])
    with pytest.raises(ValueError, match=message):
        front.choose(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("bounds", [5, ["news"], {"news": "few"}, {"news": None}])
def test_bounds_that_are_no_numbers_by_name(bounds: object) -> None:
    front = Front(np.eye(2), np.eye(2), NAMES[:2], NAMES[:2])
    with pytest.raises(TypeError, match=r"got at_most=.*, expected a"):
        front.choose(at_most=bounds)  # type: ignore[arg-type]
