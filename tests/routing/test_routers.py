"""Routers: the formula in float64, what each init starts from, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from paretofuse.engine.layout import Member
from paretofuse.engine.routing.routers import Routers
from paretofuse.engine.store.reader import was_trained

NAMES = ("cola", "sst2", "mrpc")
GROUPS = ("a", "b")


def moved(init: str, seed: int = 0) -> Routers:
    """Routers away from their start in every parameter."""
    routers = Routers(GROUPS, NAMES, init, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in routers.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    return routers


def arrays(routers: Routers) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy() for name, value in routers.state_dict().items()}


def truth(routers: Routers, r: np.ndarray) -> np.ndarray:
    """L(r) group by group, by plain sums in float64."""
    p = {name: value.astype(np.float64) for name, value in arrays(routers).items()}
    start = {"identity": r, "sqrt": np.sqrt(r), "constant": np.zeros_like(r)}[routers.init]
    rows = []
    for g in range(len(GROUPS)):
        hidden = [max(0.0, float(p["hidden.weight"][g, h] @ r) + p["hidden.bias"][g, h]) for h in range(6)]
        mixed = [float(p["output.weight"][g, e] @ hidden) + p["output.bias"][g, e] for e in range(3)]
        rows.append(start + np.array(mixed))
    return np.array(rows)


@pytest.mark.parametrize("init", ["identity", "sqrt", "constant"])
@pytest.mark.parametrize("seed", range(3))
def test_they_are_the_formula(init: str, seed: int) -> None:
    routers = moved(init, seed)
    grid = np.random.default_rng(seed).dirichlet([0.7] * 3, 5)
    several = routers(torch.from_numpy(grid))
    assert several.shape == (5, 2, 3)
    assert several.dtype == torch.float32
    for r, row in zip(grid, several, strict=True):
        expected = truth(routers, r)
        one = routers(r)
        assert one.dtype == torch.float32
        np.testing.assert_allclose(one.detach().numpy(), expected, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(row.detach().numpy(), one.detach().numpy())
    by_name = dict(zip(NAMES[::-1], grid[0].tolist()[::-1], strict=True))
    np.testing.assert_array_equal(routers(by_name).detach().numpy(), several[0].detach().numpy())


@pytest.mark.parametrize(("init", "start"), [("identity", lambda r: r), ("sqrt", np.sqrt)])
def test_residual_starts(init: str, start: Any) -> None:
    routers = Routers(GROUPS, NAMES, init)
    r = np.array([0.5, 0.3, 0.2])
    np.testing.assert_allclose(routers(r).detach().numpy(), [start(r)] * 2, rtol=1e-6)
    assert not was_trained(init, arrays(routers))
    bound = 1 / math.sqrt(3)
    drawn = np.concatenate([arrays(routers)[name].ravel() for name in ("hidden.weight", "hidden.bias")])
    assert -bound <= drawn.min() < -0.6 * bound
    assert 0.6 * bound < drawn.max() <= bound


def test_the_constant_start_is_pwemoes() -> None:
    routers = Routers([str(i) for i in range(40)], NAMES, "constant", constant=0.4)
    state = arrays(routers)
    assert (state["output.bias"] == np.float32(0.4)).all()
    assert not state["hidden.bias"].any()
    for name in ("hidden.weight", "output.weight"):
        assert state[name].mean() == pytest.approx(0, abs=2e-3)
        assert state[name].std() == pytest.approx(0.01, rel=0.15)
    assert not was_trained("constant", state)
    assert (arrays(Routers(GROUPS, NAMES, "constant"))["output.bias"] == np.float32(0.3)).all()


def test_sizes_and_seeds() -> None:
    routers = Routers(GROUPS, NAMES)
    shapes = {name: tuple(value.shape) for name, value in routers.state_dict().items()}
    assert shapes == {
        "hidden.weight": (2, 6, 3), "hidden.bias": (2, 6), "output.weight": (2, 3, 6), "output.bias": (2, 3),
    }  # fmt: skip
    assert routers.init == "identity"
    before = torch.get_rng_state()
    same, other = Routers(GROUPS, NAMES, seed=0), Routers(GROUPS, NAMES, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(routers.hidden.weight, same.hidden.weight)
    assert not torch.equal(routers.hidden.weight, other.hidden.weight)
    other.reset()
    assert torch.equal(routers.hidden.weight, other.hidden.weight)
    assert "groups=2" in repr(routers)
    assert "init='identity'" in repr(routers)


@pytest.mark.parametrize(
    ("init", "name", "trained"),
    [
        ("identity", "output.weight", True), ("identity", "output.bias", True), ("sqrt", "output.bias", True),
        ("identity", "hidden.bias", False), ("constant", "hidden.bias", True), ("constant", "output.bias", False),
    ],
)  # fmt: skip
def test_training_is_seen_by_what_starts_at_zero(init: str, name: str, trained: bool) -> None:
    state = {key: value.copy() for key, value in arrays(Routers(GROUPS, NAMES, init)).items()}
    state[name].flat[-1] += 1e-3
    assert was_trained(init, state) is trained


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="got init='cube', expected one of identity, sqrt, constant"):
        Routers(GROUPS, NAMES, "cube")
    routers = Routers(GROUPS, NAMES)
    with pytest.raises(ValueError, match=r"sum 0\.9"):
        routers([0.5, 0.2, 0.2])
    with pytest.raises(ValueError, match=r"got no preferences \[0, M\]"):
        routers(torch.zeros(0, 3))


@pytest.mark.parametrize("seed", range(3))
def test_row_coefficients_follow_the_groups_and_are_the_formula(seed: int) -> None:
    routers = Routers(GROUPS, NAMES, rows=7, family="rows", seed=seed)
    assert routers.rows is not None
    scalar = Routers(GROUPS, NAMES, rows=7, seed=seed)
    grid = torch.from_numpy(np.random.default_rng(seed).dirichlet([0.7] * 3, 4))
    start = routers(grid)
    assert start.shape == (4, 2 + 7, 3) == (4, routers.width, 3)
    assert torch.equal(start[:, :2], scalar(grid))
    assert (start[:, 2:] == 0).all()
    with torch.no_grad():
        routers.rows.weight.copy_(torch.randn(3, 3, 7, generator=torch.Generator().manual_seed(seed)))
    s = routers.rows.weight.detach().numpy().astype(np.float64)
    several = routers(grid)
    for r, row in zip(grid.numpy(), several, strict=True):
        expected = [[sum(r[m] * s[m, e, i] for m in range(3)) for e in range(3)] for i in range(7)]
        np.testing.assert_allclose(row[2:].detach().numpy(), expected, rtol=1e-6, atol=1e-7)
        np.testing.assert_array_equal(routers(r).detach().numpy(), row.detach().numpy())
    several[:, 2:].square().sum().backward()
    exact = torch.from_numpy(s).requires_grad_()
    torch.einsum("km,mei->kei", grid, exact).square().sum().backward()
    assert exact.grad is not None
    torch.testing.assert_close(routers.rows.weight.grad, exact.grad.float())
    assert "family='rows' with 153 trained numbers (612 bytes)" in repr(routers)
    assert was_trained("identity", arrays(routers))
    routers.reset(seed)
    assert not was_trained("identity", arrays(routers))


def test_columns_follow_the_rows_and_are_the_same_formula() -> None:
    routers = Routers(GROUPS, NAMES, rows=7, columns=5, family="rows+columns")
    assert routers.rows is not None
    assert routers.columns is not None
    assert routers.widths == [2, 9, 14]
    with torch.no_grad():
        for parameter in routers.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    grid = torch.from_numpy(np.random.default_rng(1).dirichlet([0.7] * 3, 4))
    found = routers(grid)
    assert found.shape == (4, 14, 3)
    exact = torch.einsum("km,mei->kie", grid, routers.columns.weight.double())
    torch.testing.assert_close(found[:, 9:], exact.float())
    assert "family='rows+columns' with 198 trained numbers (792 bytes)" in repr(routers)
    routers.append([Member("more", None, 0.0)])
    assert torch.equal(routers(grid)[..., :3], found)
    assert not routers(grid)[:, 2:, 3].any()
    with torch.no_grad():
        routers.rows.weight.zero_()
    assert was_trained("identity", {"columns.weight": arrays(routers)["columns.weight"]})
    with pytest.raises(
        ValueError, match="got family='rows' for routers whose column coefficients are trained"
    ):
        routers.set_family("rows")
    assert routers.family == "rows+columns", "what is refused changes nothing"
