"""Two real texts that every Python brings: its reference manual in English, and its own source. A token is a byte."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor

NAMES = ("prose", "code")
LENGTH = 64
"""Tokens of a row."""
MODULES = (
    "argparse",
    "ast",
    "csv",
    "datetime",
    "difflib",
    "inspect",
    "shutil",
    "statistics",
    "tarfile",
    "zipfile",
)


def rows(name: str, *, held_out: bool) -> Tensor:
    """int64 [rows, LENGTH], in a random but fixed order; every fifth document is held out, the others are not."""
    if name == "prose":
        documents = [topics[topic] for topic in sorted(topics)]
    else:
        library = Path(sysconfig.get_path("stdlib"))
        # Python 3.12 made a package of zipfile.
        files = [(library / f"{module}.py", library / module / "__init__.py") for module in MODULES]
        documents = [(own if own.exists() else package).read_text(encoding="utf-8") for own, package in files]
    text = "".join(text for at, text in enumerate(documents) if (at % 5 == 4) == held_out)
    tokens = torch.tensor(list(text.encode()))
    found = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    return found[torch.randperm(len(found), generator=torch.Generator().manual_seed(0))]
