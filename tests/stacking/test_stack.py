"""Stacking: every kind of input, ties, streaming, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import paretofuse as pf
from paretofuse.api import stack_to_store
from paretofuse.engine.planes.choose import parse
from paretofuse.engine.routing.groups import assign_groups
from paretofuse.engine.stacking import plan
from paretofuse.engine.stacking.sources import from_module, from_safetensors, from_state_dict
from tests.support.models import Net, net_and_experts, perturbed, same, tiny_gpt2


@pytest.fixture(scope="module")
def gpt2_dirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, dict[str, nn.Module], Path]:
    """A tiny GPT-2, two experts, and their directories; expert b is sharded."""
    root = tmp_path_factory.mktemp("gpt2")
    base = tiny_gpt2()
    experts = {"a": perturbed(base, 1), "b": perturbed(base, 2)}
    base.save_pretrained(root / "base")
    experts["a"].save_pretrained(root / "a")
    experts["b"].save_pretrained(root / "b", max_shard_size="40KB")
    assert (root / "b" / "model.safetensors.index.json").is_file()
    (root / "base" / "tokenizer.json").write_text('{"made": "up"}')
    return base, experts, root


def test_hf_directories_equal_modules(gpt2_dirs: tuple[nn.Module, dict[str, nn.Module], Path]) -> None:
    base, experts, root = gpt2_dirs
    from_modules = pf.stack(base, experts)
    from_paths = pf.stack(str(root / "base"), {name: root / name for name in experts})
    r = [0.3, 0.7]
    one, two = from_modules.merge(r), from_paths.merge(r)
    assert type(two) is type(base)
    assert same(one, two)
    assert two.lm_head.weight is two.transformer.wte.weight
    assert not two.training
    assert from_paths.tensor_groups == from_modules.tensor_groups
    ids = torch.arange(9).unsqueeze(0)
    from_paths.switch(r)
    assert torch.equal(one(ids).logits, from_paths.module(ids).logits)


def test_single_file_and_mixed_kinds(tmp_path: Path) -> None:
    base, experts = net_and_experts()
    state = {k: v for k, v in base.state_dict().items() if k != "head.weight"}
    save_file(state, tmp_path / "base.safetensors")
    engine = pf.stack(tmp_path / "base.safetensors", {"a": experts["a"], "b": experts["b"].state_dict()})
    other = pf.stack(base, {"a": experts["a"], "b": experts["b"]})
    ours, theirs = engine.merge_state_dict([0.4, 0.6]), other.merge_state_dict([0.4, 0.6])
    assert all(torch.equal(ours[k], theirs[k]) for k in ours if k != "scale")
    assert set(theirs) - set(ours) == {"head.weight"}


def test_stack_to_store_equals_stack_and_save(
    gpt2_dirs: tuple[nn.Module, dict[str, nn.Module], Path], tmp_path: Path
) -> None:
    _, experts, root = gpt2_dirs
    paths = {name: root / name for name in experts}
    done: list[int] = []
    stack_to_store(root / "base", paths, tmp_path / "streamed", progress=done.append)
    pf.stack(root / "base", paths).save(tmp_path / "saved")
    for name in ("base.safetensors", "experts/a.safetensors", "experts/b.safetensors", "routers.safetensors"):
        one, two = load_file(tmp_path / "streamed" / name), load_file(tmp_path / "saved" / name)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[k], two[k]) for k in one)
    manifests = [
        json.loads((tmp_path / kind / "manifest.json").read_text()) for kind in ("streamed", "saved")
    ]
    assert manifests[0] == manifests[1]
    assert (tmp_path / "streamed" / "model" / "tokenizer.json").read_text() == '{"made": "up"}'
    assert sum(done) == 3 * sum(p.numel() for p in experts["a"].parameters())


def test_load_gives_the_same_bits(
    gpt2_dirs: tuple[nn.Module, dict[str, nn.Module], Path], tmp_path: Path
) -> None:
    base, experts, _ = gpt2_dirs
    engine = pf.stack(base, experts)
    with torch.no_grad():
        for p in engine.routers.parameters():
            p.add_(0.1 * torch.randn_like(p))
    engine.save(tmp_path / "store")
    again = pf.load(tmp_path / "store")
    assert same(engine.merge([0.3, 0.7]), again.merge([0.3, 0.7]))
    assert same(again.module, again.merge([0.5, 0.5]))
    assert again.groups == engine.groups
    assert again.objectives == engine.objectives
    again.save(tmp_path / "store")  # over the very files that it has mapped
    assert same(pf.load(tmp_path / "store").merge([0.3, 0.7]), engine.merge([0.3, 0.7]))


def test_load_with_a_module_of_ones_own(tmp_path: Path) -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts)
    engine.save(tmp_path / "s")
    with pytest.raises(ValueError, match="module= to pf"):
        pf.load(tmp_path / "s").merge([1, 0, 0])
    loaded = pf.load(tmp_path / "s", module=Net().eval())
    assert same(loaded.merge([0.2, 0.3, 0.5]), engine.merge([0.2, 0.3, 0.5]))
    with pytest.raises(ValueError, match="do not fit: missing 'weight'"):
        pf.load(tmp_path / "s", module=nn.Linear(2, 2)).merge([1, 0, 0])


def test_mapped_tensors_stay_as_they_are_on_disk(tmp_path: Path) -> None:
    base, experts = net_and_experts()
    pf.stack(base, experts).save(tmp_path / "s")
    before = (tmp_path / "s" / "base.safetensors").read_bytes()
    engine = pf.load(tmp_path / "s", module=base)
    engine.module.train()
    engine.module(torch.randn(9, 8))
    engine.switch([1, 0, 0])
    assert (tmp_path / "s" / "base.safetensors").read_bytes() == before


def test_experts_that_leave_tensors_unchanged_are_small(tmp_path: Path) -> None:
    base, experts = net_and_experts()
    partly = Net().eval()
    partly.load_state_dict(base.state_dict())
    with torch.no_grad():
        partly.second.weight.add_(1.0)
    engine = pf.stack(base, {"a": experts["a"], "p": partly})
    engine.save(tmp_path / "s")
    assert list(load_file(tmp_path / "s" / "experts" / "p.safetensors")) == ["second.weight"]
    assert same(engine.merge({"p": 1.0}), partly)


def test_ties_by_shared_memory_in_state_dicts() -> None:
    shared = torch.randn(3, 3)
    source = from_state_dict({"x": shared, "y": shared, "view": shared[:2]}, "the base")
    assert source.aliases == {"y": "x"}
    assert set(source.infos) == {"x", "view"}


def test_an_untied_expert_of_a_tied_base_is_named() -> None:
    base = tiny_gpt2()
    expert = {k: v.clone() for k, v in perturbed(base, 1).state_dict().items()}
    pf.stack(base, {"a": expert})  # equal values: fine
    expert["lm_head.weight"] += 1
    with pytest.raises(pf.CheckpointError, match=r"ties 'lm_head\.weight' to 'transformer\.wte\.weight'"):
        pf.stack(base, {"a": expert})


def test_no_broadcast() -> None:
    with pytest.raises(
        pf.CheckpointError, match=r"'w' has shape \[1, 4\] in expert 'a' and \[4, 4\] in the base"
    ):
        pf.stack({"w": torch.zeros(4, 4)}, {"a": {"w": torch.ones(1, 4)}})


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "NaN"), (float("inf"), "infinity")])
@pytest.mark.parametrize("where", ["base", "expert"])
def test_bad_numbers_are_named(value: float, kind: str, where: str, tmp_path: Path) -> None:
    good, bad = {"layer.w": torch.ones(3, 3)}, {"layer.w": torch.ones(3, 3)}
    bad["layer.w"][1, 1] = value
    base, expert = (bad, good) if where == "base" else (good, bad)
    with pytest.raises(pf.CheckpointError, match=rf"{where}.*'layer\.w' holds {kind}"):
        pf.stack(base, {"a": expert})
    with pytest.raises(pf.CheckpointError, match=rf"'layer\.w' holds {kind}"):
        stack_to_store(base, {"a": expert}, tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


def test_overflowing_deltas_are_named() -> None:
    with pytest.raises(pf.CheckpointError, match=r"delta of tensor 'w' overflows torch\.float16"):
        pf.stack({"w": torch.full((2,), -6e4)}, {"a": {"w": torch.full((2,), 6e4)}}, dtype=torch.float16)


def test_missing_and_prefixed_names() -> None:
    base, experts = net_and_experts()
    state = experts["a"].state_dict()
    del state["second.bias"]
    with pytest.raises(pf.CheckpointError, match=r"Missing in the expert: 'second\.bias'"):
        pf.stack(base, {"a": state})
    prefixed = {f"model.{k}": v for k, v in experts["a"].state_dict().items()}
    with pytest.raises(pf.CheckpointError, match=r"prefix 'model\.': stack its submodule 'model'"):
        pf.stack(base.state_dict(), {"a": prefixed})


def test_dtypes_that_cannot_be_merged() -> None:
    base, expert = {"w": torch.ones(2, dtype=torch.float64)}, {"w": torch.zeros(2, dtype=torch.float64)}
    with pytest.raises(pf.CheckpointError, match=r"'w' is torch\.float64.*dtype=torch\.float32"):
        pf.stack(base, {"a": expert})
    assert pf.stack(base, {"a": expert}, dtype=torch.float32).merge_state_dict([1])["w"].tolist() == [0, 0]


def test_paths_that_are_nothing(tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_bytes(b"x")
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "pytorch_model.bin").write_bytes(b"x")
    pf.stack({"w": torch.ones(2)}, {"a": {"w": torch.zeros(2)}}).save(tmp_path / "store")
    for path, message in (
        (tmp_path / "none", "no such file or directory"),
        (tmp_path / "m.bin", "never pickles"),
        (tmp_path / "dir", "pickles are never read"),
        (tmp_path / "store", "it is a store, of which `paretofuse merge` makes a model"),
    ):
        with pytest.raises(pf.CheckpointError, match=message):
            pf.stack(path, {"a": {}})


def test_missing_shard(gpt2_dirs: tuple[nn.Module, dict[str, nn.Module], Path], tmp_path: Path) -> None:
    _, _, root = gpt2_dirs
    for file in (root / "b").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    gone = sorted(tmp_path.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(pf.CheckpointError, match=gone.name):
        pf.stack(root / "base", {"b": tmp_path})


def test_empty_and_scalar_tensors() -> None:
    base = {"none": torch.zeros(0, 3), "scalar": torch.tensor(1.0), "w": torch.ones(5)}
    expert = {"none": torch.zeros(0, 3), "scalar": torch.tensor(3.0), "w": torch.zeros(5)}
    engine = pf.stack(base, {"a": expert}, route="tensor")
    merged = engine.merge_state_dict([1.0])
    assert merged["none"].shape == (0, 3)
    assert merged["scalar"].item() == 3.0
    assert merged["w"].tolist() == [0] * 5


def test_non_contiguous_inputs() -> None:
    base, expert = {"w": torch.randn(5, 7).T}, {"w": torch.randn(14, 5)[::2]}
    merged = pf.stack(base, {"a": expert}).merge_state_dict([1.0])["w"]
    torch.testing.assert_close(merged, expert["w"])


def test_routes() -> None:
    clip = "vision_model.encoder.layers.3."
    names = [
        clip + "mlp.fc1.weight", clip + "mlp.fc2.bias", clip + "self_attn.q_proj.weight",
        "transformer.h.0.mlp.c_fc.weight", "transformer.h.0.attn.c_attn.weight",
        "encoder.layer.1.intermediate.dense.weight", "encoder.layer.1.output.dense.bias",
        "encoder.layer.1.output.LayerNorm.weight", "encoder.layer.1.attention.output.dense.weight",
        "model.decoder.layers.0.fc1.weight", "layers.0.linear2.bias", "embed",
    ]  # fmt: skip
    groups = assign_groups(names, "mlp")
    assert groups == dict(
        zip(
            names,
            [
                clip + "mlp", clip + "mlp", None, "transformer.h.0.mlp", None, "encoder.layer.1.mlp",
                "encoder.layer.1.mlp", None, None, "model.decoder.layers.0.mlp", "layers.0.mlp", None,
            ],
            strict=True,
        )
    )  # fmt: skip
    modules = assign_groups(names, "module")
    assert modules[clip + "mlp.fc1.weight"] == clip + "mlp.fc1"
    assert modules["embed"] == "(top)"
    assert assign_groups(names, "tensor")["embed"] == "embed"
    with pytest.raises(TypeError, match="route gave 3"):
        assign_groups(names, lambda name: 3)  # type: ignore[arg-type,return-value]


def test_blocks_of_files_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paretofuse.engine.stacking.sources.BLOCK", 7)
    tensors = {"a": torch.randn(5, 5), "b": torch.arange(20).to(torch.int64), "c": torch.randn(9).bfloat16()}
    save_file(tensors, tmp_path / "x.safetensors")
    source = from_safetensors([tmp_path / "x.safetensors"], "the base")
    for name, tensor in tensors.items():
        blocks = list(source.blocks(name))
        assert max(len(b) for b in blocks) <= 7
        assert torch.equal(torch.cat(blocks).view(tensor.shape), tensor)


MEMORY = """
import re, sys, torch
from pathlib import Path
from safetensors.torch import save_file
import paretofuse as pf
from paretofuse.api import stack_to_store

