"""docs/command-line.md tells of every command and of every option, and of no other."""

from __future__ import annotations

import argparse
import inspect
import re
from pathlib import Path

import pytest

import paretofuse as pf
from paretofuse.cli import main
from paretofuse.cli.program import COMMANDS, make_parser
from paretofuse.engine.training.settings import Settings

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


def test_the_defaults_told_of_fit_are_those_in_force() -> None:
    rates = Settings(**{"steps": 1, "lr": 1, "lr_end": 0, "sampler": "dirichlet", "alpha": 1, "corner_every": 0,
                        "preferences_per_step": 1, "accumulate": 1, "seed": 0})  # fmt: skip
    (parser,) = (a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    told = {
        action.dest: match[1]
        for action in parser.choices["fit"]._actions
        if (match := re.search(r"\(default: ([0-9.]+)\)", action.help or ""))
    }
    assert {name: float(told[name]) for name in ("row_shrinkage", "plane_lr", "plane_shrinkage")} == {
        name: getattr(rates, name) for name in ("row_shrinkage", "plane_lr", "plane_shrinkage")
    }
    given = {name: p.default for name, p in inspect.signature(pf.fit).parameters.items()}
    assert {name: float(told[name]) for name in ("steps", "lr", "preferences_per_step", "seed")} == {
        name: given[name] for name in ("steps", "lr", "preferences_per_step", "seed")
    }
    assert f"their learning rate, {rates.plane_lr:g} by default" in section("fit")
