"""Merging from disk to disk of models larger than memory: peaks, and weights in several files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from paretofuse.engine.layout import Layout, TensorSpec
from paretofuse.engine.merging import disk
from paretofuse.engine.merging.disk import merge_store
from paretofuse.engine.planes.lowrank import LowRank
from paretofuse.engine.routing.routers import Routers
from paretofuse.engine.store.reader import Store
from paretofuse.engine.store.writer import StoreWriter
from tests.support.stored_parts import PREFERENCE, SPECS, Parts


@pytest.fixture
def parts() -> Parts:
    return Parts(seed=5)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak resident memory from /proc")
def test_memory_stays_small(tmp_path: Path) -> None:
    # 3 experts and the base map 192 MB; the process may hold two batches of output and the pages of one batch.
    specs = (TensorSpec("w", (24_000, 1000), "BF16", "routed", "g", "BF16"),)
    layout = Layout(("x", "y", "z"), specs, 0.3)
    block = np.random.default_rng(0).integers(0, 2**14, 1_000_000, dtype=np.uint16)
    with StoreWriter(tmp_path / "store", objectives=layout.objectives) as writer:
        writer.write_base([("w", "BF16", specs[0].shape, [block] * 24)])
        for objective in layout.objectives:
            writer.write_expert(objective, [("w", "BF16", specs[0].shape, [block] * 24)])
        state = Routers(layout.groups, layout.objectives).state_dict()
        writer.write_routers("identity", {name: tensor.numpy() for name, tensor in state.items()})
        writer.finish(layout)
    assert _peak_of_a_merge(tmp_path, [0.2, 0.3, 0.5]) < 80  # MiB


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak resident memory from /proc")
@pytest.mark.parametrize("word", ["int8", "lowrank:8"])
def test_memory_stays_small_with_planes(tmp_path: Path, word: str) -> None:
    # The base and what the planes make of it are 128 MB each; low-rank pieces are whole rows.
    import paretofuse as pf

    base = {"w": torch.randn(8000, 4000)}
    one, two = torch.randn(8000, 1), torch.randn(1, 4000)
    engine = pf.stack(base, {"x": {"w": base["w"] + one @ two}}, planes=word if word == "int8" else "dense")
    if word != "int8":
        engine._stack.planes[0]["w"] = LowRank(one, two, (8000, 4000))
    engine.save(tmp_path / "store")
    assert Store.open(tmp_path / "store").planes[0]["w"].format == word.partition(":")[0]
    assert _peak_of_a_merge(tmp_path, [1.0]) < 80  # MiB


def _peak_of_a_merge(folder: Path, preference: list[float]) -> float:
    """MiB that a process merging folder/store holds at once, above what it held before."""
    script = f"""
from paretofuse.engine.merging.disk import merge_store
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
before = peak()
merge_store({str(folder / "store")!r}, {preference}, {str(folder / "out")!r})
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return float(done.stdout)


def sharded(store: Path, out: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> list[str]:
    """Merge with weight files of so many bytes at most; the names of those that were written."""
    with monkeypatch.context() as patch:
        patch.setattr(disk, "SHARD_BYTES", most)
        merge_store(store, PREFERENCE, out)
    return sorted(path.name for path in out.glob("*.safetensors"))


def test_large_models_are_cut_into_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: Parts
) -> None:
    store, out = parts.write(tmp_path / "store"), tmp_path / "out"
    total = sum(spec.nbytes for spec in SPECS)
    names = sharded(store, out, monkeypatch, 100)
    count = len(names)
    assert count > 2
    assert names == [f"model-{n + 1:05}-of-{count:05}.safetensors" for n in range(count)]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {
        "total_parameters": sum(spec.numel for spec in SPECS),
        "total_size": total,
    }
    merged: dict[str, torch.Tensor] = {}
    for name in names:
        own = safetensors.torch.load_file(out / name)
        assert {index["weight_map"][tensor] for tensor in own} == {name}
        size = sum(tensor.numel() * tensor.element_size() for tensor in own.values())
        assert size <= 100 or len(own) == 1
        merged |= own
    assert index["weight_map"].keys() == merged.keys() == {spec.name for spec in SPECS}
    with torch.no_grad():
        parts.check(merged, parts.routers(PREFERENCE).numpy())
    # Another number of files takes the place of these, and one file needs no index.
    assert len(sharded(store, out, monkeypatch, 1000)) < count
    assert sharded(store, out, monkeypatch, total) == ["model.safetensors"]
    assert not (out / "model.safetensors.index.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(disk, "SHARD_BYTES", 1)
        merge_store(store, PREFERENCE, tmp_path / "one.safetensors")
    assert safetensors.torch.load_file(tmp_path / "one.safetensors").keys() == merged.keys()


def test_weight_files_of_others_are_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: Parts
) -> None:
    store, out = parts.write(tmp_path / "store"), tmp_path / "out"
    for name in ("model-00001-of-00002.safetensors", "model.safetensors"):
        out.mkdir()
        safetensors.torch.save_file({"w": torch.ones(2)}, out / name)
        with pytest.raises(ValueError, match=f"{name}, which exists and was not written by a merge"):
            sharded(store, out, monkeypatch, 100)
        assert safetensors.torch.load_file(out / name)["w"].sum() == 2
        shutil.rmtree(out)
    for name in (
        "model.safetensors.index.json",
        "model-1-of-2.safetensors",
        "other-00001-of-00002.safetensors",
    ):
        out.mkdir()
        (out / name).write_text("{}")
        with pytest.raises(ValueError, match=rf"holds another file \({name}\)"):
            sharded(store, out, monkeypatch, 100)
        shutil.rmtree(out)


def test_a_model_in_several_files_is_what_transformers_writes_and_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    import paretofuse as pf

    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=37, n_positions=8)
    torch.manual_seed(0)
    base = transformers.GPT2LMHeadModel(config).eval()
    torch.manual_seed(1)
    engine = pf.stack(base, {"x": transformers.GPT2LMHeadModel(config).eval()})
    engine.save(tmp_path / "store")
    with monkeypatch.context() as patch:
        patch.setattr(disk, "SHARD_BYTES", 10_000)
        merge_store(tmp_path / "store", [1.0], tmp_path / "out")
    expected = engine.merge([1.0])
    expected.save_pretrained(tmp_path / "theirs", max_shard_size=10_000)
    ours, theirs = (
        json.loads((tmp_path / folder / "model.safetensors.index.json").read_text())
        for folder in ("out", "theirs")
    )
    assert ours["metadata"].items() >= theirs["metadata"].items()
    assert ours["weight_map"].keys() == theirs["weight_map"].keys()
    loaded, report = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, tensor in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    # It is a base again.
    again = pf.stack(tmp_path / "out", {"x": tmp_path / "theirs"})
    for name, tensor in again.merge_state_dict([1.0]).items():
        assert torch.equal(tensor, expected.state_dict()[name])
