"""Flat buffers and dense deltas, on the CPU, where no kernel reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import paretofuse as pf
from paretofuse.engine.engine import Engine
from paretofuse.engine.merging.bound import BoundStack
from paretofuse.engine.merging.flat import DenseDeltas, flatten
from paretofuse.engine.planes.plane import nbytes
from tests.support.memory import HeldBytes
from tests.support.models import perturbed


def stacked(planes: str = "dense") -> Engine:
    """A layer whose bias is static, an expert, and another that leaves the weight unchanged."""
    base = nn.Linear(64, 64)
    other = perturbed(base, 2)
    other.weight.data.copy_(base.weight.data)
    return pf.stack(
        base,
        {"a": perturbed(base, 1), "b": other},
        planes=planes,
        route=lambda n: n if n == "weight" else None,
    )


def test_dense_deltas_are_not_copied() -> None:
    stack = stacked()._stack
    given, absent = DenseDeltas(stack, []).where_they_lie("weight")
    assert given is not None
    assert given.data_ptr() == stack.planes[0]["weight"].tensors()[""].data_ptr()
    assert absent is None


def test_other_planes_are_decoded() -> None:
    stack = stacked("int8")._stack
    assert stack.planes[0]["weight"].format == "int8"
    found = DenseDeltas(stack, []).where_they_lie("weight")
    assert isinstance(found, torch.Tensor)
    assert torch.equal(found[0], stack.planes[0]["weight"].decode().to(found.dtype))
    assert not found[1].any()


@pytest.mark.parametrize("planes", ["dense", "int8"])
def test_what_is_made_in_inference_mode_can_be_written_to_outside(planes: str) -> None:
    engine = stacked(planes)
    stack, weights = engine._stack, torch.rand(2, len(engine.groups), 2)
    bound = BoundStack(stack, "reference")
    with torch.inference_mode():
        made = [*bound.merge(weights)[1].values(), *bound.static().values(), DenseDeltas(stack, [])["weight"]]
        if planes == "dense":
            flat = flatten(stack, {name: 0 for name in stack.base}, bound.places)[1]
            made += [
                tensor for inputs in flat for tensor in (inputs.base, inputs.stored.values, inputs.tiles)
            ]
    assert len(made) >= 3
    assert not any(tensor.is_inference() for tensor in made)


@pytest.mark.parametrize("planes", ["dense", "int8", "lowrank:4"])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_store_is_loaded_with_no_more_than_a_tensor_held_twice(
    planes: str, backend: str, tmp_path: Path
) -> None:
    """The meta device stands for a GPU: it has tensors and their bytes, but no numbers."""
    base = nn.Sequential(*(nn.Linear(256, 256) for _ in range(6)))
    pf.stack(base, {name: perturbed(base, seed) for seed, name in enumerate("ab")}, planes=planes).save(
        tmp_path / "store"
    )
    with HeldBytes(torch.device("meta")) as held:
        engine = pf.load(tmp_path / "store", device="meta", backend=backend)
    stack = engine._stack
    whole = sum(tensor.nbytes for tensor in stack.base.values())
    whole += sum(nbytes(plane) for own in stack.planes for plane in own.values())
    assert {tensor.device.type for tensor in stack.base.values()} == {"meta"}
    assert whole <= held.now <= held.peak <= 1.1 * whole  # small tensors take whole tiles
    with HeldBytes(torch.device("meta")) as twice:
        kept = [torch.empty(1000, device="meta").clone() for _ in range(3)]
    assert (twice.now, twice.peak) == (3 * 4000, 4 * 4000)
    del kept
    assert twice.now == 0


def test_what_is_loaded_elsewhere_no_longer_needs_the_files(tmp_path: Path) -> None:
    stacked().save(tmp_path / "store")
    engine = pf.load(tmp_path / "store", device="meta")
    (tmp_path / "store" / "base.safetensors").write_bytes(b"")
    engine._stack.check()
    with pytest.raises(pf.StoreError):
        pf.load(tmp_path / "store")
