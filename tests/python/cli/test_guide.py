"""docs/command-line.md tells of every command and of every option, and of no other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from paretofuse.cli import main
from paretofuse.cli.program import COMMANDS, make_parser

PAGE = (Path(__file__).parents[3] / "docs" / "command-line.md").read_text(encoding="utf-8")
EVERYWHERE = {"--help", "--json", "--traceback", "--quiet"}
"""Told once for all commands."""


def options_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))


def section(command: str) -> str:
    return PAGE.split(f"\n## paretofuse {command}\n")[1].split("\n## ")[0]


def test_a_section_and_a_row_for_every_command() -> None:
    assert re.findall(r"^## paretofuse (\w+)$", PAGE, re.M) == list(COMMANDS)
    assert re.findall(r"^\| `(\w+)` \|", PAGE.split("\n## ")[0], re.M) == list(COMMANDS)
    assert options_in(PAGE.split("\n## ")[0]) >= EVERYWHERE


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_and_no_other(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    told = options_in(section(command)) - EVERYWHERE
    assert told == options_in(capsys.readouterr().out.partition("options:")[2]) - EVERYWHERE


@pytest.mark.parametrize("command", COMMANDS)
def test_the_examples_are_words_that_the_program_takes(command: str) -> None:
    (example,) = re.findall(r"^    (?:eval \"\$\()?paretofuse ([^)\"\n]+)", section(command), re.M)
    assert make_parser().parse_args(example.split()).command == command
