"""The aggregators of torchjd: against their own results, and what is misused."""

from __future__ import annotations

import sys

import pytest
import torch

from paretofuse.engine.solvers import (
    MGDA,
    LinearScalarization,
    TorchJD,
    get_solver,
)
from tests.support.problems import (
    random_inputs,
)


def test_torchjd_aggregators_by_name_and_by_object() -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    losses, jacobian, preference = random_inputs(3, seed=2)
    mean = TorchJD("Mean", preference="ignore")(losses, jacobian, preference)
    torch.testing.assert_close(mean, jacobian.mean(dim=0))
    scaled = TorchJD(aggregation.Sum())(losses, jacobian, preference)
    torch.testing.assert_close(scaled, LinearScalarization()(losses, jacobian, preference))
    vector = TorchJD("ConFIG", preference="vector")(losses, jacobian, preference)
    truth = aggregation.ConFIG(pref_vector=preference)(jacobian.flatten(1)).reshape(vector.shape)
    torch.testing.assert_close(vector, truth)
    factory = TorchJD(lambda r: aggregation.ConFIG(pref_vector=r), preference="vector")
    torch.testing.assert_close(factory(losses, jacobian, preference), truth)
    with pytest.raises(ValueError, match="expected one of torchjd's"):
        TorchJD("Meaan")
    with pytest.raises(ValueError, match="which needs arguments"):
        TorchJD("CAGrad")


@pytest.mark.parametrize(
    "name", ["AlignedMTL", "ConFIG", "GradDrop", "GradVac", "IMTLG", "MGDA", "PCGrad", "Random"]
)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_torchjd_aggregators_run(name: str, count: int) -> None:
    pytest.importorskip("torchjd.aggregation")
    losses, jacobian, preference = random_inputs(count, seed=4)
    direction = get_solver("torchjd", {"aggregator": name})(losses, jacobian, preference)
    assert direction.shape == jacobian.shape[1:]
    assert torch.isfinite(direction).all()


def test_torchjd_projections_descend_every_loss() -> None:
    pytest.importorskip("torchjd.aggregation")
    pytest.importorskip("quadprog")
    losses, jacobian, preference = random_inputs(4, seed=4)
    for solver in (TorchJD("UPGrad"), TorchJD("UPGrad", preference="vector"), TorchJD("DualProj")):
        change = torch.einsum("mge,ge->m", jacobian, solver(losses, jacobian, preference))
        assert (change >= -0.01 * change.max()).all()  # their projections are regularized


def test_torchjd_mgda_agrees_with_ours() -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    losses, jacobian, preference = random_inputs(2, seed=3)
    theirs = TorchJD(aggregation.MGDA(epsilon=1e-9, max_iters=2000), preference="ignore")
    torch.testing.assert_close(
        theirs(losses, jacobian, preference), MGDA()(losses, jacobian, preference), atol=1e-3, rtol=1e-3
    )


def test_torchjd_missing_or_misused_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    losses, jacobian, preference = random_inputs(2, seed=3)
    with pytest.raises(ValueError, match=r"expected a vector \[9\]"):
        TorchJD(lambda matrix: matrix)(losses, jacobian, preference)
    with pytest.raises(TypeError, match="expected a class name"):
        TorchJD(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got preference='both'"):
        TorchJD("Mean", preference="both")  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "torchjd.aggregation", None)
    with pytest.raises(ImportError, match=r"paretofuse\[torchjd\]"):
        TorchJD("Mean")
