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

SamplerName = Literal["dirichlet", "antithetic", "stratified", "low_discrepancy"]


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
    strata: int = 32,
    corner_every: int = 0,
) -> Sampler:
    """A sampler by name.

    Args:
        name: "dirichlet" draws each preference by itself. "antithetic" follows each Dirichlet draw by its E - 1
            cyclic shifts, so that every objective gets the same weight in each E draws (for E = 2: r, then 1 - r).
            "stratified" draws Latin hypercubes of `strata` preferences, each one in its own slice.
            "low_discrepancy" is a shifted additive recurrence, which fills the simplex evenly from the start.
        objectives: E >= 1.
        seed: of the stream.
        alpha: concentration of the Dirichlet distribution; 1 is uniform over the simplex, below 1 favours corners.
            Only for "dirichlet" and "antithetic".
        strata: size of a Latin hypercube; only for "stratified".
        corner_every: every so manyth preference is all weight on one objective, each objective in turn; 0 for none.

    Raises:
        ValueError: an unknown name, or a number out of range.
    """
    if objectives < 1:
        raise ValueError(f"got {objectives} objectives, expected at least 1")
    if not 0 < alpha < float("inf"):
        raise ValueError(f"got alpha={alpha}, expected a number > 0; 1 is uniform over the simplex")
    if strata < 1 or corner_every < 0 or corner_every == 1:
        raise ValueError(
            f"got strata={strata} and corner_every={corner_every}, expected strata >= 1 and corner_every 0 or >= 2"
        )
    if alpha != 1 and name in ("stratified", "low_discrepancy"):
        raise ValueError(
            f'got alpha={alpha} for {name!r}, expected 1; other values need "dirichlet" or "antithetic"'
        )
    makers: dict[str, Callable[[], Sampler]] = {
        "dirichlet": lambda: _Blocks(lambda rng: rng.dirichlet([alpha] * objectives)[None], seed),
        "antithetic": lambda: _Blocks(lambda rng: _shifts(rng.dirichlet([alpha] * objectives)), seed),
        "stratified": lambda: _Blocks(lambda rng: _latin(rng, strata, objectives), seed),
        "low_discrepancy": lambda: _Recurrence(objectives, seed),
    }
    if name not in makers:
        raise ValueError(f"got sampler {name!r}, expected one of {sorted(makers)}")
    sampler = makers[name]()
    return _Anchored(sampler, objectives, corner_every) if corner_every else sampler


def layered_grid(objectives: int, points: Sequence[int]) -> np.ndarray:
    """Nested Das-Dennis grids: few preferences, yet some inside the simplex, where one coarse grid has corners only.

    Layer k of K is simplex_grid(objectives, points[k]), shrunk toward the equal preference by 1 - k / K; with K = 2
    the inner layer has half the size, as in Deb and Jain, "An evolutionary many-objective optimization algorithm
    using reference-point-based nondominated sorting approach, part I", 2014.

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
        sampler: "low_discrepancy" fills the simplex evenly; "dirichlet", "antithetic" and "stratified" draw.
        seed: of the draws.
        alpha: concentration for "dirichlet" and "antithetic"; below 1 favours corners.

    Returns:
        float64 [P, E], each row >= 0 with sum 1.

    Raises:
        ValueError: an unknown sampler, or a number out of range.
    """
    drawn = make_sampler(sampler, objectives, seed, alpha=alpha, strata=max(count, 1)).draw(count)
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


def _shifts(preference: np.ndarray) -> np.ndarray:
    return np.stack([np.roll(preference, step) for step in range(len(preference))])


def _latin(rng: np.random.Generator, strata: int, objectives: int) -> np.ndarray:
    slices = (
        np.stack([rng.permutation(strata) for _ in range(objectives - 1)], axis=1) if objectives > 1 else None
    )
    if slices is None:
        return np.ones((strata, 1))
    return to_simplex((slices + rng.random(slices.shape)) / strata)


class _Blocks:
    """A stream made of random blocks; its state is the generator's at the block's start and the place in it."""

    def __init__(self, make: Callable[[np.random.Generator], np.ndarray], seed: int) -> None:
        self._make = make
        self._rng = np.random.default_rng(seed)
        self._begin()

    def _begin(self) -> None:
        self._before = copy.deepcopy(dict(self._rng.bit_generator.state))
        self._block, self._taken = self._make(self._rng), 0

    def draw(self, count: int) -> np.ndarray:
        rows = []
        for _ in range(_checked(count)):
            if self._taken == len(self._block):
                self._begin()
            rows.append(self._block[self._taken])
            self._taken += 1
        return np.stack(rows)

    def state(self) -> dict[str, Any]:
        return {"generator": copy.deepcopy(self._before), "taken": self._taken}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._rng.bit_generator.state = copy.deepcopy(dict(state["generator"]))
        self._begin()
        self._taken = int(state["taken"])


class _Recurrence:
    """Kronecker's sequence frac(shift + n a), with powers of the generalized golden ratio for a (Roberts, 2018)."""

    def __init__(self, objectives: int, seed: int) -> None:
        ratio = 2.0
        for _ in range(60):
            ratio = (1 + ratio) ** (
                1 / objectives
            )  # the root of x^E = x + 1, for the E - 1 dimensions of the cube
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
