"""examples/serve_llm: its commands are ones that exist, and its held-out texts are not those it learns from."""

from __future__ import annotations

import shlex
import subprocess

import pytest

from examples.serve_llm import texts
from paretofuse.cli.program import make_parser
from tests.support.process import ROOT


def test_every_step_is_a_command_that_exists() -> None:
    made = subprocess.run(
        # Inside of `make test`, make would tell its directory besides.
        ["make", "--no-print-directory", "--dry-run", "--always-make", "-f", "examples/serve_llm/Makefile", "serve"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = made.stdout.replace("\\\n", " ").splitlines()
    commands = []
    for words in map(shlex.split, lines):
        assert words[1] == "-m"
        if words[2] == "paretofuse":
            commands.append(make_parser().parse_args(words[3:]).command)
        else:
            assert (ROOT / f"{words[2].replace('.', '/')}.py").is_file()
    assert commands == ["stack", "fit", "sweep", "serve"]
    assert len(lines) == 4 + 1 + len(texts.NAMES)


class Words:
    """A tokenizer: each character's number."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}


def test_held_out_rows_are_of_other_documents() -> None:
    learned = texts.rows("python", Words(), 40, held_out=False)
    held_out = texts.rows("python", Words(), 10, held_out=True)
    assert learned.shape == (40, texts.LENGTH)
    documents = texts.documents("python")
    for rows, own in ((learned, False), (held_out, True)):
        other = "".join(text for at, text in enumerate(documents) if (at % 5 == 4) != own)
        mine = "".join(text for at, text in enumerate(documents) if (at % 5 == 4) == own)
        found = ["".join(map(chr, row)) for row in rows.tolist()]
        assert all(row in mine for row in found)
        assert (
            sum(row in other for row in found) < len(found) / 2
        )  # a few lines, such as imports, are in many
    with pytest.raises(ValueError, match="expected at most"):
        texts.rows("python", Words(), 10**7, held_out=True)
