"""Models of different vocabularies: token by token what mergekit makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import paretofuse as pf
from paretofuse.engine.errors import CheckpointError
from paretofuse.recipes.run import run_recipe
from tests.support.command import call
from tests.support.recipes import by_mergekit, save_family, tensors_of, tiny_llama, written

pytest.importorskip("mergekit", reason="the peer that recipes are compared with")
pytestmark = pytest.mark.filterwarnings("ignore")  # of mergekit's libraries

ALONE = "merge_method: passthrough\nmodels: [{model: <a>}]\n"
WORDS = [f"w{number}" for number in range(37)]
LINEAR = """
merge_method: linear
models:
- {model: <base>, parameters: {weight: 0.5}}
- {model: <a>, parameters: {weight: 0.3}}
- {model: <b>, parameters: {weight: 0.2}}
base_model: <base>
"""
TIES = """
merge_method: task_arithmetic
base_model: <base>
models:
- {model: <a>, parameters: {weight: 0.3}}
- {model: <b>, parameters: {weight: 0.2}}
"""


def save_tokenizer(folder: Path, words: list[str], added: tuple[str, ...] = ()) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))
    plain.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token=words[0])
    tokenizer.add_tokens(list(added))
    tokenizer.save_pretrained(folder)


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    """A base of 37 words; a has two more, of which b has one at another place; b's words are in another order."""
    found = save_family(tmp_path, tiny_llama(), 2)
    torch.manual_seed(3)
    for name, words, added in (
        ("base", WORDS, ()),
        ("a", WORDS, ("<left>", "<both>")),
        ("b", [WORDS[0], *reversed(WORDS[1:])], ("<both>",)),
    ):
        save_tokenizer(found[name], words, added)
        if added:
            from transformers import LlamaForCausalLM

            model = LlamaForCausalLM.from_pretrained(found[name])
            model.resize_token_embeddings(37 + len(added))
            model.save_pretrained(found[name])
    return found


