"""Stores to merge on a device, and what its results must be: the CPU's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import paretofuse as pf
from paretofuse.engine.dtypes import TO_NAME
from paretofuse.engine.layout import Layout, TensorSpec
from paretofuse.engine.planes.dense import Dense
from paretofuse.engine.planes.int4 import Int4
from paretofuse.engine.planes.int8 import Int8
from paretofuse.engine.planes.lowrank import LowRank
from paretofuse.engine.planes.plane import Plane
from paretofuse.engine.routing.routers import Routers
from paretofuse.engine.stacking import persist
from paretofuse.engine.stacking.sources import Blueprint
from paretofuse.engine.stacking.stack import Stack
from tests.support.cpplib import Cuda, Engine
from tests.support.models import net_and_experts


def net_store(path: Path, count: int = 3, **options: Any) -> Path:
    base, experts = net_and_experts(count=count)
    pf.stack(base, experts, **options).save(path)
    return path


SHAPES = {
    "dense": (5, 256), "thin": (21, 30), "byte": (7, 384), "narrow": (40, 33), "half": (12, 128), "nibble": (9, 33),
    "low": (70, 96), "lower": (65, 144), "crooked": (6, 2, 3), "mixed": (4, 256), "groups": (6, 128),
    "bytes": (9, 128), "odd": (31, 33),
    "beside": (66, 80), "cut": (7, 48),
}  # fmt: skip
"""Of planes_store's routed matrices: rows that share coefficients and rows that do not, one tile and several."""

DECODED = ("crooked.weight", "mixed.weight", "groups.weight")
"""Those whose planes no kernel reads as they are: low rank at no multiple of 16, two formats, unusual groups."""


def planes_store(path: Path, dtype: torch.dtype = torch.float32, *, by_row: bool = False) -> Path:
    """A store of a few kB whose three planes have every format, odd sizes, and tensors that they leave unchanged."""
    generator = torch.Generator().manual_seed(0)
    name = TO_NAME[dtype]
    specs = [TensorSpec(f"{n}.weight", s, name, "routed", n, name) for n, s in SHAPES.items()]
    specs.append(TensorSpec("bias", (130,), name, "routed", "dense", name))
    specs.append(TensorSpec("fixed.weight", (4, 512), name, "static", None, name))
    specs.append(TensorSpec("thinner.weight", (16, 32), name, "static", None, name))
    base = {spec.name: torch.randn(spec.shape, generator=generator).to(dtype) for spec in specs}
    planes: list[dict[str, Plane]] = []
    for rank in (2, 17, 5):
        deltas = {
            spec.name.split(".")[0]: 0.1 * torch.randn(spec.shape, generator=generator) for spec in specs
        }
        own: dict[str, Plane] = {
            f"{n}.weight": _encoded(n, delta, rank, dtype) for n, delta in deltas.items() if n != "bias"
        }
        planes.append({**own, "bias": Dense.encode(deltas["bias"], dtype)})
    for j, absent in enumerate(("dense", "byte", "low")):
        del planes[j][f"{absent}.weight"]
    planes[1]["mixed.weight"] = Dense.encode(torch.ones(4, 256), dtype)
    for j, name in ((0, "beside"), (2, "beside"), (1, "cut")):
        shape = SHAPES[name]
        planes[j][f"{name}.weight"] = Dense.encode(0.1 * torch.randn(shape, generator=generator), dtype)
    layout = Layout(("a", "b", "c"), tuple(specs), 0.3)
    routers = Routers(layout.groups, layout.objectives, "identity")
    persist.save(path, Stack(layout, base, tuple(planes), {}), routers, Blueprint())
    if by_row:
        engine = pf.load(path)
        engine.set_family("rows")
        with torch.no_grad():
            for parameter in engine.routers.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        engine.save(path)
    return path


def _encoded(name: str, delta: torch.Tensor, rank: int, dtype: torch.dtype) -> Plane:
    if name in ("byte", "narrow", "fixed", "mixed", "groups", "bytes", "odd"):
        return Int8.encode(delta, {"groups": 64, "bytes": 32, "odd": 32}.get(name, 1024))
    if name in ("half", "nibble"):
        return Int4.encode(delta, 32)
    if name in ("low", "lower", "crooked", "thinner", "beside", "cut"):
        found = LowRank.encode(delta, rank)
        return LowRank.of_factors(*(f.to(dtype).float() for f in (found.b, found.a)), delta.shape)
    return Dense.encode(delta, dtype)


def equal(got: np.ndarray, truth: np.ndarray) -> bool:
    """Bit for bit, but for the sign of a zero: the CPU skips weights of zero, the kernel multiplies by them."""
    if got.dtype == np.uint16:
        got, truth = (np.where(a & 0x7FFF == 0, 0, a) for a in (got, truth))
    return got.shape == truth.shape and bool(np.array_equal(got, truth))


ROUNDING = {"float32": 2.0**-20, "float16": 2.0**-9, "uint16": 2.0**-7}
"""By how much of a tensor's largest number two orders of the same sums may differ; uint16 is bfloat16."""


def assert_cpu_results(device: dict[str, Any], host: dict[str, Any], *, bits: bool = True) -> None:
    """The CPU's bits, but in tensors whose planes are decoded: those are rounded once more. Or near them in all."""
    assert device.keys() == host.keys()
    near = set(DECODED) & host.keys() if bits else {name for name in host if _is_float(host[name])}
    assert [name for name in host if name not in near and not equal(device[name], host[name])] == []
    for name in near:
        got, truth = (_floats(found[name]) for found in (device, host))
        error = float(abs(got - truth).max(initial=0.0))
        assert error <= ROUNDING[str(host[name].dtype)] * float(abs(truth).max(initial=0.0)), name


def assert_same_merge(engine: Engine, cuda: Cuda, weights: np.ndarray, stream: int) -> None:
    """Both merge at routing weights, and the device has the CPU's results."""
    engine.switch_weights(weights)
    cuda.switch_weights(weights, stream)
    assert_cpu_results(cuda.tensors(stream), engine.tensors())


def _is_float(array: np.ndarray) -> bool:
    return str(array.dtype) in ROUNDING


def _floats(array: np.ndarray) -> np.ndarray:
    """Float64; bfloat16 comes as its bits."""
    if array.dtype == np.uint16:
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float64)


STORES: dict[str, Callable[[Path], Path]] = {
    "float32": lambda path: net_store(path),
    "bfloat16": lambda path: net_store(path, dtype=torch.bfloat16),
    "float16, a group for each tensor": lambda path: net_store(path, dtype=torch.float16, route="tensor"),
    "bfloat16 deltas": lambda path: net_store(path, delta_dtype=torch.bfloat16),
    "one expert": lambda path: net_store(path, count=1),
    "eight experts": lambda path: net_store(path, count=8, route="tensor"),
    "experts of one objective and of none": lambda path: net_store(
        path, count=4, objectives={"x": ["a", "c"], "y": ["b"]}
    ),
    "planes of every format": lambda path: planes_store(path),
    "planes of every format, bfloat16": lambda path: planes_store(path, torch.bfloat16),
    "row coefficients": lambda path: planes_store(path, by_row=True),
    "row coefficients, float16": lambda path: planes_store(path, torch.float16, by_row=True),
    "static tensors": lambda path: net_store(path, route=lambda n: "one" if "first" in n else None),
}
