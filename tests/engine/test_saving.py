"""An engine through a store: the training record, what it may replace, and verification."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import paretofuse as pf
from paretofuse.engine.errors import StoreError
from tests.support.models import net_and_experts


def test_a_training_record_goes_through_save_and_load(tmp_path: Path) -> None:
    base, experts = net_and_experts(count=2)
    engine = pf.stack(base, experts)
    assert engine.training is None
    engine.save(tmp_path / "store")
    engine.training = {"method": "ls", "steps": 3, "data": {"a": "x", "b": None}}
    engine.save(tmp_path / "store")
    loaded = pf.load(tmp_path / "store")
    assert loaded.training == engine.training
    loaded.save(tmp_path / "store")
    fresh = pf.stack(base, experts)
    with pytest.raises(ValueError, match=r"trained store \(method ls, steps 3\).*force=True"):
        fresh.save(tmp_path / "store")
    assert pf.load(tmp_path / "store").training == engine.training
    fresh.save(tmp_path / "store", force=True)
    assert pf.load(tmp_path / "store").training is None


def test_only_its_own_further_training_replaces_a_trained_store(tmp_path: Path) -> None:
    base, experts = net_and_experts(count=2)

    def trained(by: float) -> pf.Engine:
        engine = pf.stack(base, experts)
        further(engine, by)
        return engine

    def further(engine: pf.Engine, by: float) -> None:
        with torch.no_grad():
            engine.routers.output.bias.add_(by)

    def stored() -> float:
        return float(pf.load(tmp_path / "store").routers.output.bias.detach().mean())

    first = trained(1)
    first.save(tmp_path / "store")
    trained(1).save(tmp_path / "store")  # the same routers again: nothing is lost
    further(first, 1)
    first.save(tmp_path / "store")  # saved there before
    again = pf.load(tmp_path / "store")
    further(again, 1)
    again.save(tmp_path / "store")  # loaded from there
    assert stored() == 3
    for other in (trained(7), first):  # another training; one that has been overtaken
        with pytest.raises(ValueError, match=r"trained store .*replaced by another training.*force=True"):
            other.save(tmp_path / "store")
    assert stored() == 3
    first.save(tmp_path / "store", force=True)
    assert stored() == 2


def test_verification_at_load_finds_a_flipped_bit(tmp_path: Path) -> None:
    base, experts = net_and_experts(count=2)
    pf.stack(base, experts).save(tmp_path / "store")
    pf.load(tmp_path / "store", verify=True)
    file = tmp_path / "store" / "experts" / "b.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    pf.load(tmp_path / "store")
    with pytest.raises(StoreError, match=r"b\.safetensors: its checksum"):
        pf.load(tmp_path / "store", verify=True)


def test_another_default_device_changes_nothing(tmp_path: Path) -> None:
    base, experts = net_and_experts(count=2)
    x = torch.randn(3, 8)

    def numbers(folder: Path) -> list[torch.Tensor]:
        pf.stack(base, experts).save(folder / "store")
        engine = pf.load(folder / "store", module=base)
        engine.switch({"a": 0.3, "b": 0.7})
        results = [engine.module(x), engine.merge([0.3, 0.7])(x)]
        with engine.replica([1.0, 0.0]) as replica:
            results.append(replica(x))
        engine.train_at([0.3, 0.7])
        engine.module(x).square().sum().backward()  # type: ignore[no-untyped-call]
        results.append(engine.routers.output.bias.grad)
        results.append(engine.batched([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])(x))
        return [result.detach() for result in results]

    expected = numbers(tmp_path / "usual")
    with torch.device("meta"):
        found = numbers(tmp_path / "meta")
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
