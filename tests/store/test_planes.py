"""Stores with planes of every format: written and read again, merged from disk, and refused where they lie."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import paretofuse as pf
from paretofuse.api import stack_to_store
from paretofuse.cli import main
from paretofuse.engine.errors import StoreError
from paretofuse.engine.layout import Layout, TensorSpec
from paretofuse.engine.merging import disk, native
from paretofuse.engine.planes.dense import Dense
from paretofuse.engine.planes.int4 import Int4
from paretofuse.engine.planes.int8 import Int8
from paretofuse.engine.planes.lowrank import LowRank
from paretofuse.engine.planes.plane import Plane
from paretofuse.engine.routing.routers import Routers
from paretofuse.engine.stacking import persist, sources
from paretofuse.engine.stacking.sources import Blueprint
from paretofuse.engine.stacking.stack import Stack
from paretofuse.engine.store.reader import Store
from tests.engine.test_planes import Two, lora, two_experts
from tests.support.models import tiny_gpt2

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # of peft

R = {"a": 0.2, "b": 0.8}
WORDS = ["dense", "int8", "int4", "lowrank:5"]


def mixed_store(path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A store of a few kB whose two experts hold every format side by side, odd sizes and absent planes."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"whole": (5, 7), "byte": (32, 33), "half": (16, 64), "odd": (9, 11), "low": (6, 2, 3)}
    name = {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]
    specs = [TensorSpec(f"{n}.weight", s, name, "routed", n, name) for n, s in shapes.items()]
    specs.append(TensorSpec("bias", (3,), name, "static", None, name))
    base = {spec.name: torch.randn(spec.shape, generator=generator).to(dtype) for spec in specs}

    def delta(spec: TensorSpec) -> torch.Tensor:
        return 0.1 * torch.randn(spec.shape, generator=generator)

    planes: list[dict[str, Plane]] = []
    for group, rank in ((32, 2), (256, 3)):
        whole, byte, half, odd, low, bias = map(delta, specs)
        planes.append(
            {
                "whole.weight": Dense.encode(whole, dtype),
                "byte.weight": Int8.encode(byte, group),
                "half.weight": Int4.encode(half, group),
                "odd.weight": Int4.encode(odd, group),
                "low.weight": LowRank.of_factors(
                    *(f.to(dtype).float() for f in _factors(low, rank)), low.shape
                ),
                "bias": Dense.encode(bias, dtype),
            }
        )
    del planes[0]["whole.weight"], planes[1]["odd.weight"]
    planes[1]["byte.weight"] = Dense.encode(delta(specs[1]), dtype)
    layout = Layout(("a", "b"), tuple(specs), 0.3)
    stack = Stack(layout, base, tuple(planes), {})
    persist.save(path, stack, Routers(layout.groups, layout.objectives, "identity"), Blueprint())
    return path


def _factors(delta: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    plane = LowRank.encode(delta, rank)
    return plane.b, plane.a


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("word", WORDS)
def test_what_is_saved_is_read_again(word: str, dtype: torch.dtype, tmp_path: Path) -> None:
    engine = two_experts(word, dtype=dtype)
    engine.save(tmp_path / "store")
    again = pf.load(tmp_path / "store", module=Two())
    assert again.planes == engine.planes
    ours, theirs = engine.merge_state_dict(R), again.merge_state_dict(R)
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())
    version = json.loads((tmp_path / "store" / "manifest.json").read_text())["version"]
    assert version == (1 if word == "dense" else 2)


@pytest.mark.parametrize("batch", [1, 5000, 8 << 20])
@pytest.mark.parametrize("word", WORDS)
def test_merging_from_disk_gives_the_same_bits(
    word: str, batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "BATCH_BYTES", max(batch, 8))
    engine = two_experts(word)
    engine.save(tmp_path / "store")
    expected = engine.merge_state_dict(R)
    for isa in [name for name, usable in native.instruction_sets().items() if usable]:
        disk.merge_store(tmp_path / "store", R, tmp_path / "merged.safetensors", isa=isa)
        merged = load_file(tmp_path / "merged.safetensors")
        assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_formats_side_by_side_merge_alike_in_memory_from_disk_and_to_float64(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = pf.load(mixed_store(tmp_path / "store", dtype))
    merged = engine.merge_state_dict(R)
    for spec in engine.layout.tensors:
        shares = R.values() if spec.role == "routed" else (0.3, 0.3)
        exact = engine._stack.base[spec.name].double()
        for share, own in zip(shares, engine._stack.planes, strict=True):
            if spec.name in own:
                exact = exact + share * own[spec.name].decode().double()
        step = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-20
        assert ((merged[spec.name].double() - exact).abs() <= step * exact.abs().clamp(min=0.1)).all()
    for batch in (1, 1000, 8 << 20):
        monkeypatch.setattr(disk, "BATCH_BYTES", max(batch, 8))
        disk.merge_store(tmp_path / "store", R, tmp_path / "merged.safetensors")
        written = load_file(tmp_path / "merged.safetensors")
        assert written.keys() == merged.keys()
        assert all(torch.equal(written[name], tensor) for name, tensor in merged.items())


def gpt2_with_loras(folder: Path) -> Path:
    """A store of a GPT-2 and two LoRA experts, and the base beside it."""
    base = tiny_gpt2()
    base.save_pretrained(folder / "base")
    modules = ["c_attn", "c_fc"]
    experts = {
        name: lora(base, folder / name, i, 4 + i, target_modules=modules, fan_in_fan_out=True)
        for i, name in enumerate("ab")
    }
    stack_to_store(folder / "base", experts, folder / "store", planes="auto", route="tensor")
    return folder / "store"


def test_lora_experts_are_megabytes_and_merge_without_torch(tmp_path: Path) -> None:
    store = gpt2_with_loras(tmp_path)
    opened = Store.open(store)
    assert all(not deltas for deltas in opened.deltas)
    assert {plane.format for own in opened.planes for plane in own.values()} == {"lowrank"}
    names = set(load_file(store / "experts" / "a.safetensors"))
    assert "transformer.h.0.attn.c_attn.lora_A.weight" in names
    assert main(["merge", str(store), "--preference", "a=0.2,b=0.8", "-o", str(tmp_path / "merged")]) == 0
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    expected = pf.load(store).merge_state_dict(R)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged.items())


def test_lora_experts_cost_no_pass_over_the_base_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, passes = Two(), Counter[str]()
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    experts = {
        f"e{i}": lora(base, tmp_path / f"e{i}", i, 3, target_modules=["first", "second"]) for i in range(3)
    }
    plain = sources.Source.blocks

    def count(source: sources.Source, name: str) -> Iterator[torch.Tensor]:
        passes[name] += source.label.startswith("the base")
        return plain(source, name)

    monkeypatch.setattr(sources.Source, "blocks", count)
    stack_to_store(tmp_path / "base.safetensors", experts, tmp_path / "store", planes="auto")
    assert passes == dict.fromkeys(base.state_dict(), 1)


def test_the_command_line_stacks_and_tells_planes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    state = Two().state_dict()
    save_file(state, tmp_path / "base.safetensors")
    save_file({n: t + 0.01 * torch.randn_like(t) for n, t in state.items()}, tmp_path / "a.safetensors")
    words = ["stack", str(tmp_path / "base.safetensors"), "--expert", f"a={tmp_path / 'a.safetensors'}"]
    assert main([*words, "-o", str(tmp_path / "store"), "--planes", "int8", "--json"]) == 0
    planes = json.loads(capsys.readouterr().out)["planes"]
    assert planes["int8"]["count"] == 2
    assert 0 < planes["int8"]["largest_error"] < 0.01
    assert planes["dense"]["count"] == 4
    assert main(["info", str(tmp_path / "store")]) == 0
    assert "2 int8 (" in capsys.readouterr().out


@pytest.mark.parametrize(("dtype", "matrices"), [(torch.bfloat16, "int8"), (torch.float32, "dense")])
def test_the_command_line_takes_int8_where_the_merged_model_is_as_exact(
    dtype: torch.dtype, matrices: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    state = {name: tensor.to(dtype) for name, tensor in Two().state_dict().items()}
    experts = {e: {n: (t + 0.002 * torch.randn_like(t)).to(dtype) for n, t in state.items()} for e in "ab"}
    words = ["stack", str(tmp_path / "base.safetensors"), "-o", str(tmp_path / "store"), "--quiet"]
    for name, tensors in {"base": state, **experts}.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        words += [] if name == "base" else ["--expert", f"{name}={tmp_path / name}.safetensors"]
    assert main(words) == 0
    capsys.readouterr()
    assert main(["info", str(tmp_path / "store"), "--planes", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["plane_table"]
    table = {row["tensor"]: row for row in rows if row["objective"] == "a"}
    assert table.keys() == state.keys()
    engine, dense = pf.load(tmp_path / "store"), pf.stack(state, experts)
    share = 0.5**0.5  # of one of two planes alone
    weights = torch.tensor([[share, 0.0]]).expand(len(engine.groups), -1)
    merged, rounded = (e.merge_state_dict(weights=weights) for e in (engine, dense))
    for name, before in state.items():
        row = table[name]
        assert row["format"] == (matrices if before.dim() > 1 else "dense")
        if row["format"] == "dense":  # norms and biases are exact
            assert torch.equal(merged[name], rounded[name])
            assert row["bytes"] == before.numel() * before.element_size()
            continue
        assert row["bytes"] < 1.13 * before.numel()
        update = share * (experts["a"][name].double() - before.double())
        errors = [
            float((m[name] - before.double() - update).norm() / update.norm()) for m in (merged, rounded)
        ]
        assert row["error"] == pytest.approx(errors[0], rel=1e-3)
        assert errors[0] <= 1.02 * errors[1]
    assert main(["info", str(tmp_path / "store"), "--planes"]) == 0
    assert "a: norm.bias: dense, " in capsys.readouterr().out


def test_packed_numbers_read_as_compressed_tensors_lays_them_out(tmp_path: Path) -> None:
    engine = two_experts("int4")
    engine.save(tmp_path / "store")
    held = load_file(tmp_path / "store" / "experts" / "a.safetensors")
    packed, scale = held["first.weight_packed"], held["first.weight_scale"]
    assert (packed.dtype, packed.shape, scale.shape) == (torch.int32, (96, 8), (96, 2))
    words = torch.from_numpy(packed.numpy().view(np.uint32).astype(np.int64))
    numbers = torch.stack([(words >> (4 * i)) & 15 for i in range(8)], dim=-1).view(96, 64) - 8
    decoded = numbers.float() * scale.repeat_interleave(32, dim=1)
    assert torch.equal(decoded, engine._stack.planes[0]["first.weight"].decode())


def plane(**changes: Any) -> Callable[[dict[str, Any]], None]:
    """Changes what the manifest says of one plane."""

    def edit(manifest: dict[str, Any]) -> None:
        manifest["planes"]["a"]["first.weight"].update(changes)

    return edit


CONSTANT = {"role": "constant", "group": None}


def tensor(manifest: dict[str, Any], name: str) -> int:
    """Where the manifest's table has a tensor."""
    return [spec["name"] for spec in manifest["tensors"]].index(name)


