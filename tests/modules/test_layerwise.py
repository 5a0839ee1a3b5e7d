"""Layers that merge their weight when they run: right in every dtype, from mapped deltas, with one layer in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import paretofuse as pf
from paretofuse.engine.engine import Engine
from paretofuse.engine.layout import Spans
from paretofuse.engine.modules.routed.layers import RoutedLinear
from paretofuse.engine.modules.routed.layerwise import LayerwiseWeight, merged
from paretofuse.engine.planes.dense import Dense
from paretofuse.engine.planes.int4 import Int4
from paretofuse.engine.planes.int8 import Int8
from paretofuse.engine.planes.lowrank import LowRank
from paretofuse.engine.planes.plane import Plane, Sums
from tests.support.models import perturbed
from tests.training.test_fit import problem, state

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_layer(
    outs: int, ins: int, experts: int, base_dtype: torch.dtype, delta_dtype: torch.dtype, transposed: bool
) -> tuple[LayerwiseWeight, Tensor]:
    """A layer whose second expert leaves it unchanged, and the routing weights [2, E] of the whole model."""
    shape = (ins, outs) if transposed else (outs, ins)
    base = torch.randn(shape).to(base_dtype)
    planes: list[Plane | None] = [Dense(0.1 * torch.randn(shape).to(delta_dtype)) for _ in range(experts)]
    if experts > 1:
        planes[1] = None
    mix = torch.rand(2, experts).requires_grad_()
    return LayerwiseWeight(base, planes, mix, Spans(1), transposed, lambda: None), mix


def truth(layer: LayerwiseWeight, x: Tensor, mix: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The same by dense products in `dtype`; the weight is mixed in float64 and rounded to it."""
    weight = layer.base.double()
    for share, plane in zip(mix[1].double(), layer.planes, strict=True):
        if plane is not None:
            weight = weight + share * plane.decode().double()
    weight = weight.to(dtype)
    return F.linear(
        x.to(dtype), weight.T if layer.transposed else weight, None if bias is None else bias.to(dtype)
    )


