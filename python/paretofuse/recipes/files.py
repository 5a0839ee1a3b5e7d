"""What stands beside a recipe's weights: configuration, tokenizer, model card, and the recipe itself."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np

from paretofuse.adapters.files import companion_files
from paretofuse.engine.merging.card import BASE_CARD, CARD, kept_lines
from paretofuse.engine.store.writer import own_version
from paretofuse.recipes.config import DTYPES, Recipe
from paretofuse.recipes.models import CONFIG, LAYER_COUNTS, Model
from paretofuse.recipes.plan import Plan
from paretofuse.recipes.templates import chat_template
from paretofuse.recipes.vocabulary import Vocabulary

RECIPE = "mergekit_config.yml"
"""Where mergekit keeps the recipe beside a merged model; hubs and scripts look for it there."""


_TOKENIZER = (
    "tokenizer",
    "vocab.",
    "merges.txt",
    "added_tokens",
    "special_tokens_map",
    "chat_template",
    "spiece.",
)
"""How names of a tokenizer's files begin."""


def files_beside(
    recipe: Recipe, plan: Plan, models: Mapping[str, Model], vocabulary: Vocabulary | None
) -> dict[str, bytes]:
    """The donor's own files by name, fitted to the merged model, with its card and its recipe.

    Args:
        recipe: the recipe.
        plan: what it comes to.
        models: every model that the recipe names.
        vocabulary: the merged tokenizer, where the recipe asks for one.

    Raises:
        ValueError: a chat template that is none.
    """
    files = companion_files(plan.donor.path)
    if vocabulary is not None:
        files = with_tokenizer(files, vocabulary)
    if recipe.chat_template is not None and (template := chat_template(recipe, models)) is not None:
        files = _with_chat_template(files, template)
    if CONFIG in files:
        files[CONFIG] = json.dumps(
            _configuration(recipe, plan, None if vocabulary is None else vocabulary.size), indent=2
        ).encode()
    old = files.pop(CARD, None)
    if old is not None:
        files[BASE_CARD] = old
    files[CARD] = _card(recipe, plan, old).encode()
    files[RECIPE] = recipe.text.encode()
    return files


def with_tokenizer(files: Mapping[str, bytes], vocabulary: Vocabulary) -> dict[str, bytes]:
    """A directory's files with the merged tokenizer's in the place of its own."""
    kept = {name: content for name, content in files.items() if not name.startswith(_TOKENIZER)}
    return {**kept, **vocabulary.files()}


def _configuration(recipe: Recipe, plan: Plan, rows: int | None) -> dict[str, object]:
    """The donor's configuration with the merged model's layers, dtype and vocabulary."""
    config: dict[str, object] = dict(plan.donor.config)
    dtype = recipe.out_dtype or recipe.dtype
    if dtype is not None:
        name = next(word for word, code in DTYPES.items() if code == dtype)
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = name
    if plan.layers:
        (before,) = plan.donor.stacks.values()
        for key in LAYER_COUNTS:
            if config.get(key) == before:
                config[key] = len(plan.layers)
        for key, value in plan.donor.config.items():  # such as the kind of attention in each layer
            if isinstance(value, list) and len(value) == before and key.endswith("layer_types"):
                config[key] = [model.config.get(key, value)[layer] for model, layer in plan.layers]
    if rows is not None:
        config["vocab_size"] = rows
    return config


def _card(recipe: Recipe, plan: Plan, old: bytes | None) -> str:
    """README.md in the form that hubs read."""
    lines = [f"- {name}" for name in recipe.models]
    kept = f"\nThe base's own card is [{BASE_CARD}]({BASE_CARD}).\n" if old is not None else ""
    fence = "`" * (3 + recipe.text.count("```"))
    return f"""---
{kept_lines(old)}tags:
- merge
- paretofuse
---

# A merged model

Made by [ParetoFuse](https://arxiv.org/abs/2406.09770) {own_version()} (NumPy {np.__version__}) with the merge method
{recipe.method.name}{f" and the base {recipe.base}" if recipe.base else ""} of these models:

{chr(10).join(lines)}

The recipe, which is also in [{RECIPE}]({RECIPE}):

{fence}yaml
{recipe.text.rstrip()}
{fence}
{kept}"""


def _with_chat_template(files: Mapping[str, bytes], template: str) -> dict[str, bytes]:
    """The files with a chat template in place of the tokenizer's own."""
    found = dict(files)
    name = "tokenizer_config.json"
    if name in found:
        settings = json.loads(found[name])
        settings.pop("chat_template", None)
        found[name] = json.dumps(settings, indent=2, ensure_ascii=False).encode()
    found["chat_template.jinja"] = template.encode()
    return found
