"""Engines over planes of every format: merges, switches, replicas, batches and training, against float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import paretofuse as pf
from paretofuse.engine.engine import Engine
from paretofuse.engine.planes.plane import nbytes
from tests.support.models import perturbed, tiny_gpt2

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # of peft

R = [0.2, 0.8]
WORDS = ["dense", "bf16", "int8", "int4", "lowrank:5", "lowrank:60%"]


class Two(nn.Module):
    """Two layers wide enough for every format, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(64, 96), nn.LayerNorm(96), nn.Linear(96, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.norm(self.first(x))))


def two_experts(word: str, **options: object) -> Engine:
    torch.manual_seed(0)
    base = Two().eval()
    experts = {"a": perturbed(base, 1, 0.01), "b": perturbed(base, 2, 0.01)}
    return pf.stack(base, experts, planes=word, **options)  # type: ignore[arg-type]


def expected(engine: Engine, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """The merged tensors in float64 from decoded planes; weights [G, E]."""
    merged = {}
    for spec in engine.layout.with_role("routed"):
        total = engine._stack.base[spec.name].double()
        for share, own in zip(
            weights[engine.layout.group_index[spec.name]], engine._stack.planes, strict=True
        ):
            if spec.name in own:
                total = total + share.double() * own[spec.name].decode().double()
        merged[spec.name] = total
    return merged


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("word", WORDS)
def test_every_way_to_merge_gives_the_same_model(word: str, backend: str) -> None:
    engine = two_experts(word, backend=backend)
    formats = {plane.format for own in engine._stack.planes for plane in own.values()}
    assert formats == ({"dense"} if word in ("dense", "bf16") else {"dense", word.partition(":")[0]})
    with torch.no_grad():
        weights = engine.routers(R)
    truth = expected(engine, weights)
    state = engine.merge_state_dict(R)
    engine.switch(R)
    with engine.replica(R) as replica:
        held = {name: tensor.clone() for name, tensor in replica.state_dict().items()}
    several = engine.merge_state_dict(torch.tensor([R, [0.5, 0.5]]))[0]
    for name, exact in truth.items():
        torch.testing.assert_close(state[name].double(), exact, rtol=1e-6, atol=1e-6)
        for other in (engine.module.state_dict(), held, several):
            assert torch.equal(other[name], state[name])


@pytest.mark.parametrize("word", WORDS)
def test_vectors_stay_exact(word: str) -> None:
    engine = two_experts(word)
    plain = two_experts("dense")
    for own, theirs in zip(engine._stack.planes, plain._stack.planes, strict=True):
        for name, plane in theirs.items():
            if len(plane.shape) < 2 and word != "bf16":
                assert torch.equal(own[name].decode(), plane.decode())


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("word", ["int8", "int4", "lowrank:5"])
def test_training_reaches_the_gradients_of_the_decoded_planes(word: str, backend: str) -> None:
    engine = two_experts(word, backend=backend)
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(3))
    weights = engine.routers(R).detach().double().requires_grad_()
    module = Two().double()
    state = {**{n: t.double() for n, t in engine.merge_state_dict(R).items()}, **expected(engine, weights)}
    loss = torch.func.functional_call(module, state, (x.double(),)).square().mean()
    (exact,) = torch.autograd.grad(loss, weights)
    for materialize in (True, False):
        engine.train_at(R, materialize=materialize)
        found = engine.jacobian([(engine.module if materialize else engine.fused_module)(x).square().mean()])
        assert (found[0] - exact).abs().max() <= 1e-4 * exact.abs().max()


