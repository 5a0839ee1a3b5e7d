"""Plane formats on experts: errors and sizes are what they are said to be."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from torch import nn

import paretofuse as pf
from benchmarks.experiments import formats, vision
from benchmarks.experiments.experiment import Models, cache_of
from benchmarks.experiments.run import place_of
from benchmarks.harness import record

pytest.importorskip("sklearn", reason="the quick experiment is about scikit-learn's digits")


def test_formats_are_compared_with_exact_planes(tmp_path: Path) -> None:
    about = record.context(record.Options(True, 1))
    picture = tmp_path / "formats.png"
    rows = formats.run(
        {"vision": vision.two}, [0], tmp_path, tmp_path, picture, about, True, lambda line: None
    )

    by_format = {row.planes: row for row in rows}
    assert list(by_format) == list(formats.FORMATS)
    assert 0.49 < by_format["bf16"].size < 0.51
    assert by_format["int8"].size < by_format["bf16"].size
    assert by_format["bf16"].error < 2**-8 < by_format["int4"].error
    assert picture.stat().st_size > 10_000
    with (tmp_path / "plane_formats.csv").open(encoding="utf-8") as file:
        assert [row["planes"] for row in csv.DictReader(file)] == list(formats.FORMATS)
    assert formats.table(rows).count("\n") == 1 + len(formats.FORMATS)

    experiment = vision.two(True)
    models = Models(experiment, 0, place_of(cache_of(experiment, tmp_path), 0))
    base, experts = models.base(), models.experts()

    def merged(planes: str) -> torch.Tensor:
        engine = pf.stack(base, experts, planes=planes)
        weights = torch.full((len(engine.groups), 2), 0.5)
        return nn.utils.parameters_to_vector(engine.merge(weights=weights).parameters()).detach().double()

    exact = merged("fp32")
    moved = exact - nn.utils.parameters_to_vector(base.parameters()).detach().double()
    error = float((merged("int4") - exact).norm() / moved.norm())
    assert abs(by_format["int4"].error - error) < 1e-3 * error
