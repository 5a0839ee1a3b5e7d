"""Merging from disk to disk, against float64: every dtype, static, constant, tied and head tensors, odd batches."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file

from paretofuse.engine.errors import StoreError
from paretofuse.engine.layout import Layout, TensorSpec
from paretofuse.engine.merging import disk, native
from paretofuse.engine.merging.disk import merge_store
from paretofuse.engine.routing.routers import Routers
from paretofuse.engine.store.reader import Store
from paretofuse.engine.store.writer import StoreWriter
from tests.support.stored_parts import LAYOUT, PREFERENCE, SPECS, Parts


@pytest.fixture
def parts() -> Parts:
    return Parts(seed=5)


@pytest.mark.parametrize("batch", [8, 24, 64, 1 << 20])
@pytest.mark.parametrize("order", [1, -1])
def test_against_float64(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: Parts, batch: int, order: int
) -> None:
    # Small batches cut through tensors; the reversed order leaves tensors unaligned in the store's files.
    monkeypatch.setattr(disk, "BATCH_BYTES", batch)
    store = parts.write(tmp_path / "store", order)
    calls: list[tuple[int, int]] = []
    done = merge_store(store, PREFERENCE, tmp_path / "out", progress=lambda *call: calls.append(call))
    merged = safetensors.torch.load_file(done.path / "model.safetensors")
    with torch.no_grad():
        weights = parts.routers(PREFERENCE).numpy()
    parts.check(merged, weights)
    assert set(merged) == {spec.name for spec in SPECS}  # tied ones once
    assert done.tensors == len(SPECS)
    assert calls[-1] == (done.nbytes, done.nbytes)
    assert [call[0] for call in calls] == sorted(call[0] for call in calls)
    assert done.nbytes == sum(spec.nbytes for spec in SPECS)


@pytest.mark.parametrize("isa", [name for name, usable in native.instruction_sets().items() if usable])
@pytest.mark.parametrize("threads", [1, 3])
def test_instruction_sets_and_threads_give_the_same_bits(
    tmp_path: Path, parts: Parts, isa: str, threads: int
) -> None:
    store = parts.write(tmp_path / "store")
    best = merge_store(store, PREFERENCE, tmp_path / "best.safetensors")
    forced = merge_store(store, PREFERENCE, tmp_path / "forced.safetensors", isa=isa, threads=threads)
    assert forced.isa == isa
    assert forced.path.read_bytes() == best.path.read_bytes()


def test_weights_instead_of_a_preference(tmp_path: Path, parts: Parts) -> None:
    store = parts.write(tmp_path / "store")
    weights = np.random.default_rng(0).standard_normal((len(LAYOUT.groups), 3), dtype=np.float32)
    done = merge_store(store, None, tmp_path / "out.safetensors", weights=weights)
    parts.check(safetensors.torch.load_file(done.path), weights)


@pytest.mark.parametrize("init", ["identity", "sqrt", "constant"])
@pytest.mark.parametrize("experts", [1, 2, 7, 40])
def test_routers_without_torch_agree_with_torch(tmp_path: Path, init: str, experts: int) -> None:
    objectives = tuple(f"e{e}" for e in range(experts))
    specs = tuple(TensorSpec(f"w{g}", (1,), "F32", "routed", f"g{g}", "F32") for g in range(3))
    layout = Layout(objectives, specs, 0.3)
    generator = torch.Generator().manual_seed(experts)
    routers = Routers(layout.groups, objectives, init, seed=3)
    with torch.no_grad():
        for parameter in routers.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    with StoreWriter(tmp_path / "store", objectives=objectives) as writer:
        writer.write_routers(init, {name: tensor.numpy() for name, tensor in routers.state_dict().items()})
        writer.write_base([(s.name, s.dtype, s.shape, [bytes(4)]) for s in specs])
        for objective in objectives:
            writer.write_expert(objective, [])
        writer.finish(layout)
    store = Store.open(tmp_path / "store")
    for seed in range(20):
        preference = np.random.default_rng(seed).dirichlet(np.ones(experts))
        with torch.no_grad():
            expected = routers(preference).numpy()
        got = store.routing_weights(preference)
        assert (got.dtype, got.shape) == (np.float32, (3, experts))
        np.testing.assert_array_max_ulp(got, expected, maxulp=1)
    with pytest.raises(ValueError, match="sum"):
        store.routing_weights(np.full(experts, 2.0))


def test_heads(tmp_path: Path, parts: Parts) -> None:
    store = parts.write(tmp_path / "store")
    merge_store(store, PREFERENCE, tmp_path / "out", head="y")
    merged = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(merged.pop("classifier"), torch.full((3, 2), 7.0))
    assert torch.equal(merged.pop("further"), torch.ones(1, dtype=torch.bfloat16))
    assert set(merged) == {spec.name for spec in SPECS} - {"classifier"}
    assert (tmp_path / "out" / "config.json").read_bytes() == b'{"labels": 3}'
    assert (tmp_path / "out" / "sub" / "merges.txt").read_bytes() == b"a b"


def test_earlier_merges_are_replaced_and_nothing_else(tmp_path: Path, parts: Parts) -> None:
    store = parts.write(tmp_path / "store")
    out = tmp_path / "out"
    merge_store(store, {"x": 1}, out)
    first = (out / "model.safetensors").read_bytes()
    merge_store(store, {"y": 1}, out)
    assert (out / "model.safetensors").read_bytes() != first
    (out / "notes.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"another file \(notes\.txt\)"):
        merge_store(store, {"x": 1}, out)
    with pytest.raises(ValueError, match="another file"):
        merge_store(store, {"x": 1}, store)
    Store.open(store).verify()
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ValueError, match="is a file"):
        merge_store(store, {"x": 1}, tmp_path / "file")
    (tmp_path / "d.safetensors").mkdir()
    with pytest.raises(ValueError, match="is a directory"):
        merge_store(store, {"x": 1}, tmp_path / "d.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.safetensors", "file", "out", "store"]


def test_models_that_no_merge_wrote_are_not_replaced(tmp_path: Path, parts: Parts) -> None:
    store = parts.write(tmp_path / "store")
    merge_store(store, {"x": 1}, tmp_path / "out")
    mine = tmp_path / "mine"
    mine.mkdir()
    save_file({"w": torch.ones(2)}, mine / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "cut.safetensors").write_bytes(b"precious")
    for target in (mine, mine / "model.safetensors", tmp_path / "cut.safetensors"):
        with pytest.raises(ValueError, match="not written by a merge"):
            merge_store(store, {"x": 1}, target)
    assert torch.equal(load_file(mine / "model.safetensors")["w"], torch.ones(2))
    (tmp_path / "link").symlink_to("out")
    merge_store(store, {"y": 1}, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut.safetensors", "link", "mine", "out", "store"]


@pytest.mark.parametrize("target", ["out", "out.safetensors"])
def test_a_failure_leaves_the_earlier_merge(tmp_path: Path, parts: Parts, target: str) -> None:
    store = parts.write(tmp_path / "store")
    out = merge_store(store, {"x": 1}, tmp_path / target).path
    weights = out / "model.safetensors" if out.is_dir() else out
    before = weights.read_bytes()

    def fails(done: int, total: int) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        merge_store(store, {"y": 1}, out, progress=fails)
    assert weights.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([target, "store"])


@pytest.mark.parametrize("limit", [100, 3000])
def test_a_disk_without_space_is_told_with_the_file(tmp_path: Path, parts: Parts, limit: int) -> None:
    # A limit on the size of files is what a full disk looks like to a process, up to the error's number.
    store = parts.write(tmp_path / "store")
    script = f"""