def by_token(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    from transformers import AutoTokenizer

    return tensors_of(folder), AutoTokenizer.from_pretrained(folder).get_vocab()


@pytest.mark.parametrize("source", ["base", "union", "<a>"])
@pytest.mark.parametrize("text", [LINEAR, TIES], ids=["linear", "task_arithmetic"])
def test_every_tokens_row_equals_mergekits(
    text: str, source: str, models: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    config = written(tmp_path, f"{text}\ntokenizer_source: {source}", models)
    by_mergekit(config, tmp_path / "theirs")
    done = run_recipe(config, tmp_path / "ours")
    theirs, their_words = by_token(tmp_path / "theirs")
    ours, our_words = by_token(tmp_path / "ours")
    assert our_words.keys() == their_words.keys()
    assert len(our_words) == {"base": 37, "union": 39, "<a>": 39}[source]
    for name, truth in theirs.items():
        if "embed" in name or "lm_head" in name:
            for word, row in our_words.items():
                torch.testing.assert_close(ours[name][row], truth[their_words[word]], rtol=2e-6, atol=4e-7)
        else:
            torch.testing.assert_close(ours[name], truth, rtol=2e-6, atol=4e-7)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert model.config.vocab_size == len(our_words)
    assert any(note.endswith("it lacks 0") for note in done.notes)


def test_rows_are_padded(models: dict[str, Path], tmp_path: Path) -> None:
    text = LINEAR + "tokenizer: {source: union, pad_to_multiple_of: 16}"
    run_recipe(written(tmp_path, text, models), tmp_path / "ours")
    assert tensors_of(tmp_path / "ours")["lm_head.weight"].shape == (48, 12)
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["vocab_size"] == 48


def test_a_base_without_a_tokenizer_is_named(models: dict[str, Path], tmp_path: Path) -> None:
    for path in models["base"].glob("tokenizer*"):
        path.unlink()
    with pytest.raises(
        CheckpointError, match="got no tokenizer in its directory, which tokenizer_source: base needs"
    ):
        run_recipe(written(tmp_path, f"{LINEAR}\ntokenizer_source: base", models), tmp_path / "ours")


def test_chat_templates(models: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    talk = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    for name in ("a", "b"):
        (models[name] / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    for wanted, expected in {
        "auto": "w1!",
        "chatml": "<|im_start|>user\nw1<|im_end|>\n<|im_start|>assistant\nw2<|im_end|>\n",
        '"{{ messages | length }}"': "2",
    }.items():
        for recipe in (ALONE, f"{LINEAR}tokenizer_source: union\n"):
            run_recipe(written(tmp_path, f"{recipe}chat_template: {wanted}", models), tmp_path / "ours")
            tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
            assert tokenizer.apply_chat_template(talk, tokenize=False) == expected
    with pytest.raises(ValueError, match="got chat_template: llama9, expected auto, chatml, or a template"):
        run_recipe(written(tmp_path, f"{ALONE}chat_template: llama9", models), tmp_path / "ours")


@pytest.mark.parametrize("tokenizer", ["union", "base"])
def test_stacking_by_token_is_stacking_what_recipes_fit(
    tokenizer: str, models: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    truth = {}
    for name in models:
        text = (
            f"merge_method: linear\ntokenizer_source: {tokenizer}\nbase_model: <base>\nmodels:\n"
            + "".join(
                f"- {{model: <{other}>, parameters: {{weight: {int(other == name)}}}}}\n" for other in models
            )
        )
        run_recipe(written(tmp_path, text, models), tmp_path / f"fitted-{name}")
        truth[name] = tensors_of(tmp_path / f"fitted-{name}")
    experts = {name: models[name] for name in ("a", "b")}
    engine = pf.stack(models["base"], experts, tokenizer=tokenizer)
    for name in experts:
        merged = engine.merge_state_dict({name: 1.0})
        for tensor, values in truth[name].items():
            torch.testing.assert_close(merged[tensor], values)
    nothing = engine.merge_state_dict(weights=torch.zeros(len(engine.groups), 2))
    routed = engine.tensor_groups
    for tensor, values in truth["base"].items():
        if routed.get(tensor) is not None:
            torch.testing.assert_close(nothing[tensor], values)
    lacks = 0 if tokenizer == "union" else 37
    assert any("one vocabulary of" in note for note in engine.notes)
    assert any(
        note == f"expert 'a': 39 tokens, of the merged {39 if lacks == 0 else 37} it lacks 0"
        for note in engine.notes
    )

    engine.save(tmp_path / "store")
    from paretofuse.engine.merging.disk import merge_store

    merge_store(tmp_path / "store", {"a": 0.5, "b": 0.5}, tmp_path / "merged")
    _, words = by_token(tmp_path / "merged")
    _, expected = by_token(tmp_path / "fitted-base")
    assert words == expected
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0] == len(words)
    alike = engine.merge({"a": 0.5, "b": 0.5}).state_dict()
    for tensor, values in model.state_dict().items():
        torch.testing.assert_close(values, alike[tensor])


def test_stacking_by_token_on_the_command_line_and_its_refusals(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    for name, modules in (("plain", ["q_proj"]), ("wide", ["q_proj", "embed_tokens"])):
        lora = get_peft_model(
            LlamaForCausalLM.from_pretrained(models["base"]),
            LoraConfig(r=2, target_modules=modules, init_lora_weights=False),
        )
        lora.save_pretrained(tmp_path / name)
    words = [
        "stack",
        models["base"],
        "--expert",
        f"a={models['a']}",
        "--tokenizer",
        "union",
        "-o",
        tmp_path / "s",
    ]
    code, out, err = call(capsys, *words, "--expert", f"lora={tmp_path / 'plain'}")
    assert (code, err) == (0, "")
    assert "note: one vocabulary of 39 tokens" in out
    merged = pf.load(tmp_path / "s").merge_state_dict({"lora": 1.0})
    plain = pf.stack(models["base"], {"lora": tmp_path / "plain"}).merge_state_dict({"lora": 1.0})
    for name, values in plain.items():
        torch.testing.assert_close(merged[name][: len(values)] if values.dim() else merged[name], values)
    code, _, err = call(capsys, *words[:-1], tmp_path / "t", "--expert", f"lora={tmp_path / 'wide'}")
    assert code == 1
    assert "cannot be fitted to another tokenizer" in err
    base = LlamaForCausalLM.from_pretrained(models["base"])
    with pytest.raises(TypeError, match="got tokenizer='union' and the base as a LlamaForCausalLM"):
        pf.stack(base, {"a": models["a"]}, tokenizer="union")
    for path in models["base"].glob("tokenizer*"):
        path.unlink()
    with pytest.raises(
        CheckpointError, match="got no tokenizer in its directory, which tokenizer='union' needs"
    ):
        pf.stack(models["base"], {"a": models["a"]}, tokenizer="union")
