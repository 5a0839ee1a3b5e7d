"""Mapped pages that a store lets go of are read from the file again."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest
from torch import nn

import paretofuse as pf
from paretofuse.engine.store.reader import Store
from tests.support.models import perturbed


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system may keep the pages")
@pytest.mark.skipif(mmap.PAGESIZE > 1 << 14, reason="the tensors are too few pages")
@pytest.mark.parametrize("planes", ["dense", "int8"])
def test_released_tensors_are_read_from_the_file_again(tmp_path: Path, planes: str) -> None:
    """What was written to a private mapping shows whether its pages are those of before."""
    base = nn.Sequential(nn.Linear(256, 1024), nn.Linear(1024, 256))
    unchanged = perturbed(base, 2)
    unchanged.load_state_dict({"0.weight": base[0].weight}, strict=False)
    engine = pf.stack(base, {"a": perturbed(base, 1), "b": unchanged}, planes=planes, route="tensor")
    engine.save(tmp_path / "store")
    store = Store.open(tmp_path / "store")
    views = {
        (number, name): view
        for name in ("0.weight", "1.weight")
        for number, part in enumerate((store.base, *store.deltas))
        if (view := part.get(name)) is not None
    }
    views |= {
        (number, name, part): getattr(plane, part)
        for number, own in enumerate(store.planes, start=1)
        for name, plane in own.items()
        for part in ("values", "factors")
        if getattr(plane, part) is not None
    }
    assert len(views) == (5 if planes == "dense" else 8)
    middle = {key: view.data[view.nbytes // 2 :][:1] for key, view in views.items()}
    before = {key: int(byte[0]) for key, byte in middle.items()}
    for byte in middle.values():
        byte[0] ^= 255
    store.release(["0.weight"])
    assert {key for key, byte in middle.items() if int(byte[0]) != before[key]} == {
        key for key in views if key[1] != "0.weight"
    }
