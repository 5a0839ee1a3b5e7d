"""Three small real texts: BBC news and the King James Bible, from pinned packages, and Python's own standard library.

What is held out comes from other articles, chapters and modules than what is learned from.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.data_sets import texts

NAMES = ("news", "bible", "python")
LENGTH = 48
"""Tokens of a row."""

MODULES = (
    "argparse", "ast", "configparser", "csv", "datetime", "difflib", "fractions", "inspect", "logging/__init__",
    "pathlib", "random", "shutil", "statistics", "subprocess", "tarfile", "textwrap", "threading", "zipfile",
)  # fmt: skip


def documents(name: str) -> list[str]:
    """A text's documents in a fixed order."""
    if name == "news":
        return [article.text for article in texts.news()]
    if name == "bible":
        chapters: dict[str, list[str]] = {}
        for verse in texts.verses():
            chapters.setdefault(verse.document, []).append(verse.text)
        return [" ".join(verses) for verses in chapters.values()]
    library = Path(sysconfig.get_path("stdlib"))
    found = [library / f"{module}.py" for module in MODULES]  # 3.13 made a package of pathlib
    return [path.read_text(encoding="utf-8") for path in found if path.is_file()]


def rows(name: str, tokenizer: object, count: int, *, held_out: bool) -> Tensor:
    """int64 [count, LENGTH]: rows of tokens drawn from every fifth document (held out) or from the others.

    Raises:
        ValueError: the text has fewer rows.
    """
    every = documents(name)
    own = [text for at, text in enumerate(every) if (at % 5 == 4) == held_out]
    generator = torch.Generator().manual_seed(0)
    found: list[Tensor] = []
    for at in torch.randperm(len(own), generator=generator).tolist():
        tokens = torch.tensor(tokenizer(own[at])["input_ids"])  # type: ignore[operator]
        found += tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH).unbind()
        if len(found) >= 8 * count:
            break
    if len(found) < count:
        raise ValueError(f"got {count} rows of {name!r}, expected at most {len(found)}")
    drawn = torch.randperm(len(found), generator=generator)[:count]
    return torch.stack([found[at] for at in drawn.tolist()])