import resource, signal
from paretofuse.engine.merging.disk import merge_store
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    merge_store({str(store)!r}, {{"x": 1}}, {str(tmp_path / "out.safetensors")!r})
except OSError as error:
    print(error.errno, error.filename)
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    number, name = done.stdout.split(maxsplit=1)
    assert int(number) == errno.EFBIG
    assert name.startswith(str(tmp_path / ".out.safetensors."))
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize(
    ("preference", "options", "words"),
    [
        ({"x": 0.5}, {}, "sum"),
        ({"w": 1.0}, {}, "'w'"),
        (None, {}, "both or neither"),
        ({"x": 1}, {"weights": np.zeros((3, 3), np.float32)}, "both or neither"),
        (None, {"weights": np.zeros((2, 3), np.float32)}, "shape"),
        (None, {"weights": np.full((3, 3), np.nan, np.float32)}, "finite"),
        ({"x": 1}, {"head": "x"}, "'x', expected one that the store has: 'y'"),
        ({"x": 1}, {"isa": "magic"}, "magic"),
        ({"x": 1}, {"threads": 0}, "threads"),
    ],
)
def test_refusals(tmp_path: Path, parts: Parts, preference: Any, options: dict[str, Any], words: str) -> None:
    store = parts.write(tmp_path / "store")
    with pytest.raises(ValueError, match=words):
        merge_store(store, preference, tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="not a store"):
        merge_store(tmp_path, {"x": 1}, tmp_path / "out")


def test_merges_of_a_tied_model_load_with_from_pretrained(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    import paretofuse as pf

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=37, n_positions=8)
    models = []
    for seed in range(3):
        torch.manual_seed(seed)
        models.append(transformers.GPT2LMHeadModel(config).eval())
    engine = pf.stack(models[0], {"x": models[1], "y": models[2]}, route="tensor")
    engine.save(tmp_path / "store")
    merge_store(tmp_path / "store", {"x": 0.25, "y": 0.75}, tmp_path / "out")
    loaded, report = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    expected = engine.merge({"x": 0.25, "y": 0.75})
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, expected.eval()(tokens).logits, rtol=0, atol=1e-6)
    moved = models[1].transformer.wte.weight - models[0].transformer.wte.weight
    assert bool(moved.abs().max() > 0)  # the check would mean nothing for equal models
