"""What a recipe gets wrong is named with its line; what is not supported by its key."""

from __future__ import annotations

import pytest

from paretofuse.engine.methods.method import Group, Method, Parameter
from paretofuse.engine.methods.numbers import Floats
from paretofuse.recipes.config import parse
from paretofuse.recipes.settings import evaluate, resolve

MODELS = "models:\n- model: org/a\n- model: org/b\n"

WRONG = {
    "": ("r.yml: got an empty file"),
    "merge_method: [": "r.yml, line 1: this is no YAML",
    "a: 1\na: 2": "line 2: got the key 'a' twice",
    "- linear": "line 1: got a list for a recipe, expected keys and values",
    MODELS: "line 1: got no merge_method",
    "merge_method: linear": "line 1: got neither, expected either models: or slices:",
    "merge_method: linear\nslices: []\n" + MODELS: "line 1: got models and slices",
    "\nmerge_method: multislerp\n" + MODELS: "line 2: got merge_method: multislerp, which is not supported",
    "merge_method: sce\n" + MODELS: "got merge_method: sce, which is not supported; expected one of linear, ",
    "merge_method: karcher\n" + MODELS: "merge_method: karcher",
    "merge_method: linear\nmodules: {}\n" + MODELS: "line 2: got the key 'modules' in a recipe, which is not supp",
    "merge_method: linear\nmodels:\n- model: a\n  weigth: 1": "line 4: got the key 'weigth' in a model",
    "merge_method: linear\nmodels:\n- parameters: {weight: 1}": "line 3: got no model, expected",
    "merge_method: linear\nmodels: 3": "line 2: got 3 for models, expected a list",
    "x" * 500: f"line 1: got '{'x' * 79}... for a recipe, expected keys and values",
    "merge_method: linear\nmodels: []": "line 2: got an empty list for models, expected a list of at least one",
    "merge_method: linear\n" + MODELS + "dtype: int8": "line 5: got dtype: int8, expected one of float32",
    "merge_method: linear\n" + MODELS + "parameters: {weigth: 1}": "line 5: got the parameter 'weigth', which no",
    "merge_method: linear\n" + MODELS + "parameters:\n  weight: heavy": "line 6: got weight: 'heavy', expected a fin",
    "merge_method: linear\n" + MODELS + "parameters:\n  weight: [1, .nan]": "line 6: got weight: nan, expected",
    "merge_method: linear\n" + MODELS + "parameters:\n  normalize: 2": "line 6: got normalize: 2, expected true or",
    "merge_method: linear\n" + MODELS + "parameters:\n  weight:\n  - filter: mlp": "line 7: got a filter without",
    "merge_method: linear\n" + MODELS + "parameters:\n  weight: {value: 1, name: mlp}": "line 6: got the key 'name'",
    "merge_method: ties\n" + MODELS: "line 2: got no base_model, which ties requires",
    "merge_method: slerp\nbase_model: org/a\n" + MODELS + "- model: c": "got 2 models beside the base model for sle",
    "merge_method: passthrough\n" + MODELS: "got 2 models for passthrough, expected 1",
    "merge_method: model_stock\nbase_model: org/a\n" + MODELS: "got 1 models beside the base model for model_st",
    "merge_method: linear\n" + MODELS + "- model: org/a": "got the model org/a twice",
    "merge_method: linear\nmodels:\n- model: org/a+org/lora": "line 3: got org/a+org/lora, a model with a LoRA",
    "merge_method: linear\nslices:\n- sources:\n  - model: a": "line 4: got no layer_range for a",
    "merge_method: linear\nslices:\n- sources:\n  - {model: a, layer_range: [3, 1]}": "got layer_range: [3, 1]",
    "merge_method: linear\nslices:\n- sources:\n  - {model: a, layer_range: [1]}": "got 1 numbers for layer_range",
    "merge_method: linear\nslices:\n- sources:\n  - {model: a, layer_range: [0, 2.5]}": "got 2.5 for layer_range",
    "merge_method: linear\nslices:\n- sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 3]}]":
        "line 3: got sources of 2, 3 layers",
    "merge_method: ties\nbase_model: c\nslices:\n- sources:\n  - {model: a, layer_range: [0, 2]}":
        "line 4: got a slice without the base model c",
    "merge_method: linear\ntokenizer_source: base\ntokenizer: {}\n" + MODELS: "got tokenizer and tokenizer_source",
    "merge_method: linear\ntokenizer: {tokens: {}}\n" + MODELS: "line 2: got the key 'tokens' in tokenizer",
    "merge_method: linear\ntokenizer: {pad_to_multiple_of: 0}\n" + MODELS: "line 2: got pad_to_multiple_of: 0",
    "a: &x\n  b: *x": "got a value that contains itself",
}  # fmt: skip


