"""The command line: a file for each command, beside what they share."""

from paretofuse.cli.program import main

__all__ = ["main"]
