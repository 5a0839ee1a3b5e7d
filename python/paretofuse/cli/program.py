"""The program `paretofuse`: parses its words, runs one command, says what came of it.

A command is a module with SUMMARY, EXAMPLE, `add_options(parser)` and `run(options)`; what a command needs it imports
when it runs, so that `merge`, `info` and every --help start without torch.

Exit codes: 0 done, 1 the work failed (one message on stderr, or with --json {"error": ...} on stdout), 2 wrong usage,
130 interrupted, 141 nobody reads what it prints any more (as in `paretofuse info STORE | head -1`; the work itself is
done).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from typing import Any, NoReturn

import paretofuse
from paretofuse.cli import (
    adapter,
    completion,
    doctor,
    evaluate,
    export,
    fit,
    info,
    merge,
    recipe,
    search,
    serve,
    stack,
    study,
    sweep,
)
from paretofuse.cli.running import Result, in_options

COMMANDS: dict[str, Any] = {
    "stack": stack,
    "fit": fit,
    "info": info,
    "merge": merge,
    "evaluate": evaluate,
    "sweep": sweep,
    "search": search,
    "study": study,
    "serve": serve,
    "adapter": adapter,
    "recipe": recipe,
    "export": export,
    "doctor": doctor,
    "completion": completion,
}


class _WrongUsage(Exception):
    """Words that no command understands: (message, usage)."""


class _Parser(argparse.ArgumentParser):
    """Raises where argparse would print and exit, so that --json can have the error too."""

    def error(self, message: str) -> NoReturn:
        raise _WrongUsage(message, self.format_usage())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code.

    Args:
        arguments: the words after the program's name; those of the process unless given.
    """
    try:
        try:
            return _run(sys.argv[1:] if arguments is None else list(arguments))
        finally:  # also after --help, which leaves by SystemExit
            if sys.stdout is not None:  # a process may be started without one
                sys.stdout.flush()
    except BrokenPipeError:
        _silence()
        return 141
    except OSError as error:  # of stdout itself (a full disk): the commands report their own
        print(f"paretofuse: error: stdout: {error.strerror}", file=sys.stderr)
        _silence()
        return 1


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; the parsed `command` names the command."""
    parser = _Parser(
        prog="paretofuse",
        description="Turn any preference between fine-tuned experts into one dense model.",
        epilog="Each command has its own help: paretofuse merge --help",
    )
    parser.add_argument("--version", action="version", version=f"paretofuse {paretofuse.__version__}")
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, module in COMMANDS.items():
        added = commands.add_parser(
            name,
            help=module.SUMMARY,
            description=module.SUMMARY[0].upper() + module.SUMMARY[1:] + ".",
            epilog=f"example:\n  {module.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(command=name)
        module.add_options(added)
        added.add_argument(
            "--json", action="store_true", help="print one JSON document on stdout, errors too"
        )
        added.add_argument(
            "--quiet", action="store_true", help="no progress bar (there is none without a terminal)"
        )
        added.add_argument("--traceback", action="store_true", help="on an error, show where it was")
    return parser


def _run(arguments: list[str]) -> int:
    parser = make_parser()
    if "_ARGCOMPLETE" in os.environ:  # a shell asks which words could follow; see `paretofuse completion`
        import argcomplete

        argcomplete.autocomplete(parser)
    try:
        options = parser.parse_args(arguments)
    except _WrongUsage as error:
        message, usage = error.args
        if "--json" not in arguments:
            sys.stderr.write(usage)
        return _fail("usage", message, 2, "--json" in arguments)
    if options.command is None:
        parser.print_help()
        return 0
    try:
        # What functions of the user's print must not be among the JSON.
        with redirect_stdout(sys.stderr) if options.json else nullcontext():
            result: Result = COMMANDS[options.command].run(options)
    except KeyboardInterrupt:
        return _fail("KeyboardInterrupt", "interrupted", 130, options.json)
    except Exception as error:  # one line for the user; --traceback for whoever needs to look inside
        if options.traceback:
            traceback.print_exc()
        return _fail(type(error).__name__, in_options(_message(error), vars(options)), 1, options.json)
    text, document, code = result
    print(json.dumps(document, indent=1) if options.json else text)
    return code


def _fail(kind: str, message: str, code: int, as_json: bool) -> int:
    if as_json:
        print(json.dumps({"error": {"type": kind, "message": message}}, indent=1))
    elif code == 130:
        print("paretofuse: interrupted", file=sys.stderr)
    else:
        print(f"paretofuse: error: {message}", file=sys.stderr)
    return code


def _silence() -> None:
    """Send to nowhere what stdout or stderr cannot get rid of; Python would try once more as it exits, and complain."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def _message(error: Exception) -> str:
    return "; ".join([_plain_message(error), *getattr(error, "__notes__", ())])


def _plain_message(error: Exception) -> str:
    """One line: an error that was foreseen says all in it, and of others the first line says enough."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, ValueError | ImportError) and lines:
        return " ".join(lines)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return ": ".join([type(error).__name__, *lines[:1]]) + " (--traceback shows where)"
