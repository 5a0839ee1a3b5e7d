"""Models split over devices and tensors sharded over processes."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import paretofuse as pf
from paretofuse.engine.engine import Engine
from paretofuse.engine.merging.bound import BoundStack
from paretofuse.engine.merging.flat import FlatOutputs, flatten
from paretofuse.engine.modules.factory import live_module
from paretofuse.engine.planes.plane import to
from paretofuse.engine.stacking.sources import Blueprint
from paretofuse.engine.stacking.stack import Stack
from tests.support.models import net_and_experts

CPU, META = torch.device("cpu"), torch.device("meta")
R = [0.2, 0.3, 0.5]


def split_stack() -> tuple[Engine, Stack]:
    """An engine on the CPU, and its stack with the tensors of one half of the model on another device.

    The meta device stands for a second GPU: it has shapes, dtypes and launches, but no numbers.
    """
    base, experts = net_and_experts()
    engine = pf.stack(base, experts, backend="reference", route=lambda n: None if n.startswith("norm") else n)
    stack = engine._stack

    def place(name: str) -> torch.device:
        return META if name.startswith(("second", "tied")) else CPU

    base = {name: tensor.to(place(name)) for name, tensor in stack.base.items()}
    planes = tuple({name: to(plane, place(name)) for name, plane in own.items()} for own in stack.planes)
    return engine, replace(stack, base=base, planes=planes)


def test_each_device_has_its_own_flat_buffers() -> None:
    engine, stack = split_stack()
    places = {name: tensor.device for name, tensor in stack.base.items()}
    viewed, inputs = flatten(stack, {name: 0 for name in places}, places)
    kinds = [(flat.bucket.device.type, flat.bucket.specs[0].role) for flat in inputs]
    assert sorted(kinds) == [("cpu", "routed"), ("cpu", "static"), ("meta", "routed")]
    for flat in inputs:
        assert flat.base.device == flat.stored.values.device == flat.tiles.device == flat.bucket.device
        for spec in flat.bucket.specs:
            assert viewed.base[spec.name].untyped_storage()._cdata == flat.base.untyped_storage()._cdata
            assert places[spec.name] == flat.bucket.device
    for name, tensor in viewed.base.items():
        assert places[name] == META or torch.equal(tensor, engine._stack.base[name])
    out = FlatOutputs(engine.layout.with_role("routed"), 2, places)
    assert sorted(buffer.device.type for buffer in out.buffers.values()) == ["cpu", "meta"]


def test_a_split_model_is_merged_where_it_lies() -> None:
    whole, stack = split_stack()
    engine = Engine(stack, whole.routers, whole.blueprint, device=CPU, backend="reference")
    assert engine._bound.backends == {CPU: "reference", META: "reference"}
    merged, truth = engine.merge_state_dict(R), whole.merge_state_dict(R)
    for name, tensor in merged.items():
        assert tensor.device == stack.base[engine.layout.by_name[name].name].device
        assert tensor.shape == truth[name].shape
        assert tensor.device == META or torch.equal(tensor, truth[name])
    engine.switch(R)
    live = engine.module.state_dict()
    assert {name: t.device for name, t in live.items()} == {name: t.device for name, t in merged.items()}
    assert torch.equal(live["first.weight"], truth["first.weight"])
    fused = live_module(
        BoundStack(stack, "reference"),
        whole.blueprint.skeleton(),
        torch.ones(1, len(engine.groups), 3),
        fused=True,
    )
    assert {fused.module.first.mixed.mix.device, fused.module.second.mixed.mix.device} == {CPU, META}


def test_backends_are_chosen_for_each_device() -> None:
    _, stack = split_stack()
    assert BoundStack(stack, None).backends == {CPU: "native", META: "reference"}
    with pytest.raises(ValueError, match='got backend="native" with tensors on meta'):
        BoundStack(stack, "native")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device here")
def test_a_model_split_over_gpu_and_cpu() -> None:
    base, experts = net_and_experts()
    truth = pf.stack(base, experts)
    base.second.cuda(), base.tied.cuda()
    engine = pf.stack(base, experts)
    assert {d.type: b for d, b in engine._bound.backends.items()} == {"cpu": "native", "cuda": "triton"}
    expected = truth.merge_state_dict(R)
    for name, tensor in engine.merge_state_dict(R).items():
        assert tensor.device == base.state_dict()[name].device
        torch.testing.assert_close(tensor.cpu(), expected[name], rtol=1e-6, atol=1e-6)


SCRIPT = """
import copy
import torch
import torch.distributed as dist
import paretofuse as pf
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from tests.support.models import perturbed

