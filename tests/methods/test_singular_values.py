"""TSV-Merge and Iso-C are their papers' formulas, written out here in float64 by torch.linalg.svd."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import paretofuse as pf
from paretofuse.engine.methods.iso_c import IsoC
from paretofuse.engine.methods.method import Group
from paretofuse.engine.methods.numbers import Numbers
from paretofuse.engine.methods.tsv import Tsv, tsv_shares
from tests.support.models import net_and_experts

SHAPES = [(5, 5), (12, 31), (31, 12), (6, 4, 3, 3), (2, 9), (1, 7)]


def differences(shape: tuple[int, ...], count: int) -> list[torch.Tensor]:
    random = np.random.default_rng()
    return [torch.from_numpy(random.standard_normal(shape)) for _ in range(count)]


def added(method: Tsv | IsoC, deltas: list[torch.Tensor], scale: float) -> np.ndarray:
    """What a method adds to a random base."""
    base = Numbers.of(np.asarray(np.random.default_rng().standard_normal(tuple(deltas[0].shape))), "F64")
    models = tuple(Numbers.of(base.floats() + delta.numpy(), "F64") for delta in deltas)
    group = Group("w", base, models, tuple({} for _ in models), {"lambda": scale})
    out = Numbers.empty("F64", base.shape)
    out.data[:] = 0xFF  # NaN
    method.merge(group, out)
    return out.floats() - base.floats()


def tsv_formula(deltas: list[torch.Tensor]) -> torch.Tensor:
    """Concatenated leading singular vectors, then the orthogonal Procrustes solution for both sides."""
    parts = [torch.linalg.svd(delta.flatten(1), full_matrices=False) for delta in deltas]
    kept = max(1, len(parts[0].S) // len(deltas))
    u = torch.cat([part.U[:, :kept] for part in parts], 1)
    s = torch.cat([part.S[:kept] for part in parts])
    v = torch.cat([part.Vh[:kept] for part in parts], 0)
    (pu, _, qu), (pv, _, qv) = (torch.linalg.svd(x, full_matrices=False) for x in (u, v))
    return torch.linalg.multi_dot((pu, qu, s.diag(), pv, qv)).reshape(deltas[0].shape)


def iso_formula(deltas: list[torch.Tensor]) -> torch.Tensor:
    """The mean singular value of the sum in place of each."""
    total = torch.stack(deltas).sum(0)
    u, s, v = torch.linalg.svd(total.flatten(1), full_matrices=False)
    return (u @ torch.full_like(s, float(s.mean())).diag() @ v).reshape(total.shape)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("method", "formula"), [(Tsv(), tsv_formula), (IsoC(), iso_formula)], ids=["tsv", "iso_c"]
)
def test_a_matrix_is_merged_by_the_papers_formula(method, formula, shape, count):
    deltas = differences(shape, count)
    found = added(method, deltas, 0.7)
    np.testing.assert_allclose(found, 0.7 * formula(deltas).numpy(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", [Tsv(), IsoC()], ids=["tsv", "iso_c"])
@pytest.mark.parametrize("shape", [(9,), ()], ids=str)
def test_a_vector_takes_the_mean(method, shape):
    deltas = differences(shape, 3)
    found = added(method, deltas, 1.0)
    np.testing.assert_allclose(found, torch.stack(deltas).mean(0).numpy(), rtol=1e-9, atol=1e-9)


def test_shares_sum_to_the_merge_and_do_not_interfere():
    deltas = [delta.numpy() for delta in differences((24, 17), 3)]
    shares = tsv_shares(deltas)
    np.testing.assert_allclose(
        sum(shares), tsv_formula([torch.from_numpy(d) for d in deltas]).numpy(), rtol=1e-9, atol=1e-9
    )
    for one in range(3):
        for other in range(one):
            np.testing.assert_allclose(shares[one].T @ shares[other], 0, atol=1e-9)
            np.testing.assert_allclose(shares[one] @ shares[other].T, 0, atol=1e-9)


def test_a_stack_transformed_by_tsv_adds_the_shares():
    base, experts = net_and_experts()
    engine = pf.stack(base, experts, route="tensor", transform="tsv")
    own = base.state_dict()
    for name in engine.tensor_groups:
        shares = tsv_shares([(e.state_dict()[name] - own[name]).numpy() for e in experts.values()])
        for share, objective in zip(shares, experts, strict=True):
            found = engine.merge_state_dict({objective: 1.0})[name]
            np.testing.assert_allclose(found.numpy(), own[name].numpy() + share, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"tsv has no .density=0\.2."):
        pf.stack(base, experts, transform="tsv:density=0.2")
