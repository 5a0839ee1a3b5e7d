"""A preference as a LoRA adapter: what PEFT makes of it is what a merge gives."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import paretofuse as pf
from paretofuse.cli import main
from paretofuse.engine.engine import Engine
from tests.engine.test_planes import lora, two_experts, unloaded
from tests.support.models import tiny_gpt2

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # of peft

R = {"a": 0.2, "b": 0.8}


class Mixed(nn.Module):
    """An embedding and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(50, 32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(self.embed(ids))))


def gpt2_with_loras(folder: Path) -> Engine:
    """A GPT-2 of two LoRA experts, their factors kept."""
    base = tiny_gpt2()
    experts = {
        name: lora(base, folder / name, i, 4 + i, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
        for i, name in enumerate("ab")
    }
    return pf.stack(base, experts, planes="auto", route="tensor")


def check(engine: Engine, base: nn.Module, folder: Path, tolerance: float = 1e-5) -> None:
    """PEFT's merge of what was written is ours."""
    ours = engine.merge_state_dict(R)
    for name, tensor in unloaded(base, folder).items():
        torch.testing.assert_close(ours[name], tensor, rtol=tolerance, atol=tolerance)


def test_experts_side_by_side_are_exact(tmp_path: Path) -> None:
    base = tiny_gpt2()
    engine = gpt2_with_loras(tmp_path)
    assert engine.export_adapter(R, tmp_path / "adapter") == 0
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 4 + 5
    assert config["fan_in_fan_out"]
    check(engine, base, tmp_path / "adapter")
    # An adapter is an expert again.
    again = pf.stack(base, {"x": tmp_path / "adapter"}, planes="auto")
    for name, tensor in again.merge_state_dict([1.0]).items():
        torch.testing.assert_close(tensor, engine.merge_state_dict(R)[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("family", ["rows", "rows+columns"])
def test_coefficients_scale_rows_of_b_and_columns_of_a(tmp_path: Path, family: str, rank: int | None) -> None:
    base = tiny_gpt2()
    engine = gpt2_with_loras(tmp_path)
    engine.set_family(family)
    with torch.no_grad():
        for linear in engine.routers.linear:
            linear.weight.copy_(torch.randn(linear.weight.shape))
    error = engine.export_adapter(R, tmp_path / "adapter", rank=rank)
    if rank is None:
        assert error == 0
        check(engine, base, tmp_path / "adapter")
        return
    start, whole = base.state_dict(), engine.merge_state_dict(R)
    cut = unloaded(base, tmp_path / "adapter")
    wrong = sum((whole[n] - tensor).square().sum() for n, tensor in cut.items())
    size = sum((whole[n] - start[n]).square().sum() for n in cut)
    assert error == pytest.approx(float((wrong / size).sqrt()), rel=1e-3)


def test_embeddings_and_modules_of_different_ranks(tmp_path: Path) -> None:
    torch.manual_seed(3)
    base = Mixed()
    experts = {
        "a": lora(base, tmp_path / "a", 1, 3, target_modules=["embed", "up"]),
        "b": lora(base, tmp_path / "b", 2, 5, target_modules=["up", "down"]),
    }
    engine = pf.stack(base, experts, planes="auto", route="tensor")
    engine.export_adapter(R, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"]) == (8, {"embed": 3, "down": 5})
    check(engine, base, tmp_path / "adapter")


def test_a_cut_tells_its_error(tmp_path: Path) -> None:
    base = tiny_gpt2()
    engine = gpt2_with_loras(tmp_path)
    error = engine.export_adapter(R, tmp_path / "adapter", rank=6)
    written, exact, before = (
        unloaded(base, tmp_path / "adapter"),
        engine.merge_state_dict(R),
        base.state_dict(),
    )
    lost = sum(float((written[n] - exact[n]).double().square().sum()) for n in written)
    whole = sum(float((before[n] - exact[n]).double().square().sum()) for n in written)
    assert error == pytest.approx((lost / whole) ** 0.5, rel=1e-2)
    assert 0 < error < 0.9
    assert engine.export_adapter(R, tmp_path / "adapter", rank=9) == pytest.approx(0, abs=1e-5)
    check(engine, base, tmp_path / "adapter")


def test_dense_updates_of_matrices_are_cut(tmp_path: Path) -> None:
    base = Mixed()
    experts = {}
    for i, name in enumerate("ab"):
        experts[name] = copy.deepcopy(base)
        with torch.no_grad():
            weight = experts[name].up.weight
            weight += torch.randn(64, 2, generator=torch.Generator().manual_seed(i)) @ torch.randn(2, 32)
    engine = pf.stack(base, experts)
    assert engine.export_adapter(R, tmp_path / "adapter", rank=4) == pytest.approx(0, abs=1e-3)
    check(engine, base, tmp_path / "adapter", 1e-4)
    with pytest.raises(ValueError, match=r"got experts that change 'up.weight'.*pass rank="):
        engine.export_adapter(R, tmp_path / "other")


def test_what_no_lora_holds_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    engine = two_experts("dense")
    for rank in (None, 3):
        with pytest.raises(ValueError, match="which no LoRA holds exactly"):
            engine.export_adapter(R, tmp_path / "adapter", rank=rank)
    engine = gpt2_with_loras(tmp_path)
    for wrong in (0, -1, True, 2.5):
        with pytest.raises(ValueError, match=r"got rank=.*expected a whole number of at least 1"):
            engine.export_adapter(R, tmp_path / "adapter", rank=wrong)  # type: ignore[arg-type]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(ValueError, match=r"holds 'notes.txt', expected an adapter's directory"):
        engine.export_adapter(R, tmp_path / "mine")
    with pytest.raises(ValueError, match="expected one"):
        engine.export_adapter(torch.tensor([[0.2, 0.8], [1.0, 0.0]]), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_the_command_line_writes_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, out = tmp_path / "store", tmp_path / "adapter"
    gpt2_with_loras(tmp_path).save(store)
    words = ["adapter", str(store), "--preference", "a=0.2,b=0.8", "-o", str(out), "--json"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["error"] == 0
    check(pf.load(store), tiny_gpt2(), out)
    assert main([*words, "--rank", "6"]) == 0
    assert 0 < json.loads(capsys.readouterr().out)["error"] < 1
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 6
    assert main(["adapter", str(store), "--preference", "a=0.2,b=0.8", "-o", str(store)]) == 1
    assert "expected an adapter's directory or a new one" in capsys.readouterr().err