torch.set_num_threads(1)
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
R = [0.25, 0.75]

def models():
    torch.manual_seed(0)
    # 7 rows over two processes: the shards are of different sizes.
    base = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 6, bias=False))
    base[2].weight = nn.Parameter(base[0].weight.detach().T.contiguous())
    return base.eval(), {name: perturbed(base, seed) for seed, name in enumerate("ab")}

base, experts = models()
truth = pf.stack(base, experts).merge(R).state_dict()

def fsdp(backend):
    base, experts = models()
    # FSDP2: the engine's tensors go into the user's own sharded model.
    sharded = [fully_shard(copy.deepcopy(m), mesh=mesh) for m in (base, *experts.values())]
    with CommDebugMode() as communication:
        engine = pf.stack(sharded[0], dict(zip("ab", sharded[1:])), backend=backend)
        state = engine.merge_state_dict(R)
        many = engine.merge_state_dict(torch.tensor([R, [1.0, 0.0]]))
        sharded[0].load_state_dict(state)
    assert communication.get_total_counts() == 0, communication.get_comm_counts()
    for name, tensor in state.items():
        assert isinstance(tensor, DTensor) and tensor.placements == (Shard(0),), name
        assert tensor.to_local().shape[0] == (len(truth[name]) + 1 - dist.get_rank()) // 2
        torch.testing.assert_close(tensor.full_tensor(), truth[name], rtol=1e-6, atol=1e-6)
        assert torch.equal(many[0][name].to_local(), tensor.to_local())
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(dist.get_rank()))
    base.load_state_dict(truth)
    torch.testing.assert_close(sharded[0](x), base(x), rtol=1e-5, atol=1e-5)
    for use, argument in ((engine.merge, R), (engine.train_at, R), (engine.batched, [R]), (engine.save, "s")):
        try:
            use(argument)
            raise AssertionError("not refused")
        except ValueError as error:
            assert "shard" in str(error), error

def tensor_parallel(backend):
    # Tensor parallelism: modules of DTensors are copied, merged and switched as such.
    base, experts = models()
    def parallel(name, module, mesh):
        for key, p in list(module.named_parameters(recurse=False)):
            place = [Shard(0)] if name == "0" else [Replicate()]
            module.register_parameter(key, nn.Parameter(distribute_tensor(p.detach(), mesh, place)))
    whole = {"base": base, **experts}
    split = {name: distribute_module(copy.deepcopy(m), mesh, parallel) for name, m in whole.items()}
    with CommDebugMode() as communication:
        engine = pf.stack(split.pop("base"), split, backend=backend)
        engine.switch([1.0, 0.0])
        engine.switch(R)
        merged = engine.merge(R)
    assert communication.get_total_counts() == 0
    for module in (engine.module, merged):
        for name, tensor in module.state_dict().items():
            torch.testing.assert_close(tensor.full_tensor(), truth[name], rtol=1e-6, atol=1e-6)
    x = distribute_tensor(torch.ones(3, 6), mesh, [Replicate()])
    expected = pf.stack(base, experts).merge(R)(torch.ones(3, 6))
    torch.testing.assert_close(engine.module(x).full_tensor(), expected, rtol=1e-5, atol=1e-5)
    try:
        pf.stack(base, split)
        raise AssertionError("not refused")
    except pf.CheckpointError as error:
        assert "'0.weight' lies as" in str(error) and "a whole tensor in the base" in str(error), error

for backend in BACKENDS:
    fsdp(backend)
    tensor_parallel(backend)
dist.destroy_process_group()
print("done")
"""


@pytest.mark.slow
def test_two_processes_merge_their_shards_without_a_word(tmp_path: Path) -> None:
    """By the native core and by the kernels, the latter in Triton's interpreter where it is installed."""
    backends = ("native", "triton") if find_spec("triton") else ("native",)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("BACKENDS", repr(backends)))
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
    ]
    environment = {
        **os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "1",
    }  # fmt: skip
    done = subprocess.run(
        launcher, env=environment, capture_output=True, text=True, check=False, timeout=200, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done") == 2


def test_shardings_are_kept_apart_from_the_layout() -> None:
    """A blueprint without any is the rule."""
    assert Blueprint().shardings == {}
