"""Chat templates: what a recipe's `chat_template` comes to."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping

from paretofuse.recipes.config import Recipe
from paretofuse.recipes.models import Model

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""OpenAI's ChatML, the only template that recipes know by name."""


def chat_template(recipe: Recipe, models: Mapping[str, Model]) -> str | None:
    """The template of a recipe: "auto" (the one that most models have), "chatml", or a template of Jinja.

    Returns:
        None for "auto" where no model has one.

    Raises:
        ValueError: none of these.
    """
    wanted = recipe.chat_template or ""
    if wanted == "auto":
        found = Counter(own for model in models.values() if (own := _own(model)) is not None)
        return found.most_common(1)[0][0] if found else None
    if wanted == "chatml":
        return CHATML
    if "{" not in wanted:
        raise ValueError(
            f"{recipe.file}: got chat_template: {wanted}, expected auto, chatml, or a template of Jinja"
        )
    return wanted


def _own(model: Model) -> str | None:
    """A model's chat template, wherever its tokenizer keeps it."""
    path = model.path / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8").strip()
    path = model.path / "tokenizer_config.json"
    held = json.loads(path.read_bytes()).get("chat_template") if path.is_file() else None
    if isinstance(held, list):
        held = next((entry.get("template") for entry in held if entry.get("name") == "default"), None)
    return held.strip() if isinstance(held, str) and held.strip() else None