def anonymous(key):
    return int(re.search(rf"{key}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

root, kind = Path(sys.argv[1]), sys.argv[2]
rows = 4 << 10
largest = rows * 1024 * 4
paths = {}
for i, name in enumerate(["base", "a", "b"]):
    torch.manual_seed(i)
    paths[name] = root / f"{name}.safetensors"
    save_file({"big": torch.randn(rows, 1024), "other": torch.randn(rows // 2, 1024)}, paths[name])
pf.stack(paths["base"], {"a": paths["a"]})  # warm up: threads, caches
import gc; gc.collect()
Path("/proc/self/clear_refs").write_text("5")  # resets the peak
before = anonymous("VmRSS")
if kind == "memory":
    engine = pf.stack(paths["base"], {"a": paths["a"], "b": paths["b"]})
    result = 3 * 3 * largest // 2
else:
    planes = "dense" if kind == "store" else "auto"
    stack_to_store(paths["base"], {"a": paths["a"], "b": paths["b"]}, root / "store", planes=planes)
    result = 0
print((anonymous("VmHWM") - before - result) / largest)
"""


@pytest.mark.parametrize(("kind", "most"), [("memory", 2), ("store", 2), ("planes", 6)])
def test_peak_memory_above_the_result(kind: str, most: int, tmp_path: Path) -> None:
    """Peak resident memory above the result stays below two of the largest tensors (16 MiB each here).

    Where a plane's format is chosen the tensor, its delta and what may become of it are held: six of them, in float32.
    """
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's /proc to reset the peak of resident memory")
    # A fixed threshold, so that what was freed goes back to the system at once.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "100000"}
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path), kind],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < most


def test_inputs_never_change() -> None:
    base, experts = net_and_experts()
    copies = [{k: v.clone() for k, v in m.state_dict().items()} for m in (base, *experts.values())]
    engine = pf.stack(base, experts)
    engine.train_at([0.2, 0.3, 0.5])
    engine.module(torch.randn(4, 8)).sum().backward()
    for model, copied in zip((base, *experts.values()), copies, strict=True):
        assert all(torch.equal(v, copied[k]) for k, v in model.state_dict().items())
        assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_plan_reads_no_data(tmp_path: Path) -> None:
    base, experts = net_and_experts()
    reads: list[str] = []
    source = from_module(base, "the base")
    spy = type(source)(
        label=source.label,
        infos=source.infos,
        aliases=source.aliases,
        read=lambda *a: reads.append(a[0]) or source.read(*a),
    )  # type: ignore[func-returns-value]
    expert = from_module(experts["a"], "expert 'a'")
    plan.make_plan(
        spy, {"a": expert}, route="module", static_weight=0.3, dtype=None, delta_dtype=None, heads=(),
        planes=parse("dense"),
    )  # fmt: skip
    assert set(reads) <= {"tied.weight"}


@pytest.mark.parametrize("which", ["the base", "expert 'a'"])
@pytest.mark.parametrize(
    ("entry", "error", "message"),
    [
        (
            {"w": torch.ones(2, device="meta")},
            pf.CheckpointError,
            "'w' is on the meta device; load its weights",
        ),
        ({"w": torch.ones(2).to_sparse()}, pf.CheckpointError, "'w' is sparse; stack what .*to_dense"),
        ({1: torch.ones(2)}, TypeError, "the name 1, expected a text"),
        ({"\ud800": torch.ones(2)}, TypeError, "expected a text"),
    ],
)
def test_tensors_without_numbers_or_names(
    which: str, entry: dict[str, torch.Tensor], error: type[Exception], message: str
) -> None:
    whole = {"w": torch.ones(2)}
    base, expert = (entry, whole) if which == "the base" else (whole, entry)
    with pytest.raises(error, match=f"{which}: .*{message}"):
        pf.stack(base, {"a": expert})


def test_names_that_no_manifest_holds() -> None:
    base, experts = net_and_experts()
    with pytest.raises(ValueError, match="expected non-empty single lines of Unicode"):
        pf.stack(base, {"\ud800": experts["a"]})
    with pytest.raises(TypeError, match="expected a non-empty group name"):
        pf.stack(base, experts, route=lambda name: "\udfff")
    with pytest.raises(ValueError, match="got no tensor to merge"):
        pf.stack(base, experts, heads=["*"])


def test_a_device_that_this_machine_lacks_is_told_at_once() -> None:
    base, experts = net_and_experts()
    for device in ("cuda:63", torch.device("cuda:63")):
        with pytest.raises(ValueError, match=r"got device='cuda:63', which cannot be used here \(.*\); take"):
            pf.stack(base, experts, device=device)
