"""The smoothed loss at equal preference, against losses that are known there."""

from __future__ import annotations

import json

import numpy as np
import pytest

from paretofuse.engine.routing.sampling import make_sampler
from paretofuse.engine.training.smoothing import LossAtEqualPreference


@pytest.mark.parametrize("objectives", [1, 2, 3, 8])
def test_linear_losses_are_found_at_equal_preference(objectives: int) -> None:
    rng = np.random.default_rng(objectives)
    slopes, level = rng.normal(size=(objectives, objectives)), rng.normal(size=objectives)
    smoothed = LossAtEqualPreference(objectives)
    for preference in make_sampler("low_discrepancy", objectives, 1).draw(200):
        smoothed.add(preference, level + preference @ slopes)
    expected = level + slopes.mean(axis=0)
    np.testing.assert_allclose(smoothed.value(), expected, atol=0.02)


def test_curved_losses_are_nearer_than_their_mean() -> None:
    smoothed = LossAtEqualPreference(2)
    preferences = make_sampler("low_discrepancy", 2, 0).draw(400)
    losses = (1 - preferences) ** 2
    for preference, own in zip(preferences, losses, strict=True):
        smoothed.add(preference, own)
    assert (abs(smoothed.value() - 0.25) < 0.03).all()
    assert (abs(losses.mean(axis=0) - 0.25) > 0.07).all()


def test_it_follows_a_fall_and_forgets() -> None:
    smoothed = LossAtEqualPreference(2)
    preferences = make_sampler("low_discrepancy", 2, 0).draw(500)
    for step, preference in enumerate(preferences):
        smoothed.add(preference, np.array([1.0, 2.0]) if step < 200 else np.array([0.5, 1.0]))
    np.testing.assert_allclose(smoothed.value(), [0.5, 1.0], atol=5e-3)  # exp(-300 / 50) is left of the first


@pytest.mark.parametrize("objectives", [2, 4, 8])
def test_it_is_the_weighted_regression(objectives: int) -> None:
    """Against a least-squares solve over all steps at once: the ridge is a further row for each slope."""
    rng = np.random.default_rng(objectives)
    draws, losses = rng.dirichlet([1.0] * objectives, 30), rng.random((30, objectives))
    draws[3] = np.eye(objectives)[0]  # of 8, so far from the middle that only the least weight is left
    smoothed = LossAtEqualPreference(objectives)
    for preference, own in zip(draws, losses, strict=True):
        smoothed.add(preference, own)
    width = (objectives - 1) / (objectives * (objectives + 1)) / 4
    offsets = draws - 1 / objectives
    near = np.maximum(np.exp(-(offsets**2).sum(axis=1) / (2 * width)), 1e-6)
    weights = near * np.exp(-(29 - np.arange(30)) / 50)
    weights /= weights.sum()
    design = np.hstack([np.ones((30, 1)), offsets]) * np.sqrt(weights)[:, None]
    ridge = np.hstack([np.zeros((objectives, 1)), np.sqrt(0.01 * width) * np.eye(objectives)])
    targets = np.vstack([losses * np.sqrt(weights)[:, None], np.zeros((objectives, objectives))])
    expected = np.linalg.lstsq(np.vstack([design, ridge]), targets, rcond=None)[0][0]
    np.testing.assert_allclose(smoothed.value(), expected, rtol=1e-9)


def test_one_observation_is_its_value() -> None:
    smoothed = LossAtEqualPreference(3)
    smoothed.add(np.array([1.0, 0.0, 0.0]), np.array([1.0, 2.0, 3.0]))
    np.testing.assert_allclose(smoothed.value(), [1.0, 2.0, 3.0], rtol=0.05)


def test_it_resumes_exactly_from_its_json() -> None:
    rng = np.random.default_rng(0)
    draws = rng.dirichlet([1.0] * 3, 40)
    losses = rng.random((40, 3))
    whole, cut = LossAtEqualPreference(3), LossAtEqualPreference(3)
    for i in range(40):
        whole.add(draws[i], losses[i])
        if i < 20:
            cut.add(draws[i], losses[i])
    other = LossAtEqualPreference(3)
    other.restore(json.loads(json.dumps(cut.state())))
    for i in range(20, 40):
        other.add(draws[i], losses[i])
    np.testing.assert_array_equal(other.value(), whole.value())
    for objectives in (2, 4):
        with pytest.raises(ValueError, match="got sums of shapes"):
            LossAtEqualPreference(objectives).restore(cut.state())
    for name in cut.state():
        with pytest.raises(ValueError, match="got sums of shapes"):
            LossAtEqualPreference(3).restore({**cut.state(), name: [[1.0]]})
