"""Many objectives: 8 and 16 of them train, are swept without a grid that explodes, and are measured."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import paretofuse as pf


class Place(nn.Module):
    """A point among 16 coordinates, in two groups."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.low, self.high = nn.Parameter(w[:8].clone()), nn.Parameter(w[8:].clone())

    def forward(self, target: Tensor) -> Tensor:
        return (torch.cat([self.low, self.high]) - target).square().mean()


def problem(count: int) -> tuple[pf.Engine, dict[str, Any]]:
    """Each expert stands twice as far out as its objective's optimum: the scalarized optimum is L = r / 2."""
    targets = torch.randn(count, 16, generator=torch.Generator().manual_seed(count))
    engine = pf.stack(
        Place(torch.zeros(16)), {f"t{i}": Place(2 * t) for i, t in enumerate(targets)}, route="tensor"
    )
    objectives = {f"t{i}": ([t], lambda module, target: module(target)) for i, t in enumerate(targets)}
    return engine, objectives


@pytest.mark.parametrize(("count", "method"), [(8, "ls"), (16, "ls"), (16, "epo"), (16, "stch")])
def test_fit_and_sweep(count: int, method: str) -> None:
    engine, objectives = problem(count)
    grid = np.concatenate([pf.layered_grid(count, (2, 2)), pf.sample_preferences(count, 8)])

    def front_of() -> pf.Front:
        return pf.sweep(engine, lambda m: pf.evaluate(m, objectives), grid, maximize=False, progress=False)

    def scalarized(front: pf.Front) -> float:
        return float((front.preferences * front.values).sum(axis=1).mean())

    before = front_of()
    pf.fit(
        engine,
        objectives,
        method,
        steps=120 if method == "ls" else 40,
        preferences_per_step=2,
        alpha=0.3,
        lr=1e-2,
        progress=False,
    )
    after = front_of()
    assert after.values.shape == (2 * count + 8, count)
    if method == "ls":
        best = np.mean([scalarized_optimum(r, objectives) for r in grid])
        assert scalarized(after) - best < 0.5 * (scalarized(before) - best)
    reference = before.values.max() * 1.1
    old, _ = before.hypervolume_estimate(reference, samples=20_000)
    new, error = after.hypervolume_estimate(reference, samples=20_000)
    assert new > old
    assert 0 < error < 0.02 * new
    assert min(after.rank_correlation().values()) > 0


def scalarized_optimum(r: np.ndarray, objectives: dict[str, Any]) -> float:
    targets = np.stack([data[0].numpy() for data, _ in objectives.values()])
    return float((r * ((r @ targets - targets) ** 2).mean(axis=1)).sum())


def test_validation_of_sixteen_objectives() -> None:
    engine, objectives = problem(16)
    validation = pf.Validation(lambda m: pf.evaluate(m, objectives), maximize=False, every=10, patience=3)
    records = pf.fit(engine, objectives, steps=30, lr=1e-2, validation=validation, progress=False)
    assert records[-1]["validation"] > records[0]["validation"] > 0
