"""Sampling preferences: where on the simplex training looks, and grids for many objectives. Needs no torch.

A sampler is an endless, seeded stream. Its state is a small JSON-ready dict, so that a checkpoint resumes it exactly;
streams do not depend on how many are drawn at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from paretofuse.engine.routing.preference import simplex_grid

SamplerName = Literal["dirichlet", "low_discrepancy"]


class Sampler(Protocol):
    """A stream of preferences."""

    def draw(self, count: int) -> np.ndarray:
        """The next preferences: [count, E] float64, each >= 0 with sum 1."""

    def state(self) -> dict[str, Any]:
        """Where the stream stands, as plain numbers, strings and dicts."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of a sampler that was made alike."""


def make_sampler(
    name: SamplerName,
    objectives: int,
    seed: int,
    *,
    alpha: float = 1.0,
    corner_every: int = 0,
) -> Sampler:
    """A sampler by name.

    Args:
        name: "dirichlet" draws each preference by itself. "low_discrepancy" is a shifted additive recurrence, which
            fills the simplex evenly from the start.
        objectives: E >= 1.
        seed: of the stream.
        alpha: concentration of the Dirichlet distribution; 1 is uniform over the simplex, below 1 favours corners.
            Only for "dirichlet".
        corner_every: every so manyth preference is all weight on one objective, each objective in turn; 0 for none.

    Raises:
        ValueError: an unknown name, or a number out of range.
    """
    if objectives < 1:
        raise ValueError(f"got {objectives} objectives, expected at least 1")
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"got seed={seed!r}, expected a whole number from 0 on")
    if not 0 < alpha < float("inf"):
        raise ValueError(f"got alpha={alpha}, expected a number > 0; 1 is uniform over the simplex")
    if corner_every < 0 or corner_every == 1:
        raise ValueError(f"got corner_every={corner_every}, expected 0 (none) or at least 2")
    if alpha != 1 and name == "low_discrepancy":
        raise ValueError(f'got alpha={alpha} for {name!r}, expected 1; other values need "dirichlet"')
    makers: dict[str, Callable[[], Sampler]] = {
        "dirichlet": lambda: _Dirichlet(objectives, alpha, seed),
        "low_discrepancy": lambda: _Recurrence(objectives, seed),
    }
    if not isinstance(name, str) or name not in makers:
        raise ValueError(f"got sampler {name!r}, expected one of {sorted(makers)}")
    sampler = makers[name]()
    return _Anchored(sampler, objectives, corner_every) if corner_every else sampler


def layered_grid(objectives: int, points: Sequence[int]) -> np.ndarray:
    """Nested Das-Dennis grids: few preferences, yet some inside the simplex, where one coarse grid has corners only.

    The field calls them reference directions. Layer k of K is simplex_grid(objectives, points[k]), shrunk toward the
    equal preference by 1 - k / K; with K = 2 the inner layer has half the size, as in Deb and Jain, "An evolutionary
    many-objective optimization algorithm using reference-point-based nondominated sorting approach, part I", 2014.

    Args:
        objectives: E >= 1.
        points: points along an edge of each layer, from the outermost in.

    Returns:
        float64 [P, E], repeats removed, in the order of the layers.

    Raises:
        ValueError: no layers, or a layer that simplex_grid refuses.
    """
    if not points:
        raise ValueError("got no layers, expected the points along an edge of each, such as (3, 2)")
    layers = []
    for depth, count in enumerate(points):
        size = 1 - depth / len(points)
        layers.append(size * simplex_grid(objectives, count) + (1 - size) / objectives)
    grid = np.concatenate(layers)
    _, first = np.unique(grid.round(12), axis=0, return_index=True)
    return grid[np.sort(first)]


