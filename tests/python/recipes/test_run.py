"""Runs of recipes: what they refuse before writing, what they leave behind, and what lies beside the weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import paretofuse as pf
from paretofuse.engine.errors import CheckpointError
from paretofuse.methods import Group, Method
from paretofuse.recipes import run as runs
from tests.support.command import call
from tests.support.process import python
from tests.support.recipes import save_family, tensors_of, tiny_llama, written

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

MEAN = "merge_method: linear\nmodels: [{model: <a>}, {model: <b>}]\nparameters: {weight: 1}"
TIES = """
merge_method: ties
base_model: <base>
models: [{model: <a>}, {model: <b>}]
parameters: {weight: 1, density: .5}
"""


@pytest.fixture
def llamas(tmp_path: Path) -> dict[str, Path]:
    return save_family(tmp_path, tiny_llama(), 2)


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replace tensors of a directory, or remove them."""
    state = {
        **load_file(folder / "model.safetensors"),
        **{k.replace("__", "."): v for k, v in tensors.items()},
    }
    save_file(
        {k: v for k, v in state.items() if v is not None}, folder / "model.safetensors", {"format": "pt"}
    )


def configure(folder: Path, **settings: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))


def test_the_command_line(
    llamas: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = written(tmp_path, MEAN + "\n" + "# a comment stays", llamas)
    code, out, err = call(capsys, "recipe", config, "-o", tmp_path / "out", "--json", "--threads", "1")
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert (told["method"], told["tensors"], told["notes"]) == ("linear", 30, [])
    assert told["bytes"] == sum(t.nbytes for t in tensors_of(tmp_path / "out").values())
    assert (tmp_path / "out" / "mergekit_config.yml").read_text() == config.read_text()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "merge method\nlinear" in card
    assert "# a comment stays" in card
    code, out, _ = call(capsys, "recipe", config, "-o", tmp_path / "out")
    assert code == 0
    assert "30 tensors" in out
    code, _, err = call(capsys, "recipe", tmp_path / "none.yml", "-o", tmp_path / "out")
    assert code == 1
    assert "No such file" in err


def test_a_recipe_loads_no_torch(llamas: dict[str, Path], tmp_path: Path) -> None:
    config = written(tmp_path, TIES, llamas)
    program = "import sys; from paretofuse.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    assert python(program, "recipe", config, "-o", tmp_path / "out").strip().endswith("False")


def test_only_a_recipes_output_is_replaced(llamas: dict[str, Path], tmp_path: Path) -> None:
    config = written(tmp_path, MEAN, llamas)
    for place in (llamas["a"], config):
        with pytest.raises(ValueError, match=r"which (holds other files than a recipe's output|is a file)"):
            pf.run_recipe(config, place)
    (tmp_path / "empty").mkdir()
    pf.run_recipe(config, tmp_path / "empty")
    first = tensors_of(tmp_path / "empty")
    pf.run_recipe(written(tmp_path, TIES, llamas), tmp_path / "empty")
    assert not torch.equal(first["model.norm.weight"], tensors_of(tmp_path / "empty")["model.norm.weight"])


def test_a_failure_leaves_nothing(
    llamas: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(Method):
        name = "failing"

        def reference(self, group: Group) -> np.ndarray:
            if group.name == "model.norm.weight":
                raise ValueError("cannot")
            return group.models[0].floats()

    config = written(tmp_path, "merge_method: failing\nmodels: [{model: <a>}]", llamas)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"recipe.yml, line 2: tensor 'model.norm.weight': cannot"):
        pf.run_recipe(config, tmp_path / "out", methods=[Failing()])
    assert sorted(tmp_path.iterdir()) == before


def test_large_outputs_are_cut(
    llamas: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    config = written(tmp_path, MEAN, llamas)
    pf.run_recipe(config, tmp_path / "whole")
    monkeypatch.setattr(runs, "SHARD_BYTES", 5000)
    pf.run_recipe(config, tmp_path / "cut")
    assert len(list((tmp_path / "cut").glob("model-0000?-of-0000?.safetensors"))) > 3
    whole, cut = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    pf.run_recipe(config, tmp_path / "again")
    pf.run_recipe(written(tmp_path, MEAN.replace("<a>", str(tmp_path / "cut")), llamas), tmp_path / "again")


def test_progress_counts_all_bytes(llamas: dict[str, Path], tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    done = pf.run_recipe(
        written(tmp_path, MEAN, llamas), tmp_path / "out", progress=lambda a, b: seen.append((a, b))
    )
    assert seen[-1] == (done.nbytes, done.nbytes)
    assert len(seen) == done.tensors


def test_a_missing_tensor_is_named(llamas: dict[str, Path], tmp_path: Path) -> None:
    change(llamas["b"], model__norm__weight=None)
    with pytest.raises(CheckpointError, match=r"tensor 'model.norm.weight' is not in .*b, expected all"):
        pf.run_recipe(written(tmp_path, MEAN, llamas), tmp_path / "out")


def test_another_shape_is_named(llamas: dict[str, Path], tmp_path: Path) -> None:
    change(llamas["b"], model__norm__weight=torch.ones(13))
    with pytest.raises(
        CheckpointError, match=r"'model.norm.weight' has shape \[12\] in .*a and \[13\] in .*b"
    ):
        pf.run_recipe(written(tmp_path, MEAN, llamas), tmp_path / "out")


def test_another_vocabulary_is_named_with_the_remedy(llamas: dict[str, Path], tmp_path: Path) -> None:
    change(llamas["b"], model__embed_tokens__weight=torch.ones(40, 12))
    with pytest.raises(CheckpointError, match="give tokenizer_source: base or union"):
        pf.run_recipe(written(tmp_path, MEAN, llamas), tmp_path / "out")


def test_integers_must_agree(llamas: dict[str, Path], tmp_path: Path) -> None:
    for name in ("a", "b"):
        change(llamas[name], steps=torch.tensor([1, 2]))
    pf.run_recipe(written(tmp_path, MEAN, llamas), tmp_path / "out")
    assert tensors_of(tmp_path / "out")["steps"].tolist() == [1, 2]
    change(llamas["b"], steps=torch.tensor([1, 3]))
    with pytest.raises(
        CheckpointError, match="'steps' holds I64, which are not merged, and they differ between"
    ):
        pf.run_recipe(written(tmp_path, MEAN, llamas), tmp_path / "out")
    change(llamas["b"], steps=torch.ones(2))
    with pytest.raises(CheckpointError, match=r"'steps' is I64 in .* and F32 in"):
        pf.run_recipe(written(tmp_path, MEAN, llamas), tmp_path / "out")


def test_what_one_model_has_too_many_is_noted(llamas: dict[str, Path], tmp_path: Path) -> None:
    change(llamas["a"], model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(3))
    change(llamas["b"], score__weight=torch.ones(3))
    done = pf.run_recipe(written(tmp_path, MEAN, llamas), tmp_path / "out")
    assert [note.partition(": ")[2][:30] for note in done.notes] == [
        "a buffer that " + str(llamas["b"])[:16], "1 tensors that " + str(llamas["a"])[:15],
    ]  # fmt: skip
    assert len(tensors_of(tmp_path / "out")) == 30


def test_names_with_and_without_a_class_prefix(llamas: dict[str, Path], tmp_path: Path) -> None:
    config = written(tmp_path, MEAN, llamas)
    pf.run_recipe(config, tmp_path / "plain")
    state = load_file(llamas["b"] / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    save_file(bare, llamas["b"] / "model.safetensors", {"format": "pt"})
    pf.run_recipe(config, tmp_path / "bare")
    plain, found = tensors_of(tmp_path / "plain"), tensors_of(tmp_path / "bare")
    assert plain.keys() == found.keys()
    assert all(torch.equal(plain[name], found[name]) for name in plain)


def test_layers_that_are_not_there(llamas: dict[str, Path], tmp_path: Path) -> None:
    text = "merge_method: passthrough\nslices:\n- sources:\n  - {model: <a>, layer_range: [1, 4]}"
    with pytest.raises(CheckpointError, match=r"line 4: got layer 3 of .*a, which has 3 layers"):
        pf.run_recipe(written(tmp_path, text, llamas), tmp_path / "out")


def test_what_no_recipe_takes_for_a_model(llamas: dict[str, Path], tmp_path: Path) -> None:
    (llamas["b"] / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="this is an adapter; merge it first"):
        pf.run_recipe(written(tmp_path, MEAN, llamas), tmp_path / "out")
    (llamas["b"] / "adapter_config.json").unlink()
    configure(llamas["b"], quantization_config={"quant_method": "awq"})
    with pytest.raises(CheckpointError, match="quantized"):
        pf.run_recipe(written(tmp_path, MEAN, llamas), tmp_path / "out")
    with pytest.raises(CheckpointError, match="nor a model that the Hugging Face cache or the Hub has"):
        pf.run_recipe(written(tmp_path, MEAN, {"a": Path("org/none"), "b": llamas["b"]}), tmp_path / "out")


def test_weights_that_sum_to_0(llamas: dict[str, Path], tmp_path: Path) -> None:
    text = MEAN.replace(
        "parameters: {weight: 1}", "parameters: {weight: [{filter: mlp, value: 1}, {value: 0}]}"
    )
    with pytest.raises(ValueError, match=r"line 2: tensor .*: got weights \[0.0, 0.0\] .* which sum to 0"):
        pf.run_recipe(written(tmp_path, text, llamas), tmp_path / "out")


def test_the_seed_decides(llamas: dict[str, Path], tmp_path: Path) -> None:
    config = written(tmp_path, TIES.replace("ties", "dare_ties"), llamas)
    made = []
    for number, seed in enumerate((3, 3, 4)):
        pf.run_recipe(config, tmp_path / str(number), seed=seed, threads=1 + number)
        made.append((tmp_path / str(number) / "model.safetensors").read_bytes())
    assert made[0] == made[1] != made[2]
