"""How much of a grid's hypervolume do few evaluations reach? 24 chosen preferences beside a grid of 66.

The vision experiment with three objectives (`benchmarks.experiments`), engines trained for 400 steps, and what a merged
model gets right of each test set. The values of a row are those of the seeds.

Every preference of a lattice of 231 is evaluated, of which the grid is a part. So it is known what 24 of them can have
at most: `best_of` finds 24 good ones with all values in sight, and `bound` is what no 24 exceed. The hypervolume is
submodular: points T add to a set S at most the sum of what each of them adds alone, so that f(T) <= f(S) + the 24
largest single gains, for any S.
"""

from __future__ import annotations

from collections.abc import Sequence

import moocore
import numpy as np
import torch

import paretofuse as pf
from benchmarks.experiments.experiment import Experiment, Models, cache_of
from benchmarks.experiments.run import place_of
from benchmarks.experiments.vision import three
from benchmarks.harness.record import CACHE, Options, Row, check, paired_ratio

SEEDS = (0, 1, 2)
BUDGET = 24
STEPS = 400
EDGE = 21
"""Points along an edge of the lattice; every second is one of the grid's."""


def run(options: Options) -> list[Row]:
    """Measure hypervolumes: of the grid, the lattice, searches, and what any choice could reach."""
    torch.set_num_threads(options.threads)
    edge, budget, seeds = (5, 6, SEEDS[:1]) if options.quick else (EDGE, BUDGET, SEEDS)
    experiment = three(options.quick)
    lattice = pf.simplex_grid(3, edge)
    in_grid = np.isclose((lattice * (edge - 1)) % 2, 0).all(axis=1)
    grid, whole = f"grid of {in_grid.sum()}", f"lattice of {len(lattice)}"
    found: dict[str, list[float]] = {}
    for seed in seeds:
        engine = trained(experiment, seed, 2 if options.quick else STEPS)
        values = pf.sweep(engine, experiment.evaluate, lattice, progress=False).values
        searched = pf.search(engine, experiment.evaluate, budget, ref=0, seed=seed, progress=False)
        chosen = best_of(values, budget)
        limit = bound(values, budget)
        check(volume(values[chosen]) <= limit, f"seed {seed}: {budget} points exceed their bound")
        for name, number in {
            grid: volume(values[in_grid]),
            whole: volume(values),
            f"pf.search, {budget} evaluations": volume(searched.values),
            f"best {budget} of {len(lattice)}, all known": volume(values[chosen]),
            f"no {budget} of {len(lattice)} exceed": limit,
        }.items():
            found.setdefault(name, []).append(number)
    case = f"vision3, {len(seeds)} seeds"
    return [
        Row(case, name, "hypervolume", "", numbers, comparison="" if name == grid else f"this / {grid}",
            ratio=None if name == grid else paired_ratio(numbers, found[grid]),
            target=">= 1" if name.startswith("pf.search") else "")
        for name, numbers in found.items()
    ]  # fmt: skip


def trained(experiment: Experiment, seed: int, steps: int) -> pf.Engine:
    """An engine over a seed's models, which are trained if no experiment has left them in the cache."""
    models = Models(experiment, seed, place_of(cache_of(experiment, CACHE / "experiments"), seed))
    engine = pf.stack(models.base(), models.experts(), route="tensor")
    pf.fit(engine, experiment.objectives, steps=steps, seed=seed, progress=False)
    return engine


def volume(values: np.ndarray) -> float:
    """The hypervolume of points [P, M], larger being better, above 0."""
    return float(moocore.hypervolume(values, ref=np.zeros(values.shape[1]), maximise=True))


def gains(values: np.ndarray, chosen: Sequence[int]) -> np.ndarray:
    """[P]: what each point adds to the chosen ones."""
    before = volume(values[list(chosen)]) if chosen else 0.0
    return np.array([volume(values[[*chosen, index]]) - before for index in range(len(values))])


def best_of(values: np.ndarray, count: int) -> list[int]:
    """So many points of large hypervolume: one after the other, then exchanged as long as that helps."""
    chosen: list[int] = []
    while len(chosen) < count:
        chosen.append(int(gains(values, chosen).argmax()))
    exchanged = True
    while exchanged:
        exchanged = False
        for place in range(count):
            others = [*chosen[:place], *chosen[place + 1 :]]
            added = gains(values, others)
            if added.max() > added[chosen[place]] + 1e-12:
                chosen[place], exchanged = int(added.argmax()), True
    return chosen


def bound(values: np.ndarray, count: int) -> float:
    """What no `count` of the points exceed in hypervolume."""
    chosen: list[int] = []
    limit = np.inf
    for _ in range(len(values)):
        added = gains(values, chosen)
        before = volume(values[chosen]) if chosen else 0.0
        limit = min(limit, before + float(np.sort(added)[-count:].sum()))
        if added.max() <= 0:
            break
        chosen.append(int(added.argmax()))
    return limit
