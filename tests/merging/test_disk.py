"""Merging from disk to disk, against float64: every dtype, static, constant, tied and head tensors, odd batches."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file

from paretofuse.engine.dtypes import TO_TORCH
from paretofuse.engine.errors import StoreError
from paretofuse.engine.layout import Layout, TensorSpec
from paretofuse.engine.merging import disk, native
from paretofuse.engine.merging.disk import merge_store
from paretofuse.engine.planes.lowrank import LowRank
from paretofuse.engine.routing.routers import Routers
from paretofuse.engine.store.reader import Store
from paretofuse.engine.store.writer import StoreWriter

EPSILON = {"F32": 2**-23, "BF16": 2**-7, "F16": 2**-10}
PREFERENCE = {"x": 0.5, "y": 0.2, "z": 0.3}
SPECS = (
    TensorSpec("embedding", (31, 7), "F32", "routed", "top", "F32", ("head.tied",)),
    TensorSpec("a.weight", (13, 5), "F32", "routed", "a", "BF16"),
    TensorSpec("a.bias", (5,), "F32", "static", None, "F16"),
    TensorSpec("b.weight", (3, 3, 3), "BF16", "routed", "b", "BF16"),
    TensorSpec("b.bias", (1,), "BF16", "static", None, "F32"),
    TensorSpec("c.weight", (129,), "F16", "routed", "a", "F16"),
    TensorSpec("empty", (0, 3), "F16", "routed", "a", "F16"),
    TensorSpec("steps", (), "I64", "constant", None, "I64"),
    TensorSpec("mask", (3, 3), "BOOL", "constant", None, "BOOL"),
    TensorSpec("classifier", (2, 2), "F32", "constant", None, "F32"),
)
LAYOUT = Layout(("x", "y", "z"), SPECS, -0.4)


class Parts:
    """Random tensors of a stack, and its merge in float64."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.base: dict[str, torch.Tensor] = {}
        self.deltas: list[dict[str, torch.Tensor]] = [{}, {}, {}]
        for index, spec in enumerate(SPECS):
            values = torch.randn(spec.shape, generator=generator)
            self.base[spec.name] = (values * 3).to(TO_TORCH[spec.dtype])
            for expert, own in enumerate(self.deltas):
                if spec.role != "constant" and (index + expert) % 3:  # every third is unchanged
                    delta = torch.randn(spec.shape, generator=generator)
                    own[spec.name] = delta.to(TO_TORCH[spec.delta_dtype])
        self.routers = Routers(LAYOUT.groups, LAYOUT.objectives, "sqrt")
        with torch.no_grad():
            for parameter in self.routers.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)

    def write(self, path: Path, order: int = 1) -> Path:
        def data(tensors: dict[str, torch.Tensor]) -> list[Any]:
            specs = [spec for spec in SPECS if spec.name in tensors][::order]
            return [
                (s.name, s.dtype if tensors is self.base else s.delta_dtype, s.shape, [raw(tensors[s.name])])
                for s in specs
            ]

        with StoreWriter(path, objectives=LAYOUT.objectives) as writer:
            writer.write_base(data(self.base))
            for objective, own in zip(LAYOUT.objectives, self.deltas, strict=True):
                writer.write_expert(objective, data(own))
            state = self.routers.state_dict()
            writer.write_routers("sqrt", {name: tensor.numpy() for name, tensor in state.items()})
            writer.write_head("y", [("classifier", "F32", (3, 2), [np.full((3, 2), 7, np.float32)]),
                                    ("further", "BF16", (1,), [b"\x80\x3f"])])  # fmt: skip
            writer.add_model_file("config.json", b'{"labels": 2}')
            writer.add_model_file("sub/merges.txt", b"a b")
            writer.add_head_file("y", "config.json", b'{"labels": 3}')
            writer.finish(LAYOUT)
        return path

    def check(self, merged: dict[str, torch.Tensor], weights: np.ndarray) -> None:
        """Compare with the merge in float64; the bound is float32 accumulation and one rounding."""
        for spec in SPECS:
            base = self.base[spec.name]
            got = merged[spec.name]
            assert (got.dtype, got.shape) == (base.dtype, base.shape)
            if spec.role == "constant":
                assert torch.equal(got, base)
                continue
            row = weights[LAYOUT.groups.index(spec.group)] if spec.group else [LAYOUT.static_weight] * 3
            exact = base.double()
            size = base.double().abs()
            for weight, own in zip(row, self.deltas, strict=True):
                if spec.name in own:
                    exact = exact + float(weight) * own[spec.name].double()
                    size = size + abs(float(weight)) * own[spec.name].double().abs()
            bound = EPSILON[spec.dtype] / 2 * exact.abs() + 4 * EPSILON["F32"] * size + 2**-25
            assert bool(((got.double() - exact).abs() <= bound).all()), spec.name


def raw(tensor: torch.Tensor) -> np.ndarray:
    return tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else np.empty(0, np.uint8)


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
