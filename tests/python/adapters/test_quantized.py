"""Quantized checkpoints are refused by their format's name, wherever they come from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import paretofuse as pf
from tests.support.models import net_and_experts, tiny_gpt2


def packed(shape: tuple[int, ...], dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.randint(0, 100, shape).to(dtype)


F8 = torch.float8_e4m3fn
FORMATS: dict[str, tuple[str, dict[str, Tensor]]] = {
    "bitsandbytes, 4 bit": ("bitsandbytes", {
        "0.weight": packed((32, 1)), "0.weight.absmax": torch.ones(1), "0.weight.quant_map": torch.ones(16),
        "0.weight.quant_state.bitsandbytes__nf4": packed((80,))}),
    "bitsandbytes, 8 bit": ("bitsandbytes", {
        "0.weight": packed((8, 8), torch.int8), "0.SCB": torch.ones(8), "0.weight_format": packed(())}),
    "GPTQ": ("GPTQ", {
        "0.qweight": packed((1, 8), torch.int32), "0.qzeros": packed((1, 1), torch.int32),
        "0.scales": torch.ones(1, 8), "0.g_idx": torch.zeros(8, dtype=torch.int32)}),
    "AWQ": ("AWQ", {
        "0.qweight": packed((8, 1), torch.int32), "0.qzeros": packed((1, 1), torch.int32),
        "0.scales": torch.ones(1, 8)}),
    "compressed-tensors, packed": ("compressed-tensors", {
        "0.weight_packed": packed((8, 1), torch.int32), "0.weight_scale": torch.ones(8, 1),
        "0.weight_shape": torch.tensor([8, 8])}),
    "compressed-tensors, int8": ("compressed-tensors", {
        "0.weight": packed((8, 8), torch.int8), "0.weight_scale": torch.ones(8, 1)}),
    "MXFP4": ("MXFP4", {
        "experts.down_proj_blocks": packed((2, 8, 1, 16)), "experts.down_proj_scales": packed((2, 8, 1))}),
    "fp8 in blocks": ("fp8 with scales", {
        "0.weight": torch.ones(8, 8).to(F8), "0.weight_scale_inv": torch.ones(1, 1)}),
    "fp8 in rows": ("fp8 with scales", {
        "0.weight": torch.ones(8, 8).to(torch.float8_e5m2), "0.weight_scale": torch.ones(8, 1)}),
    "quanto": ("quanto", {"0.weight._data": packed((8, 8), torch.int8), "0.weight._scale": torch.ones(8, 1)}),
    "HQQ": ("HQQ", {"0.W_q": packed((4, 8)), "0.scale": torch.ones(8), "0.zero": torch.ones(8)}),
    "torchao": ("torchao", {"0._weight_qdata": packed((8, 8), torch.int8), "0._weight_scale": torch.ones(8, 1)}),
    "AQLM": ("AQLM", {"0.codes": packed((8, 1, 1), torch.int8), "0.codebooks": torch.ones(1, 256, 1, 8)}),
    "EETQ": ("compressed-tensors", {"0.weight": packed((8, 8), torch.int8), "0.weight_scales": torch.ones(8)}),
    "an unknown one": ("integer weights of an unknown format", {"0.weight": packed((8, 8), torch.int8)}),
}  # fmt: skip


@pytest.mark.parametrize("case", FORMATS)
def test_bare_tensors(case: str, tmp_path: Path) -> None:
    """Their scales are floats: beside integers that stay the base's they would give neither model."""
    found, tensors = FORMATS[case]
    moved = {name: t * 1.5 if t.dtype == torch.float32 else t for name, t in tensors.items()}
    safetensors.torch.save_file(moved, tmp_path / "expert.safetensors")
    for base, expert in (
        (tensors, moved),
        ({"0.weight": torch.zeros(8, 8)}, moved),
        (tensors, tmp_path / "expert.safetensors"),
        ({"0.weight": torch.zeros(8, 8)}, tmp_path / "expert.safetensors"),
    ):
        with pytest.raises(pf.CheckpointError, match=rf"quantized \({found}\): tensor .*dequantize\(\)"):
            pf.stack(base, {"x": expert})


