"""The command line, a file for each command."""

from paretofuse.cli.commands import main

__all__ = ["main"]
