"""`paretofuse completion`: what a shell needs to complete this program's words (by argcomplete)."""

from __future__ import annotations

import argparse

from paretofuse.cli.running import Result

SUMMARY = "print a shell's script for completing words with the tab key"
EXAMPLE = 'eval "$(paretofuse completion bash)"'


def add_options(parser: argparse.ArgumentParser) -> None:
    """The words of this command."""
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="the shell that will read it")


def run(options: argparse.Namespace) -> Result:
    """The script, which asks this program for the words at each press of the key."""
    from argcomplete.shell_integration import shellcode

    script = shellcode(["paretofuse"], shell=options.shell)
    return script, {"shell": options.shell, "script": script}, 0
