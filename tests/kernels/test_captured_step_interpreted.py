"""Captured router steps, in Triton's interpreter and with a CUDA graph's stand-in; `test_in_interpreter.py` runs it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import paretofuse as pf
from benchmarks.gpu import whole
from benchmarks.gpu.host import stub_graphs
from paretofuse.engine.engine import Engine
from paretofuse.engine.merging import flat
from paretofuse.engine.modules import gradient
from paretofuse.engine.training.captured import CapturedMeasure
from tests.support.graphs import LateDevice, Operators
from tests.support.models import perturbed

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in a child process of test_in_interpreter.py", allow_module_level=True)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Iterator[LateDevice]:
    # The C++ core, which reduces gradients of no kernel on the CPU, is no operator that a graph could hold.
    monkeypatch.setattr(gradient, "TO_NAME", {})
    monkeypatch.setattr(flat, "SMALL", 256)
    device = LateDevice()
    with stub_graphs(device.graph, device.event):
        yield device


class Net(nn.Module):
    """An embedding, small tensors and a large one (`SMALL`), BatchNorm's statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 16)
        self.norm = nn.BatchNorm1d(16)
        self.wide = nn.Linear(16, 40)
        self.out = nn.Linear(40, 4)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.out(self.wide(self.norm(self.embed(ids))).relu())
        return out


def loss(module: nn.Module, batch: dict[str, Any]) -> Tensor:
    return nn.functional.cross_entropy(module(batch["ids"]), batch["labels"]) * batch["scale"]


def batch(seed: int, rows: int = 6, scale: float = 2.0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    ids, labels = (torch.randint(high, (rows,), generator=generator) for high in (9, 4))
    return {"ids": ids, "labels": labels, "scale": scale}


def stacked(**how: Any) -> Engine:
    torch.manual_seed(0)
    base = Net()
    experts = {name: perturbed(base, seed) for seed, name in enumerate("ab")}
    return pf.stack(base, experts, backend="triton", **how)


def trained(engine: Engine, seed: int = 0, **how: Any) -> tuple[list[pf.Record], dict[str, Tensor]]:
    engine.module.train()
    data = {name: [batch(10 * i + j) for j in range(3)] for i, name in enumerate("ab")}
    records = pf.fit(
        engine, {name: (own, loss) for name, own in data.items()}, steps=3, seed=seed, progress=False, **how
    )
    return records, {name: tensor.clone() for name, tensor in engine.routers.state_dict().items()}


@pytest.mark.parametrize(
    ("stack", "fit", "rank"),
    [
        ({}, {"family": "scalar"}, None),
        ({}, {"family": "rows"}, None),
        ({}, {"family": "rows+columns"}, None),
        ({"planes": "int8"}, {"family": "rows", "method": "epo", "preferences_per_step": 2}, None),
        ({"planes": "lowrank:2"}, {"family": "scalar", "accumulate": 2}, None),
        ({}, {"family": "rows", "row_shrinkage": 0.1, "plane_orthogonality": 0.1}, 1),
        ({}, {"family": "scalar", "sketch": 2}, None),
    ],
)
def test_a_captured_training_is_the_training(
    stack: dict[str, Any], fit: dict[str, Any], rank: int | None, late: LateDevice
) -> None:
    found = []
    for capture in (False, True):
        engine = stacked(**stack)
        if rank is not None:
            pf.add_planes(engine, rank=rank)
        replays = len(late.replayed)
        found.append(trained(engine, capture=capture, **fit))
        per_step = fit.get("accumulate", 1) * fit.get("preferences_per_step", 1)
        assert len(late.replayed) - replays == capture * (3 * per_step - fit.get("accumulate", 1))
    (plain, routers), (captured, ours) = found
    for one, other in zip(plain, captured, strict=True):
        assert one == pytest.approx(other, rel=1e-6)
    for name, tensor in routers.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-6)


def captured(data: list[Any], loss: Any = loss, callback: Any = None) -> None:
    engine = stacked()
    pf.fit(
        engine, {n: (data, loss) for n in "ab"}, steps=3, family="scalar", capture=True, progress=False,
        callback=None if callback is None else partial(callback, engine),
    )  # fmt: skip


