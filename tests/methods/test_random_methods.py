"""DARE and DELLA draw other numbers than mergekit: what they keep must be as frequent, as large, and reproducible."""

from __future__ import annotations

import numpy as np
import pytest

from paretofuse.engine.methods.dare import DareLinear, DareTies
from paretofuse.engine.methods.della import Della, DellaLinear, ranks_in_rows
from paretofuse.engine.methods.method import Group, Method
from paretofuse.engine.methods.numbers import Numbers
from paretofuse.engine.methods.random import draws, key_of, threshold

SHAPE = (61, 1003)


def group_of(method: Method, seed: int = 0, **options: float | bool) -> Group:
    """A base of zeros and one model of normal numbers, all parameters at their defaults or as given."""
    values = np.random.default_rng(7).standard_normal(SHAPE, np.float32)
    given = {"weight": 1.0, "normalize": False, **options}
    parameters = {p.name: given.get(p.name, p.default) for p in method.parameters}
    base = Numbers.of(np.zeros(SHAPE, np.float32), "F32")
    return Group("w", base, (Numbers.of(values, "F32"),), (parameters,), parameters, seed)


@pytest.mark.parametrize("method", [DareLinear(), DareTies()], ids=lambda m: m.name)
@pytest.mark.parametrize("density", [0.1, 0.53, 0.9])
def test_dare_keeps_its_share_and_the_sum_of_magnitudes(method: Method, density: float) -> None:
    group = group_of(method, density=density)
    values, merged = group.models[0].floats(), method.reference(group)
    kept = merged != 0
    deviation = np.sqrt(density * (1 - density) / values.size)
    assert abs(kept.mean() - density) < 5 * deviation
    # Whether one is kept tells nothing of its neighbours, nor of its own size.
    pairs = (kept[:, 1:] & kept[:, :-1]).mean()
    assert abs(pairs - density**2) < 6 * deviation
    assert abs(np.corrcoef(kept.reshape(-1), np.abs(values).reshape(-1))[0, 1]) < 5 / np.sqrt(values.size)
    np.testing.assert_allclose(np.abs(merged).sum(), np.abs(values).sum(), rtol=1e-5)
    plain = method.reference(group_of(method, density=density, rescale=False))
    np.testing.assert_array_equal(plain, np.where(kept, values, 0))


@pytest.mark.parametrize("method", [DellaLinear(), Della()], ids=lambda m: m.name)
def test_della_keeps_large_elements_more_often(method: Method) -> None:
    density, epsilon = 0.5, 0.3
    group = group_of(method, density=density, epsilon=epsilon, rescale=False)
    kept = method.reference(group) != 0
    ranks = ranks_in_rows(np.abs(group.models[0].floats()))
    for tenth in range(10):
        among = (ranks >= SHAPE[1] * tenth / 10) & (ranks < SHAPE[1] * (tenth + 1) / 10)
        wanted = density - epsilon + 2 * epsilon * ranks[among].mean() / (SHAPE[1] - 1)
        assert abs(kept[among].mean() - wanted) < 5 * 0.5 / np.sqrt(among.sum())


def test_a_seed_a_tensor_and_a_model_have_draws_of_their_own() -> None:
    method = DareLinear()
    first = method.reference(group_of(method, density=0.5))
    np.testing.assert_array_equal(first, method.reference(group_of(method, density=0.5)))
    assert ((first != 0) == (method.reference(group_of(method, seed=1, density=0.5)) != 0)).mean() < 0.52
    keys = {key_of(seed, tensor, model) for seed in (0, 1) for tensor in ("a", "b") for model in (0, 1)}
    assert len(keys) == 8


def test_draws_are_uniform() -> None:
    found = draws(key_of(0, "w", 0), 1 << 20)
    counts = np.histogram(found, bins=256, range=(0, 1 << 24))[0]
    chi = ((counts - 4096.0) ** 2 / 4096).sum()
    assert 160 < chi < 360  # 255 degrees of freedom
    low = np.histogram(found & 255, bins=256, range=(0, 256))[0]
    assert 160 < ((low - 4096.0) ** 2 / 4096).sum() < 360
    assert threshold(0.25) == 1 << 22
    assert threshold(1.0) == 1 << 24


@pytest.mark.parametrize("epsilon", [0.5, 0.6])
def test_probabilities_beyond_0_and_1_are_refused(epsilon: float) -> None:
    method = Della()
    with pytest.raises(
        ValueError, match=r"got density: 0.5 and epsilon: .*, expected density - epsilon above 0"
    ):
        method.reference(group_of(method, density=0.5, epsilon=epsilon))


@pytest.mark.parametrize("method", [DareLinear(), Della()], ids=lambda m: m.name)
def test_densities_at_and_beyond_the_ends(method: Method) -> None:
    assert not method.reference(group_of(method, density=0.0)).any()
    assert not method.reference(group_of(method, density=-0.5)).any()
    group = group_of(method, density=1.5)
    np.testing.assert_array_equal(method.reference(group), group.models[0].floats())