def planes(value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest.update(planes=value)


PLANE_ATTACKS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "no planes": (lambda m: m.pop("planes"), "'planes'"),
    "planes are a list": (planes([]), "'planes'"),
    "of no objective": (lambda m: m["planes"].update(c={}), "got planes for 'c'"),
    "of no tensor": (lambda m: m["planes"]["a"].update(nothing={"format": "int8", "group": 32}), "'nothing'"),
    "no object": (lambda m: m["planes"]["a"].update({"first.weight": 3}), "for a plane, expected an object"),
    "unknown format": (plane(format="int5"), "got a plane of format 'int5'"),
    "no group": (plane(group=None), "has no group"),
    "negative group": (plane(group=-32), "has no group"),
    "odd group": (plane(group=33), "has groups of 33 elements"),
    "huge group": (plane(group=1 << 62), "elements, expected a power of two from 32 to 1024"),
    "another group": (plane(group=64), "the manifest says F32"),
    "overflowing shape": (
        lambda m: m["tensors"][tensor(m, "first.weight")].update(shape=[1 << 40, 1 << 40]),
        "expected one with elements",
    ),
    "no elements": (
        lambda m: m["tensors"][tensor(m, "first.weight")].update(shape=[0, 1 << 40, 1 << 40]),
        "expected one with elements",
    ),
    "of a constant": (lambda m: m["tensors"][tensor(m, "first.weight")].update(CONSTANT), "which has none"),
    "huge rank": (plane(format="lowrank", rank=1 << 62), "has rank 4611686018427387904"),
    "rank of nothing": (
        plane(format="lowrank", rank=3),
        "'first.lora_A.weight' of the manifest's planes is missing",
    ),
    "another format": (plane(format="int4"), "the manifest says I32"),
    "dense after all": (lambda m: m["planes"]["a"].pop("first.weight"), "is not in the manifest's table"),
    "version 1": (lambda m: m.update(version=1), "is not in the manifest's table"),
    "version 4": (lambda m: m.update(version=4), "made by a newer paretofuse"),
}


