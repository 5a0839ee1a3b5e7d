"""Training row coefficients: they reach what scalars cannot, with every solver, and resume exactly."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paretofuse as pf
from paretofuse.engine.engine import Engine
from paretofuse.engine.solvers import get_solver
from paretofuse.engine.training.checkpoint import read_checkpoint, write_checkpoint
from paretofuse.engine.training.fit import _default_family
from paretofuse.engine.training.run import Run
from paretofuse.engine.training.settings import Settings
from tests.training.test_fit import equal, problem, state


class Matrix(nn.Module):
    """Two rows."""

    def __init__(self, rows: list[list[float]]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(rows, dtype=torch.float32))

    def forward(self, target: Tensor) -> Tensor:
        return (self.w - target).square().sum()


def crossed() -> tuple[Engine, dict[str, Any], dict[str, Tensor]]:
    """Base 0; x's optimum has its first row of expert x and its second of expert y, y's the other way round."""
    experts = {"x": Matrix([[1, 0], [1, 0]]), "y": Matrix([[0, 1], [0, 1]])}
    engine = pf.stack(Matrix([[0, 0], [0, 0]]), experts, family="rows")
    optima = {"x": torch.tensor([[1.0, 0.0], [0.0, 1.0]]), "y": torch.tensor([[0.0, 1.0], [1.0, 0.0]])}
    objectives = {name: ([optimum], lambda module, batch: module(batch)) for name, optimum in optima.items()}
    return engine, objectives, optima


def rows_of(engine: Engine) -> Tensor:
    assert engine.routers.rows is not None
    return engine.routers.rows.weight.detach()


def test_they_reach_a_pareto_set_that_scalars_cannot() -> None:
    engine, objectives, optima = crossed()
    pf.fit(engine, objectives, steps=400, lr_end=0.01, progress=False)
    for r in pf.simplex_grid(2, 6):
        exact = r[0] * optima["x"] + r[1] * optima["y"]  # where r_x |w - x|^2 + r_y |w - y|^2 is least
        torch.testing.assert_close(engine.merge_state_dict(r)["w"], exact.float(), rtol=0, atol=0.06)
    scalar, objectives, _ = crossed()
    scalar.set_family("scalar")
    pf.fit(scalar, objectives, steps=400, lr_end=0.01, progress=False)
    assert (scalar.merge_state_dict([1.0, 0.0])["w"] - optima["x"]).abs().max() > 0.4


@pytest.mark.parametrize(("row_lr", "shrinkage"), [(0.03, 0.0), (0.01, 2.0)])
def test_a_step_is_adams_after_shrinking(row_lr: float, shrinkage: float) -> None:
    engine, objectives, _ = crossed()
    engine.set_family("rows+columns")
    before = [0.5 + torch.rand_like(linear.weight) for linear in engine.routers.linear]
    with torch.no_grad():
        for linear, start in zip(engine.routers.linear, before, strict=True):
            linear.weight.copy_(start)
    pf.fit(
        engine, objectives, steps=1, row_lr=row_lr, row_shrinkage=shrinkage, preferences_per_step=4, progress=False
    )  # fmt: skip
    for linear, start in zip(engine.routers.linear, before, strict=True):
        moved = linear.weight.detach() - start * (1 - row_lr * shrinkage)
        # Adam's first step is the learning rate along the gradient's sign; an expert's zeros have none.
        learns = torch.eye(2) if linear is engine.routers.columns else torch.ones(2, 2)  # [expert, column]
        torch.testing.assert_close(moved.abs(), row_lr * learns.expand_as(moved), rtol=1e-3, atol=1e-6)


def test_columns_reach_what_rows_cannot() -> None:
    """x's optimum has its first column of expert x and its second of expert y, y's the other way round."""
    experts = {"x": Matrix([[1, 1], [0, 0]]), "y": Matrix([[0, 0], [1, 1]])}
    optima = {"x": torch.tensor([[1.0, 0.0], [0.0, 1.0]]), "y": torch.tensor([[0.0, 1.0], [1.0, 0.0]])}
    objectives = {name: ([optimum], lambda module, batch: module(batch)) for name, optimum in optima.items()}
    far = {}
    for family in ("rows", "rows+columns"):
        engine = pf.stack(Matrix([[0, 0], [0, 0]]), experts, family=family)
        pf.fit(engine, objectives, steps=400, lr_end=0.01, progress=False)
        far[family] = (engine.merge_state_dict([1.0, 0.0])["w"] - optima["x"]).abs().max()
    assert far["rows"] > 0.4
    assert far["rows+columns"] < 0.06


def test_regularization_leaves_row_coefficients_alone() -> None:
    engine, objectives, _ = crossed()
    matched = [pf.Objective(name, *own) for name, own in objectives.items()]
    settings = Settings(5, 0.06, 0.1, "low_discrepancy", 1.0, 0, 1, 1, 0, regularization=0.5, family="rows")
    run = Run(engine, matched, get_solver("ls"), settings)
    rays = torch.tensor([[0.25, 0.75]], dtype=torch.float64)
    pull = run._pull(engine.routers(rays).detach() + 1, rays)
    assert pull.shape == (1, engine.routers.width, 2)
    assert (pull[:, :1] == 1).all()
    assert (pull[:, 1:] == 0).all()


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ls", {}),
        ("epo", {}),
        ("tchebycheff", {}),
        ("stch", {}),
        ("mgda", {}),
        ("cosmos", {}),
        ("hypervolume", {"preferences_per_step": 3}),
        ("torchjd", {"options": {"aggregator": lambda matrix: matrix.mean(0)}}),
    ],
)
@pytest.mark.parametrize("family", ["rows", "rows+columns"])
def test_every_solver_trains_them_merged_and_layer_by_layer_alike(
    family: str, method: str, options: dict[str, Any]
) -> None:
    found = []
    for materialize in (True, False):
        engine, objectives = problem(family=family, route="tensor")
        (engine.module if materialize else engine.fused_module).eval()  # dropout is drawn in another order
        pf.fit(engine, objectives, method, steps=3, materialize=materialize, progress=False, **options)
        for linear in engine.routers.linear:
            assert (linear.weight.abs() > 0.01).any(2).all(), "of every objective and expert"
        found.append(engine.routers(torch.tensor([0.3, 0.7])).detach())
    # Adam divides by the gradient's own size, so that its rounding shows where it is next to zero.
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0.02)
    assert (found[0] - found[1]).abs().median() < 1e-5


@pytest.mark.parametrize("family", ["rows", "rows+columns"])
def test_same_seed_same_bits_and_a_resumed_run_is_exact(tmp_path: Path, family: str) -> None:
    settings: dict[str, Any] = {
        "steps": 12,
        "family": family,
        "row_lr": 0.02,
        "row_shrinkage": 0.5,
        "progress": False,
    }
    whole = []
    for _ in range(2):
        engine, objectives = problem()
        pf.fit(engine, objectives, **settings)
        whole.append(state(engine))
    assert equal(*whole)
    path = tmp_path / "run.ckpt"
    engine, objectives = problem()
    pf.fit(engine, objectives, checkpoint=path, callback=lambda record: record["step"] == 5, **settings)
    engine, objectives = problem()
    records = pf.fit(engine, objectives, checkpoint=path, **settings)
    assert records[0]["step"] == 6
    assert equal(whole[0], state(engine))
    for change in ({"row_lr": 0.03}, {"row_shrinkage": 0.0}):
        engine, objectives = problem()
        with pytest.raises(ValueError, match=rf"{next(iter(change))}=0\.\d+ \(now"):
            pf.fit(engine, objectives, checkpoint=path, **{**settings, **change})
    engine, objectives = problem()
    with pytest.raises(ValueError, match=rf"family='{re.escape(family)}' \(now 'scalar'\)"):
        pf.fit(engine, objectives, checkpoint=path, steps=12, family="scalar", progress=False)


def test_checkpoints_from_before_there_were_families_resume_as_scalar(tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    engine, objectives = problem(family="scalar")
    pf.fit(engine, objectives, steps=2, checkpoint=path, progress=False)
    tensors, kept = read_checkpoint(path)
    del kept["settings"]["family"]
    assert not {"row_lr", "row_shrinkage"} & set(kept["settings"])
    write_checkpoint(path, tensors, kept)
    engine, objectives = problem()
    with pytest.raises(ValueError, match=r"family='scalar' \(now 'rows'\)"):
        pf.fit(engine, objectives, steps=2, checkpoint=path, family="rows", progress=False)
    engine, objectives = problem(family="scalar")
    assert len(pf.fit(engine, objectives, steps=3, checkpoint=path, progress=False)) == 1


def test_validation_keeps_the_best_row_coefficients() -> None:
    engine, objectives = problem(family="rows")
    before = state(engine)
    scores = iter([1.0] + [0.5] * 10)  # worse with every step

    def evaluate(module: nn.Module) -> dict[str, float]:
        value = evaluate.value if evaluate.count % 5 else next(scores)  # type: ignore[attr-defined]
        evaluate.value, evaluate.count = value, evaluate.count + 1  # type: ignore[attr-defined]
        return {"left": value, "right": value}

    evaluate.count = 0  # type: ignore[attr-defined]
    validation = pf.Validation(evaluate, every=1, patience=3, reference=0.0)
    records = pf.fit(engine, objectives, steps=9, validation=validation, progress=False)
    assert len(records) == 3
    assert equal(before, state(engine))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            {"family": "scalar", "row_lr": 0.1},
            'without row coefficients; pass family="rows"',
        ),
        (
            {"family": "scalar", "row_shrinkage": 0.1},
            'without row coefficients; pass family="rows"',
        ),
        ({"family": "rows", "row_lr": 0.0}, "row_lr=0.0, expected a number above 0"),
        ({"family": "rows", "row_lr": float("nan")}, "row_lr=nan, expected a finite number"),
        ({"family": "rows", "row_shrinkage": -1.0}, "row_shrinkage=-1.0, expected a number of at least 0"),
        ({"family": "rows", "row_lr": 0.5, "row_shrinkage": 3.0}, "expected at most 1 / row_lr"),
        ({"family": "columns"}, r"expected one of scalar, rows, rows\+columns"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], words: str) -> None:
    engine, objectives = problem()
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        pf.fit(engine, objectives, steps=1, progress=False, **arguments)
    assert engine.routers.family == "scalar"


@pytest.mark.parametrize("asked", ["stack", "set_family", "fit"])
def test_fit_trains_rows_unless_the_engine_was_asked_for_scalars(asked: str) -> None:
    engine, objectives = problem(**({"family": "scalar"} if asked == "stack" else {}))
    if asked == "set_family":
        engine.set_family("scalar")
    given = {"family": "scalar"} if asked == "fit" else {}
    pf.fit(engine, objectives, steps=1, progress=False, **given)
    pf.fit(engine, objectives, steps=1, progress=False)
    assert engine.routers.family == "scalar"
    engine, objectives = problem()
    assert engine.routers.family == "scalar"
    pf.fit(engine, objectives, steps=1, progress=False)
    assert (rows_of(engine) != 0).any()


def test_without_a_word_what_cannot_merge_rows_stays_scalar(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = problem()
    assert _default_family(engine) == "rows"
    monkeypatch.setattr(engine._bound, "shardings", {"w": None})  # as one process's shards have some
    assert _default_family(engine) == "scalar"
    with pytest.raises(ValueError, match="one process's shards"):
        engine.set_family("rows")
    assert _default_family(engine) == "scalar"


def test_fit_keeps_the_engines_family_and_refuses_to_lose_it() -> None:
    engine, objectives = problem()
    pf.fit(engine, objectives, steps=1, family="rows", progress=False)
    pf.fit(engine, objectives, steps=1, progress=False)
    assert engine.routers.family == "rows"
    with pytest.raises(ValueError, match="would be lost"):
        pf.fit(engine, objectives, steps=1, family="scalar", progress=False)
    engine.routers.reset()
    assert (rows_of(engine) == 0).all()