@pytest.mark.parametrize("word", ["int8", "int4", "lowrank:5"])
def test_a_batch_of_preferences_gives_each_its_own_model(word: str) -> None:
    engine = two_experts(word)
    preferences = [[0.2, 0.8], [1.0, 0.0], [0.5, 0.5]]
    x = torch.randn(3, 64)
    rows = engine.batched(preferences)(x)
    for row, own, preference in zip(rows, x, preferences, strict=True):
        torch.testing.assert_close(row, engine.merge(preference)(own), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("word", WORDS)
def test_the_report_tells_formats_bytes_and_errors(word: str) -> None:
    engine = two_experts(word)
    for own, planes in zip(engine.planes.values(), engine._stack.planes, strict=True):
        assert own.keys() == planes.keys()
        for name, info in own.items():
            assert (info.format, info.nbytes) == (planes[name].format, nbytes(planes[name]))
    info = engine.planes["a"]["first.weight"]
    if word in ("dense", "bf16"):
        assert info.error is None
        return
    # Measured against what the expert really adds; in float32 it is the plane's own.
    base, expert = engine._stack.base["first.weight"], perturbed_weight()
    wrong = engine._stack.planes[0]["first.weight"].decode() - (expert - base)
    assert info.error == pytest.approx(float(wrong.norm() / (expert - base).norm()), rel=0.01, abs=1e-5)


def perturbed_weight() -> torch.Tensor:
    torch.manual_seed(0)
    return perturbed(Two().eval(), 1, 0.01).state_dict()["first.weight"]


def lora(base: nn.Module, folder: Path, seed: int, rank: int, **options: object) -> Path:
    """A LoRA of random factors, saved by PEFT; the base is left as it was."""
    import copy

    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=rank, lora_alpha=2 * rank, **options))  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    return folder


def unloaded(base: nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    """What PEFT itself merges."""
    import copy

    from peft import PeftModel

    merged = PeftModel.from_pretrained(copy.deepcopy(base), folder).merge_and_unload()
    return dict(merged.state_dict())


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("word", ["auto", "int8"])
def test_lora_experts_stay_factors_and_merge_as_peft_does(word: str, backend: str, tmp_path: Path) -> None:
    base = tiny_gpt2()  # Conv1D: its weights lie transposed
    modules = ["c_attn", "c_proj", "c_fc"]
    paths = {
        "a": lora(base, tmp_path / "a", 1, 4, target_modules=modules, fan_in_fan_out=True),
        "b": lora(base, tmp_path / "b", 2, 7, target_modules=modules, fan_in_fan_out=True, use_rslora=True),
    }
    engine = pf.stack(base, paths, planes=word, route="tensor", backend=backend)
    planes = [plane for own in engine._stack.planes for plane in own.values()]
    assert planes
    assert {plane.format for plane in planes} == {"lowrank"}
    for objective, path in paths.items():
        one_hot = {name: float(name == objective) for name in paths}
        state = engine.merge_state_dict(one_hot)
        for name, tensor in unloaded(base, path).items():
            torch.testing.assert_close(state[name], tensor, rtol=1e-5, atol=1e-6)
    dense = pf.stack(base, paths, planes="dense", route="tensor", backend=backend)
    ours, theirs = engine.merge_state_dict(R), dense.merge_state_dict(R)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6)


def test_an_adapter_of_bfloat16_keeps_its_dtype(tmp_path: Path) -> None:
    base = tiny_gpt2().bfloat16()
    path = lora(base, tmp_path / "a", 1, 4, target_modules=["c_attn"], fan_in_fan_out=True)
    from safetensors.torch import load_file, save_file

    file = path / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    engine = pf.stack(base, {"a": path}, planes="auto")
    factors = [t for plane in engine._stack.planes[0].values() for t in plane.tensors().values()]
    assert {tensor.dtype for tensor in factors} == {torch.bfloat16}


@pytest.mark.parametrize("word", ["int8", "int4", "lowrank:5"])
def test_the_triton_backend_keeps_planes_as_they_are(word: str) -> None:
    engine, small = two_experts(word, backend="triton"), two_experts(word)
    for own, theirs in zip(engine._stack.planes, small._stack.planes, strict=True):
        assert {name: plane.format for name, plane in own.items()} == {n: p.format for n, p in theirs.items()}
        assert all(torch.equal(own[name].decode(), plane.decode()) for name, plane in theirs.items())
    assert not any("made dense" in note for note in engine.notes)


def test_words_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"got planes='bf16' and delta_dtype=torch.float16, expected only one"
    ):
        two_experts("bf16", delta_dtype=torch.float16)
    with pytest.raises(ValueError, match="got planes='int3'"):
        two_experts("int3")