@pytest.fixture(scope="module")
def int8_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("planes") / "store"
    two_experts("int8").save(path)
    return path


@pytest.mark.parametrize("name", PLANE_ATTACKS)
def test_manifests_that_mean_harm_are_refused(name: str, int8_store: Path, tmp_path: Path) -> None:
    shutil.copytree(int8_store, tmp_path / "store")
    file = tmp_path / "store" / "manifest.json"
    manifest = json.loads(file.read_text())
    edit, message = PLANE_ATTACKS[name]
    edit(manifest)
    file.write_text(json.dumps(manifest))
    with pytest.raises(StoreError) as caught:
        Store.open(tmp_path / "store")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_plane_without_its_other_half_is_refused(int8_store: Path, tmp_path: Path) -> None:
    shutil.copytree(int8_store, tmp_path / "store")
    file = tmp_path / "store" / "experts" / "a.safetensors"
    held = load_file(file)
    del held["second.weight_scale"]
    save_file(held, file)
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    manifest["files"]["experts/a.safetensors"]["bytes"] = file.stat().st_size
    (tmp_path / "store" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match=r"'second.weight_scale' of the manifest's planes is missing"):
        Store.open(tmp_path / "store")


def test_two_planes_that_want_one_tensor_are_refused(tmp_path: Path) -> None:
    """Else the larger of them would be read beyond the end of the smaller."""
    generator = torch.Generator().manual_seed(0)
    names = ("w", "v_scale")  # the second is renamed to what holds the scales of the first
    base = {name: torch.randn(32, 32, generator=generator) for name in names}
    expert = {name: tensor + 0.1 for name, tensor in base.items()}
    pf.stack(base, {"a": expert}, planes="int8").save(tmp_path / "store")
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    manifest["tensors"][tensor(manifest, "v_scale")]["name"] = "w_scale"
    del manifest["planes"]["a"]["v_scale"]
    (tmp_path / "store" / "manifest.json").write_text(json.dumps(manifest))
    file = tmp_path / "store" / "base.safetensors"
    file.write_bytes(file.read_bytes().replace(b"v_scale", b"w_scale"))
    with pytest.raises(StoreError, match="'w_scale' would belong to two of the manifest's planes"):
        Store.open(tmp_path / "store")


def test_names_that_a_plane_needs_are_refused_before_the_store_is_there(tmp_path: Path) -> None:
    base = {"w": torch.randn(32, 32), "w_scale": torch.randn(5)}
    engine = pf.stack(base, {"a": {name: tensor + 0.1 for name, tensor in base.items()}}, planes="int8")
    with pytest.raises(ValueError, match=r"got tensor 'w_scale', whose name the int8 plane of 'w' needs"):
        engine.save(tmp_path / "store")
    assert not (tmp_path / "store").exists()