def test_what_a_graph_would_do_wrong_is_told(late: LateDevice) -> None:
    same = [batch(0), batch(1)]
    rows = r"objective 'a' of \{'ids': 'int64 \[5\]', 'labels': 'int64 \[5\]', 'scale': '2\.0'\}, expected \{.*\[6\]"
    with pytest.raises(ValueError, match=rows + r".*drop_last=True.*leave out capture="):
        captured([*same, batch(2, rows=5)])
    with pytest.raises(ValueError, match=r"'scale': '3\.0'\}, expected .*'2\.0'\}"):
        captured([*same, batch(2, scale=3.0)])
    with pytest.raises(TypeError, match=r"objective 'a' with Generator, expected tensors"):
        captured([{**one, "more": torch.Generator()} for one in same])

    for waits in (
        lambda module, batch: loss(module, batch) * float(loss(module, batch) > 0),
        lambda module, batch: module(batch["ids"])[batch["labels"] > 1].sum(),
    ):
        with pytest.raises(
            ValueError, match=r"could not be captured: .*not permitted.*Let losses wait for nothing"
        ):
            captured(same, waits)

    def moves(engine: Engine, record: pf.Record) -> None:
        if record["step"] == 2:
            engine.module.get_submodule("out").half()

    def replaces(engine: Engine, record: pf.Record) -> None:
        if record["step"] == 2:
            engine.set_family("rows")

    def lets_go(engine: Engine, record: pf.Record) -> None:
        if record["step"] == 2:
            engine.unload([0.5, 0.5])

    with pytest.raises(ValueError, match=r"live module whose tensor 'out\."):
        captured(same, callback=moves)
    for change in (replaces, lets_go):
        with pytest.raises(
            ValueError, match=r"another live module, or routers of another family.*leave out capture="
        ):
            captured(same, callback=change)

    def fails(module: nn.Module, batch: dict[str, Any]) -> Tensor:
        return loss(module, batch) / (batch["ids"][0] != 8)

    last = batch(2)
    last["ids"][0] = 8
    first = [{**one, "ids": one["ids"].clamp(max=7)} for one in same]
    with pytest.raises(ValueError, match=r"the loss of objective 'a' is inf; lower lr"):
        captured([*first, last], fails)


def test_between_steps_the_module_can_be_switched(late: LateDevice) -> None:
    """As a validation does."""
    engine, seen = stacked(), list[bool]()

    def callback(record: pf.Record) -> None:
        engine.switch([0.5, 0.5])
        seen.append(torch.equal(engine.module.state_dict()["out.weight"],
                                engine.merge_state_dict([0.5, 0.5])["out.weight"]))  # fmt: skip

    trained(engine, capture=True, family="scalar", callback=callback)
    plain = stacked()
    trained(plain, family="scalar")
    assert seen == [True] * 3
    for name, tensor in plain.routers.state_dict().items():
        torch.testing.assert_close(engine.routers.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)


def test_the_benchmarks_contender_gives_the_jacobian(late: LateDevice) -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 40)

        def forward(self, x: Tensor) -> SimpleNamespace:
            return SimpleNamespace(pooler_output=self.layer(x))

    base = Pooled()
    engine = pf.stack(base, {name: perturbed(base, seed) for seed, name in enumerate("ab")}, backend="triton")
    images, preference = torch.randn(4, 8), [1.0, 0.0]
    replay = whole._captured(engine, images, preference)
    found = [replay(), replay()]
    assert len(late.replayed) == 2
    engine.train_at(preference)
    expected = engine.jacobian([whole._pooled(engine.module, images)])[0]
    for one in found:
        torch.testing.assert_close(one, expected)


def test_a_replayed_step_asks_torch_for_copies_alone(late: LateDevice) -> None:
    """What is asked of the device one by one does not grow with the model."""
    engine = stacked()
    engine.module.train()
    objectives = [pf.Objective(name, [batch(i)], loss) for i, name in enumerate("ab")]
    engine.train_at([0.5, 0.5])
    measure = CapturedMeasure(engine, objectives, [batch(i) for i in range(2)], 1)

    late.catch_up = lambda: None  # type: ignore[method-assign]
    preference, batches = np.array([0.2, 0.8]), [batch(3), batch(4)]
    with Operators() as ran:
        measure.measure(preference, batches)
    views = {"aten.lift_fresh.default", "aten.unsqueeze.default"}
    asked = [name for name in ran.names if name not in views]
    assert asked == ["aten.copy_.default"] * 5 + ["aten._to_copy.default"]