def sample_preferences(
    objectives: int,
    count: int,
    sampler: SamplerName = "low_discrepancy",
    *,
    seed: int = 0,
    alpha: float = 1.0,
) -> np.ndarray:
    """Preferences for a sweep of many objectives, where grids explode.

    Args:
        objectives: E >= 1.
        count: how many, P.
        sampler: "low_discrepancy" fills the simplex evenly; "dirichlet" draws.
        seed: of the draws.
        alpha: concentration for "dirichlet"; below 1 favours corners.

    Returns:
        float64 [P, E], each row >= 0 with sum 1.

    Raises:
        ValueError: an unknown sampler, or a number out of range.
    """
    drawn = make_sampler(sampler, objectives, seed, alpha=alpha).draw(count)
    return np.asarray(drawn / drawn.sum(axis=1, keepdims=True))


def to_simplex(cube: np.ndarray) -> np.ndarray:
    """Map the unit cube onto the simplex so that uniform stays uniform: sticks broken off one after the other.

    Args:
        cube: [P, E - 1] in [0, 1].

    Returns:
        [P, E] float64. Share e is the fraction 1 - (1 - u_e)^(1 / (E - 1 - e)) of what the shares before it left
        (a Beta(1, E - 1 - e) variable: Devroye, "Non-uniform random variate generation", 1986, XI.4).
    """
    count, left = len(cube), np.ones(len(cube))
    objectives = cube.shape[1] + 1
    shares = np.empty((count, objectives))
    for e in range(objectives - 1):
        shares[:, e] = left * (1 - (1 - cube[:, e]) ** (1 / (objectives - 1 - e)))
        left = left - shares[:, e]
    shares[:, -1] = left
    return np.asarray(np.maximum(shares, 0.0))


class _Dirichlet:
    """Independent draws; the state is the generator's."""

    def __init__(self, objectives: int, alpha: float, seed: int) -> None:
        self._alpha = [alpha] * objectives
        self._rng = np.random.default_rng(seed)

    def draw(self, count: int) -> np.ndarray:
        return self._rng.dirichlet(self._alpha, size=_checked(count))

    def state(self) -> dict[str, Any]:
        return {"generator": copy.deepcopy(dict(self._rng.bit_generator.state))}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._rng.bit_generator.state = copy.deepcopy(dict(state["generator"]))


class _Recurrence:
    """Kronecker's sequence frac(shift + n a), with powers of the generalized golden ratio for a (Roberts, 2018)."""

    def __init__(self, objectives: int, seed: int) -> None:
        ratio = 2.0
        for _ in range(60):  # converges to the root of x^E = x + 1, for the E - 1 dimensions of the cube
            ratio = (1 + ratio) ** (1 / objectives)
        self._step = ratio ** -np.arange(1.0, objectives)
        self._shift = np.random.default_rng(seed).random(objectives - 1)
        self._drawn = 0

    def draw(self, count: int) -> np.ndarray:
        index = np.arange(self._drawn, self._drawn + _checked(count))
        self._drawn += count
        return to_simplex((self._shift + index[:, None] * self._step) % 1.0)

    def state(self) -> dict[str, Any]:
        return {"drawn": self._drawn}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._drawn = int(state["drawn"])


class _Anchored:
    """Another stream with a corner of the simplex in every so manyth place."""

    def __init__(self, inner: Sampler, objectives: int, every: int) -> None:
        self._inner, self._objectives, self._every, self._drawn = inner, objectives, every, 0

    def draw(self, count: int) -> np.ndarray:
        rows = []
        for index in range(self._drawn, self._drawn + _checked(count)):
            if index % self._every == self._every - 1:
                rows.append(np.eye(self._objectives)[index // self._every % self._objectives])
            else:
                rows.append(self._inner.draw(1)[0])
        self._drawn += count
        return np.stack(rows)

    def state(self) -> dict[str, Any]:
        return {"drawn": self._drawn, "inner": self._inner.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._drawn = int(state["drawn"])
        self._inner.restore(state["inner"])


def _checked(count: int) -> int:
    if count < 1:
        raise ValueError(f"got a draw of {count} preferences, expected at least 1")
    return count