@pytest.mark.parametrize("text", WRONG)
def test_a_fault_is_named_with_its_line(text: str) -> None:
    with pytest.raises(ValueError, match=r"^r\.yml") as caught:
        parse(text, "r.yml")
    assert WRONG[text] in str(caught.value)


def test_what_a_recipe_says() -> None:
    recipe = parse(
        "merge_method: dare_ties\nbase_model: org/base\ndtype: torch.bfloat16\nout_dtype: float16\n"
        "tokenizer: {source: union, pad_to_multiple_of: 64}\nchat_template: auto\n"
        "parameters: {int8_mask: true, t: 0.5}\n" + MODELS
    )
    assert recipe.method.name == "dare_ties"
    assert recipe.models == ("org/base", "org/a", "org/b")
    assert (recipe.dtype, recipe.out_dtype, recipe.tokenizer, recipe.pad_vocabulary_to, recipe.chat_template) == (
        "BF16", "F16", "union", 64, "auto",
    )  # fmt: skip
    assert recipe.notes == ("recipe, line 7: dare_ties has no t; not used",)


def test_a_yaml_anchor_is_read_where_it_is_used() -> None:
    recipe = parse(
        "merge_method: linear\nmodels:\n- {model: a, parameters: &p {weight: 1}}\n- {model: b, parameters: *p}"
    )
    assert [source.parameters["weight"].value for source in recipe.slices[0].inputs] == [1, 1]


def value(
    setting: str, tensor: str = "model.layers.0.mlp.up_proj.weight", t: float = 0.0
) -> float | bool | None:
    weight = Parameter("weight", float)
    recipe = parse(f"merge_method: linear\n{MODELS}parameters:\n  weight: {setting}")
    return evaluate(recipe.parameters["weight"], weight, tensor, t)


def test_values_gradients_and_filters() -> None:
    assert value("3") == 3
    assert value("1e-3") == 1e-3
    assert [value("[0, 1, 0.5]", t=t) for t in (0, 0.25, 0.5, 0.75, 1)] == [0, 0.5, 1, 0.75, 0.5]
    assert value("[{filter: attn, value: 1}, {filter: mlp, value: [2, 4]}, {value: 5}]", t=0.5) == 3
    assert value("[{filter: attn, value: 1}, {filter: '*', value: 2}]") == 2
    assert value("{filter: attn, value: 1}") is None
    assert value("[]") is None


def test_the_innermost_block_that_has_a_value_counts() -> None:
    recipe = parse(
        f"merge_method: linear\n{MODELS}  parameters: {{weight: {{filter: attn, value: 7}}}}\nparameters: {{weight: 2}}"
    )
    blocks = (recipe.slices[0].inputs[1].parameters, recipe.parameters)
    weight = Parameter("weight", float, required=True)
    assert resolve(weight, blocks, "a.attn.b", 0, "here") == 7
    assert resolve(weight, blocks, "a.mlp.b", 0, "here") == 2
    with pytest.raises(
        ValueError, match=r"^here: got no weight for tensor 'a.mlp.b', which the method requires"
    ):
        resolve(weight, blocks[:1], "a.mlp.b", 0, "here")


class Median(Method):
    name = "median"

    def reference(self, group: Group) -> Floats:
        raise NotImplementedError


def test_a_method_of_ones_own() -> None:
    assert parse(f"merge_method: median\n{MODELS}", methods=[Median()]).method.name == "median"
    with pytest.raises(TypeError, match="expected an instance of a subclass of Method"):
        parse(f"merge_method: median\n{MODELS}", methods=[Median])  # type: ignore[list-item]
    taken = Median()
    taken.name = "ties"
    with pytest.raises(ValueError, match="got a method named 'ties', which there is already"):
        parse(f"merge_method: median\n{MODELS}", methods=[taken])
