"""Recipes give what mergekit itself gives, within rounding: each method that is not random, each kind of value."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from paretofuse.recipes.run import run_recipe
from tests.support.models import tiny_gpt2
from tests.support.recipes import by_mergekit, save_family, tensors_of, tiny_llama, written

pytest.importorskip("mergekit", reason="the peer that recipes are compared with")
pytestmark = pytest.mark.filterwarnings("ignore")  # of mergekit's libraries

THREE = """
base_model: <base>
models:
- model: <a>
  parameters: {weight: 0.3, density: 0.41}
- model: <base>
- model: <b>
  parameters: {weight: [0.1, 0.9], density: [0.9, 0.2, 0.5]}
- model: <c>
  parameters: {weight: [{filter: mlp, value: -0.4}, {filter: attn, value: [0.2, 0.6]}, {value: 1e-1}], density: 0.7}
"""

RECIPES = {
    "linear": """
        merge_method: linear
        models:
        - {model: <a>, parameters: {weight: 0.3}}
        - {model: <b>, parameters: {weight: [0.1, 0.9]}}
        - {model: <c>, parameters: {weight: [{filter: norm, value: 2}, {value: "1e-1"}]}}""",
    "linear, not normalized": """
        merge_method: linear
        base_model: <base>
        models:
        - {model: <a>}
        - {model: <b>}
        parameters: {weight: 0.7, normalize: false}""",
    "task_arithmetic": "merge_method: task_arithmetic" + THREE + "parameters: {lambda: 0.8}",
    "task_arithmetic, normalized": "merge_method: task_arithmetic" + THREE + "parameters: {normalize: true}",
    "ties": "merge_method: ties" + THREE + "parameters: {int8_mask: true, lambda: [0.5, 1.5]}",
    "ties, not normalized": "merge_method: ties" + THREE + "parameters: {normalize: false, rescale: true}",
    "ties, one element": """
        merge_method: ties
        base_model: <base>
        models: [{model: <a>}, {model: <b>}]
        parameters: {weight: 1.0, density: 0.000001}""",
    "breadcrumbs": "merge_method: breadcrumbs" + THREE + "parameters: {gamma: [0.01, 0.2]}",
    "breadcrumbs_ties": "merge_method: breadcrumbs_ties" + THREE + "parameters: {gamma: 0.7, rescale: true}",
    "dare_linear of all": """
        merge_method: dare_linear
        base_model: <base>
        models: [{model: <a>, parameters: {weight: 0.4}}, {model: <b>, parameters: {weight: -0.2}}]""",
    "della of all": """
        merge_method: della
        base_model: <base>
        models: [{model: <a>, parameters: {weight: 0.4}}, {model: <b>, parameters: {weight: 0.2}}]""",
    "slerp": """
        merge_method: slerp
        base_model: <base>
        models: [{model: <base>}, {model: <a>}]
        parameters: {t: [{filter: self_attn, value: [0, 0.5, 0.3, 1]}, {filter: mlp, value: [1, 0]}, {value: 0.5}]}""",
    "nuslerp": """
        merge_method: nuslerp
        models: [{model: <a>, parameters: {weight: 0.3}}, {model: <b>, parameters: {weight: 0.5}}]""",
    "nuslerp of differences": """
        merge_method: nuslerp
        base_model: <base>
        models: [{model: <a>, parameters: {weight: 0.3}}, {model: <b>, parameters: {weight: 0.5}}]""",
    "nuslerp by rows": """
        merge_method: nuslerp
        base_model: <base>
        models: [{model: <a>, parameters: {weight: 1}}, {model: <b>, parameters: {weight: -1}}]
        parameters: {nuslerp_flatten: false}""",
    "nuslerp by columns": """
        merge_method: nuslerp
        models: [{model: <a>, parameters: {weight: 0.3}}, {model: <b>, parameters: {weight: 0.5}}]
        parameters: {nuslerp_flatten: false, nuslerp_row_wise: true}""",
    "model_stock": """
        merge_method: model_stock
        base_model: <base>
        models: [{model: <a>}, {model: <b>}, {model: <c>}]""",
    "model_stock by rows": """
        merge_method: model_stock
        base_model: <base>
        models: [{model: <a>}, {model: <b>}]
        parameters: {filter_wise: true}""",
    "passthrough with slices": """
        merge_method: passthrough
        slices:
        - sources: [{model: <a>, layer_range: [0, 2]}]
        - sources:
          - model: <b>
            layer_range: [1, 3]
            parameters: {scale: [{filter: o_proj, value: 0.5}, {filter: down_proj, value: 0.25}, {value: 1.0}]}
        - sources: [{model: <base>, layer_range: [2, 3]}]""",
    "linear with slices": """
        merge_method: linear
        slices:
        - sources:
          - {model: <a>, layer_range: [0, 1], parameters: {weight: 0.2}}
          - {model: <b>, layer_range: [1, 2], parameters: {weight: 0.8}}
        - parameters: {weight: [0.3, 0.7]}
          sources:
          - {model: <c>, layer_range: [0, 3]}
          - {model: <base>, layer_range: [0, 3], parameters: {weight: 0.1}}""",
    "ties with slices": """
        merge_method: ties
        base_model: <base>
        slices:
        - sources:
          - {model: <a>, layer_range: [0, 2], parameters: {weight: 0.2, density: 0.5}}
          - {model: <base>, layer_range: [0, 2]}
        - base_model: <c>
          sources:
          - {model: <c>, layer_range: [0, 3]}
          - {model: <b>, layer_range: [0, 3], parameters: {weight: [0.3, 0.7], density: 0.3}}""",
}


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_family(tmp_path_factory.mktemp("llamas"), tiny_llama())


def dedented(text: str) -> str:
    lines = text.strip("\n").splitlines()
    margin = len(lines[0]) - len(lines[0].lstrip())
    return "\n".join(line[margin:] for line in lines)


@pytest.mark.parametrize("name", RECIPES)
def test_float32_equals_mergekit(name: str, llamas: dict[str, Path], tmp_path: Path) -> None:
    config = written(tmp_path, dedented(RECIPES[name]), llamas)
    theirs = by_mergekit(config, tmp_path / "theirs")
    run_recipe(config, tmp_path / "ours")
    ours = tensors_of(tmp_path / "ours")
    assert ours.keys() == theirs.keys()
    for tensor, truth in theirs.items():
        assert ours[tensor].dtype == truth.dtype == torch.float32
        # Rounding alone: a few units in the last place of the largest term.
        torch.testing.assert_close(ours[tensor], truth, rtol=2e-6, atol=4e-7)
    saved, config_of_theirs = (
        json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("ours", "theirs")
    )
    assert saved["num_hidden_layers"] == config_of_theirs["num_hidden_layers"]


def test_the_merged_directory_loads_and_computes_what_mergekits_does(
    llamas: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    config = written(tmp_path, dedented(RECIPES["passthrough with slices"]), llamas)
    by_mergekit(config, tmp_path / "theirs")
    run_recipe(config, tmp_path / "ours")
    ours, theirs = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("ours", "theirs"))
    tokens = torch.arange(10)[None]
    assert ours.config.num_hidden_layers == 5
    torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits)


def test_a_gpt2_whose_head_is_tied(tmp_path: Path) -> None:
    models = save_family(tmp_path, tiny_gpt2(), 2)
    config = written(tmp_path, dedented(RECIPES["nuslerp of differences"]), models)
    theirs = by_mergekit(config, tmp_path / "theirs")
    run_recipe(config, tmp_path / "ours")
    ours = tensors_of(tmp_path / "ours")
    assert ours.keys() == theirs.keys()
    for tensor, truth in theirs.items():
        torch.testing.assert_close(ours[tensor], truth, rtol=2e-6, atol=4e-7)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("", torch.bfloat16),
        ("dtype: float32", torch.float32),
        ("dtype: bfloat16\nout_dtype: float16", torch.float16),
        ("out_dtype: float32", torch.float32),
    ],
)
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "slerp"])
def test_dtypes_of_a_bfloat16_family(
    settings: str, expected: torch.dtype, method: str, tmp_path: Path
) -> None:
    """mergekit computes in the models' own dtype; ours in float32, rounded once, must not be further from the truth."""
    models = save_family(tmp_path, tiny_llama(), dtype=torch.bfloat16)
    text = dedented(RECIPES[method])
    exact = by_mergekit(written(tmp_path, f"{text}\ndtype: float64", models), tmp_path / "exact")
    config = written(tmp_path, f"{text}\n{settings}", models)
    theirs = by_mergekit(config, tmp_path / "theirs")
    run_recipe(config, tmp_path / "ours")
    ours = tensors_of(tmp_path / "ours")
    for tensor, truth in exact.items():
        assert ours[tensor].dtype == theirs[tensor].dtype == expected
        error, allowed = ((found[tensor].double() - truth).abs().max() for found in (ours, theirs))
        assert error <= 1.01 * allowed + 1e-6
    saved = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert (saved.get("dtype") or saved["torch_dtype"]) == str(expected).removeprefix("torch.")


def test_float32_models_rounded_to_bfloat16_first(llamas: dict[str, Path], tmp_path: Path) -> None:
    config = written(tmp_path, "merge_method: passthrough\nmodels: [{model: <a>}]\ndtype: bfloat16", llamas)
    run_recipe(config, tmp_path / "ours")
    for tensor, value in tensors_of(llamas["a"]).items():
        assert torch.equal(tensors_of(tmp_path / "ours")[tensor], value.bfloat16())


def test_ties_in_bfloat16_differs_only_where_magnitudes_are_as_large_as_the_smallest_that_is_kept(
    tmp_path: Path,
) -> None:
    models = save_family(tmp_path, tiny_llama(), dtype=torch.bfloat16)
    config = written(tmp_path, "merge_method: ties" + THREE, models)
    theirs = by_mergekit(config, tmp_path / "theirs")
    run_recipe(config, tmp_path / "ours")
    ours = tensors_of(tmp_path / "ours")
    far = total = 0
    for tensor, truth in theirs.items():
        off = (ours[tensor].float() - truth.float()).abs() > 0.02 * truth.float().abs() + 0.002
        far, total = far + int(off.sum()), total + truth.numel()
    assert far < 0.02 * total  # rounded differences put others at the edge