def close(ours: Tensor, torchs: Tensor, exact: Tensor, slack: float = 2.0) -> None:
    """Our error is at most twice that of PyTorch's own result in the same dtype, or float32's rounding."""
    allowed = slack * (torchs.double() - exact).abs().max() + 1e-5 * exact.abs().max()
    assert (ours.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("base_dtype", DTYPES)
@pytest.mark.parametrize("delta_dtype", DTYPES[:2])
@pytest.mark.parametrize(
    ("outs", "ins", "experts", "rows"), [(7, 13, 3, 5), (33, 1, 1, 1), (64, 129, 16, 17)]
)
def test_outputs_and_gradients_against_float64(
    outs: int,
    ins: int,
    experts: int,
    rows: int,
    base_dtype: torch.dtype,
    delta_dtype: torch.dtype,
    dtype: torch.dtype,
    transposed: bool,
) -> None:
    torch.manual_seed(outs)
    layer, mix = random_layer(outs, ins, experts, base_dtype, delta_dtype, transposed)
    x = torch.randn(rows, 1, ins).to(dtype).requires_grad_()
    bias = torch.randn(outs, requires_grad=True)
    along = torch.randn(rows, 1, outs).to(dtype)
    leaves = (x, mix, bias)
    results = []
    for output in (
        layer.linear(x, bias),
        truth(layer, x, mix, bias, dtype),
        truth(layer, x, mix, bias, torch.float64),
    ):
        gradients = torch.autograd.grad(output, leaves, along.to(output.dtype))
        results.append((output.detach(), *gradients))
    assert results[0][0].dtype == dtype
    for name, ours, torchs, exact in zip(("y", "x", "mix", "bias"), *results, strict=True):
        assert ours.shape == exact.shape
        if name == "mix":
            assert (ours[0] == 0).all()
            if experts > 1:
                assert ours[1, 1] == 0
        close(ours, torchs, exact.double())


def test_merged_writes_every_element() -> None:
    base = torch.randn(1023)
    out = merged(base, [None], torch.tensor([0.5]), torch.float32)
    assert torch.equal(out, base)
    assert merged(torch.empty(0, 4), [None], torch.ones(1), torch.float32).shape == (0, 4)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # opcheck's own copies
@pytest.mark.parametrize("by", get_args(Sums))
@pytest.mark.parametrize("transposed", [False, True])
def test_the_operators_keep_torchs_rules(transposed: bool, by: Sums) -> None:
    layer, mix = random_layer(6, 5, 3, torch.float32, torch.float32, transposed)
    layer = LayerwiseWeight(
        layer.base, [*layer.planes, *every_small_format(layer.base)], mix, Spans(1), transposed, lambda: None
    )
    x = torch.randn(4, 5, requires_grad=True)
    bias = torch.randn(6, requires_grad=True)
    count, (rows, columns) = len(layer.planes), layer.base.shape
    shape = {"whole": (count,), "row": (count, rows), "row and column": (count, rows + columns)}[by]
    weights = torch.rand(shape, requires_grad=True)
    arguments = (x, layer.base, *layer._parts, weights, bias, transposed)
    sketches = [LowRank.encode(torch.randn(layer.base.shape), 2) for _ in range(count)]
    for own in (sketches, []):
        values, factors = [plane.a for plane in own], [plane.b for plane in own]
        torch.library.opcheck(torch.ops.paretofuse.layerwise_linear, (*arguments, values, factors))
    torch.library.opcheck(
        torch.ops.paretofuse.layerwise_weights_grad,
        (torch.randn(4, 6), x.detach(), *layer._parts, transposed, by),
    )


def every_small_format(like: Tensor) -> list[Plane]:
    """Planes of the formats that are not dense."""
    delta = torch.randn(like.shape)
    return [Int8.encode(delta, 32), Int4.encode(delta), LowRank.encode(delta, 2)]


@pytest.mark.parametrize("transposed", [False, True])
def test_planes_of_every_format_match_float64(transposed: bool) -> None:
    base = torch.randn((48, 64) if transposed else (64, 48))
    planes = [*every_small_format(base), None, Dense(torch.randn(base.shape).bfloat16())]
    mix = torch.rand(2, len(planes)).requires_grad_()
    layer = LayerwiseWeight(base, planes, mix, Spans(1), transposed, lambda: None)
    x, bias, along = torch.randn(5, 48), torch.randn(64), torch.randn(5, 64)
    leaves = (x.requires_grad_(), bias.requires_grad_(), mix)
    found = []
    for output in (layer.linear(x, bias), truth(layer, x, mix, bias, torch.float64)):
        found.append((output.detach(), *torch.autograd.grad(output, leaves, along.to(output.dtype))))
    for ours, exact in zip(*found, strict=True):
        assert (ours.double() - exact).abs().max() <= 1e-5 * exact.abs().max()
    if not transposed:
        for first, last in ((0, 32), (5, 9)):
            part = layer.part(first, last).linear(x, None)
            torch.testing.assert_close(part, layer.linear(x, None)[:, first:last])


def test_autocast_and_wrong_inputs() -> None:
    layer, mix = random_layer(6, 5, 2, torch.float32, torch.float32, False)
    x = torch.randn(4, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer.linear(x, None)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(
        output.float(), truth(layer, x, mix, None, torch.float32), rtol=0.05, atol=0.05
    )
    for wrong in (torch.randn(4, 6), torch.randn(4, 5, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"expected \[..., 5\] of float32, bfloat16 or float16"):
            layer.linear(wrong, None)


class Stairs(nn.Module):
    """Several linear layers of one size."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def stairs(folder: Path, depth: int, width: int, experts: int) -> Path:
    """A store of a staircase."""
    torch.manual_seed(0)
    base = Stairs(depth, width)
    pf.stack(base, {f"t{i}": perturbed(base, i, 0.01) for i in range(experts)}).save(folder / "store")
    return folder / "store"


def test_deltas_stay_where_they_are_mapped(tmp_path: Path) -> None:
    engine = pf.load(stairs(tmp_path, 2, 40, 3), module=Stairs(2, 40))
    layers = [layer for layer in engine.fused_module.modules() if isinstance(layer, RoutedLinear)]
    names = [f"layers.{i}.weight" for i in range(2)]
    for layer, name in zip(layers, names, strict=True):
        assert isinstance(layer.mixed, LayerwiseWeight)
        for given, own in zip(layer.mixed.planes, engine._stack.planes, strict=True):
            assert given is own[name]
    before = [[own[name].decode() for own in engine._stack.planes] for name in names]
    x = torch.randn(5, 40)
    jacobians = []
    for _ in range(2):  # each pass lets the pages go
        engine.train_at([0.2, 0.3, 0.5], materialize=False)
        jacobians.append(engine.jacobian([engine.fused_module(x).square().mean()]))
    assert torch.equal(*jacobians)
    engine.train_at([0.2, 0.3, 0.5])
    torch.testing.assert_close(
        engine.jacobian([engine.module(x).square().mean()]), jacobians[0], rtol=1e-4, atol=1e-7
    )
    for name, values in zip(names, before, strict=True):
        for value, own in zip(values, engine._stack.planes, strict=True):
            assert torch.equal(own[name].decode(), value)


def test_a_weight_that_the_model_reads_itself_has_its_gradient() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(torch.tanh(self.body(x)), self.out.weight)

    base = Reads()
    engine = pf.stack(base, {"a": perturbed(base, 1), "b": perturbed(base, 2)})
    x, found = torch.randn(5, 4), []
    for materialize in (True, False):
        engine.train_at([0.3, 0.7], materialize=materialize)
        module = engine.module if materialize else engine.fused_module
        found.append(engine.jacobian([module(x).square().sum()]))
    assert (found[0] != 0).all()
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_the_live_module_never_holds_two_gradients() -> None:
    """The other mode: hooks reduce each merged weight's gradient before autograd makes the next one's."""
    base = Stairs(6, 32)
    engine = pf.stack(base, {"a": perturbed(base, 1), "b": perturbed(base, 2)})
    engine.train_at([0.5, 0.5])
    loss = engine.module(torch.randn(4, 32)).square().mean()
    alive: list[weakref.ref[Tensor]] = []
    most = []

    def watch(gradient: Tensor) -> None:
        alive.append(weakref.ref(gradient))
        most.append(sum(ref() is not None for ref in alive))

    parameters = list(engine.module.parameters())
    for parameter in parameters:
        parameter.register_hook(watch)
    loss.backward()
    assert len(most) == len(parameters) == 12
    assert max(most) <= 3  # this one, its bias's, and the product on its way
    assert all(parameter.grad is None for parameter in parameters)


MEASURE = """
import json, sys
import torch
from torch import nn
import paretofuse as pf
from benchmarks.harness.record import peak_bytes, reset_peak, resident
from tests.modules.test_layerwise import Stairs

torch.set_num_threads(1)
store, materialize = sys.argv[1], sys.argv[2] == "merged"
with torch.device("meta"):
    structure = Stairs(12, 1024)
engine = pf.load(store, module=structure)
x = torch.randn(4, 1024)

def step(engine):
    engine.train_at([0.25] * 4, materialize=materialize)
    module = engine.module if materialize else engine.fused_module
    engine.jacobian([module(x).square().mean()])

step(pf.stack(Stairs(2, 1024), {f"t{i}": Stairs(2, 1024) for i in range(4)}))  # what the libraries take for themselves
reset_peak()
before, file = resident(), resident("RssFile")
for _ in range(2):
    step(engine)
print(json.dumps([peak_bytes() - before, resident("RssFile") - file]))
"""


@pytest.mark.slow
def test_peak_memory_is_a_layer_or_two(tmp_path: Path) -> None:
    """12 layers of 4 MB and 4 experts, mapped: 240 MB of files. Merging all of them would take 48 MB by itself."""
    from benchmarks.harness.record import reset_peak, resident

    reset_peak()
    if resident("RssFile") is None or not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("needs Linux's /proc/self/status and clear_refs to measure memory")
    store = stairs(tmp_path, 12, 1024, 4)
    root = str(Path(__file__).parents[2])
    peaks = {}
    for mode in ("layerwise", "merged"):
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, str(store), mode],
            # glibc raises its threshold for giving freed blocks back as it sees large ones, so that the peak would
            # depend on chance (10 to 19 layers here); a fixed one shows what is alive.
            env={
                **os.environ,
                "PYTHONPATH": root,
                "OMP_NUM_THREADS": "1",
                "MALLOC_MMAP_THRESHOLD_": "1000000",
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        peaks[mode], mapped = json.loads(done.stdout)
        if mode == "layerwise":
            assert mapped < 10e6  # the pages were let go
    layer = 4 * 1024 * 1024
    # One layer's base and deltas (5), its weight or the gradient's product, and a little.
    assert peaks["layerwise"] < 9 * layer
    assert peaks["merged"] > 60 * layer


@pytest.mark.parametrize("method", ["ls", "epo"])
def test_fit_gives_the_same_routers(method: str) -> None:
    results = []
    for materialize in (True, False):
        engine, objectives = problem()
        module = engine.module if materialize else engine.fused_module
        module.eval()
        # Scalars alone: Adam makes rounding show in rows whose gradient is next to zero (test_linear_coefficients.py).
        pf.fit(
            engine, objectives, method, steps=25, family="scalar", materialize=materialize, progress=False
        )  # fmt: skip
        results.append(state(engine))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-3, atol=1e-4)


def test_fit_builds_no_live_module(tmp_path: Path) -> None:
    base = Stairs(2, 8)
    engine: Engine = pf.stack(base, {"a": perturbed(base, 1), "b": perturbed(base, 2)})
    data = [torch.randn(4, 8)]
    objectives: dict[str, Any] = {
        name: (data, lambda module, batch: module(batch).square().mean()) for name in engine.objectives
    }
    validation = pf.Validation(lambda module: pf.evaluate(module, objectives), maximize=False, every=2)
    settings: dict[str, Any] = {"steps": 6, "validation": validation, "progress": False}
    pf.fit(engine, objectives, materialize=False, checkpoint=tmp_path / "c", **settings)
    assert not engine._in_place.built
    assert not engine._bound.deltas._found  # nothing was stacked
    # What a run computes is the same either way but for rounding: the other mode may take over.
    other = pf.stack(base, {"a": perturbed(base, 1), "b": perturbed(base, 2)})
    assert pf.fit(other, objectives, checkpoint=tmp_path / "c", **settings) == []
    for r in pf.simplex_grid(2, 3):
        np.testing.assert_array_equal(other.routers(r).detach(), engine.routers(r).detach())