METHODS = {
    "bitsandbytes": "bitsandbytes", "gptq": "GPTQ", "awq": "AWQ", "compressed-tensors": "compressed-tensors",
    "mxfp4": "MXFP4", "fp8": "fp8 with scales", "quanto": "quanto", "hqq": "HQQ", "torchao": "torchao",
    "next year's": "next year's",
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_configurations(method: str, tmp_path: Path) -> None:
    base = tiny_gpt2()
    for name in ("base", "expert"):
        base.save_pretrained(tmp_path / name)
    config = json.loads((tmp_path / "expert" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method}
    (tmp_path / "expert" / "config.json").write_text(json.dumps(config))
    message = rf"quantized \({METHODS[method]}\): config\.json has a quantization_config"
    with pytest.raises(pf.CheckpointError, match=rf"^expert 'x'.*{message}"):
        pf.stack(tmp_path / "base", {"x": tmp_path / "expert"})
    with pytest.raises(pf.CheckpointError, match=rf"^the base.*{message}.*remove quantization_config"):
        pf.stack(tmp_path / "expert", {"x": tmp_path / "base"})
    del config["quantization_config"]  # the remedy for plain weights
    (tmp_path / "expert" / "config.json").write_text(json.dumps(config))
    pf.stack(tmp_path / "expert", {"x": tmp_path / "base"})


@pytest.mark.filterwarnings("ignore")
def test_quantized_layers_of_torch() -> None:
    base = nn.Sequential(nn.Linear(8, 8))
    quantized = torch.ao.quantization.quantize_dynamic(base, {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(pf.CheckpointError, match=r"quantized \(torch\.ao\): layer '0' is a Linear"):
        pf.stack(base, {"x": quantized})


def test_tensors_of_a_librarys_own_class() -> None:
    base = nn.Sequential(nn.Linear(8, 8))
    kind = type("AffineTensor", (nn.Parameter,), {"__module__": "torchao.dtypes"})
    quantized = nn.Sequential(nn.Linear(8, 8))
    quantized[0].weight = kind(torch.zeros(8, 8))
    for expert in (quantized, {"0.weight": quantized[0].weight}):
        with pytest.raises(
            pf.CheckpointError, match=r"quantized \(torchao\): tensor '0\.weight' is a Affine"
        ):
            pf.stack(base, {"x": expert})


def test_gguf(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for path in (tmp_path / "model.gguf", tmp_path):
        with pytest.raises(
            pf.CheckpointError, match=r"GGUF holds packed weights.*gguf_file=.*save_pretrained"
        ):
            pf.stack(path, {"x": path})


def test_other_integers_in_an_expert() -> None:
    """Integers are the base's: an expert with a table of its own would get another's."""
    base = {"weight": torch.zeros(4), "table": torch.arange(6).view(2, 3), "seen": torch.tensor(1)}
    expert = {**base, "weight": torch.ones(4), "seen": torch.tensor(7)}
    pf.stack(base, {"x": expert})  # a counter may differ
    with pytest.raises(
        pf.CheckpointError, match=r"'table' holds other integers than the base's.*must be equal"
    ):
        pf.stack(base, {"x": {**expert, "table": base["table"] + 1}})
    for other in (torch.ones(4, dtype=torch.int8), torch.ones(4, dtype=torch.complex64)):
        with pytest.raises(
            pf.CheckpointError, match=rf"'weight' is {other.dtype}, and torch\.float32 in the base"
        ):
            pf.stack(base, {"x": {**expert, "weight": other}})


@pytest.mark.parametrize("dtype", [torch.complex128, torch.float8_e4m3fnuz])
def test_dtypes_that_no_store_holds(dtype: torch.dtype) -> None:
    tensors = {"weight": torch.ones(4, 4).to(dtype)}
    with pytest.raises(pf.CheckpointError, match=rf"'weight' is {dtype}, which no store holds; convert it"):
        pf.stack(tensors, {"x": tensors}, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float64])
def test_the_advice_for_other_floats_works(dtype: torch.dtype, tmp_path: Path) -> None:
    base = {"weight": torch.randn(6, 5).to(dtype), "bias": torch.randn(6)}
    expert = {name: (t.float() * 1.5).to(t.dtype) for name, t in base.items()}
    safetensors.torch.save_file(base, tmp_path / "base.safetensors")
    for start in (base, tmp_path / "base.safetensors"):
        with pytest.raises(pf.CheckpointError, match=r"cannot be merged; pass dtype=torch\.float32"):
            pf.stack(start, {"x": expert})
        for wanted in (torch.float32, torch.bfloat16):
            engine = pf.stack(start, {"x": expert}, dtype=wanted, static_weight=1.0)
            engine.save(tmp_path / "store")
            ours = pf.load(tmp_path / "store").merge_state_dict([1.0])
            for name, tensor in expert.items():
                torch.testing.assert_close(ours[name], tensor.to(wanted), rtol=2**-7, atol=1e-2)
            shutil.rmtree(tmp_path / "store")
    broken: dict[str, Any] = {**expert, "weight": torch.full((6, 5), float("nan")).to(dtype)}
    with pytest.raises(pf.CheckpointError, match="'weight' holds NaN"):
        pf.stack(base, {"x": broken}, dtype=torch.float32)


def test_the_advice_for_complex_numbers_works(tmp_path: Path) -> None:
    base = {"weight": torch.randn(3, dtype=torch.complex64), "bias": torch.randn(3)}
    expert = {name: t * 2 for name, t in base.items()}
    for dtype in (None, torch.float32):
        with pytest.raises(pf.CheckpointError, match=r"complex numbers are not merged.*view_as_real"):
            pf.stack(base, {"x": expert}, dtype=dtype)

    def real(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: torch.view_as_real(t) if t.is_complex() else t for n, t in tensors.items()}

    ours = pf.stack(real(base), {"x": real(expert)}, static_weight=1.0).merge_state_dict([1.0])
    torch.testing.assert_close(torch.view_as_complex(ours["weight"]), expert["weight"])


def test_dtypes_that_only_the_format_knows(tmp_path: Path) -> None:
    """They are no damage: copying the file again would not help."""
    header = json.dumps({"x": {"dtype": "F8_E8M0", "shape": [2], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    with pytest.raises(
        pf.StoreError, match=r"'x' is F8_E8M0, a dtype of the safetensors format.*convert"
    ) as error:
        pf.stack(tmp_path / "m.safetensors", {"x": tmp_path / "m.safetensors"})
    assert "copy" not in str(error.value)


def test_ordinary_integers_are_no_format() -> None:
    base, experts = net_and_experts()
    pf.stack(base, experts)
