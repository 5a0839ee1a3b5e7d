"""Values and options that several commands take."""

from __future__ import annotations

import argparse
from typing import Any


def named_numbers(text: str) -> dict[str, float]:
    """NAME=NUMBER,NAME=NUMBER."""
    numbers: dict[str, float] = {}
    for part in text.split(","):
        name, equals, value = part.rpartition("=")
        name = name.strip()
        try:
            number = float(value)
        except ValueError:
            equals = ""
        if not equals or not name:
            raise argparse.ArgumentTypeError(
                f"got {part!r}, expected NAME=NUMBER,NAME=NUMBER such as cola=0.7,sst2=0.3"
            )
        if name in numbers:
            raise argparse.ArgumentTypeError(f"got {name!r} twice, expected each name once")
        numbers[name] = number
    return numbers


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of at least 1")
    return int(text)


def _threads(text: str) -> int:
    """A whole number of 1 to 1024, as the core takes them."""
    if count(text) > 1024:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of 1 to 1024")
    return int(text)


def entry(text: str) -> str:
    """MODULE:FUNCTION; what it names is looked up when the command runs."""
    module, _, name = text.partition(":")
    if not module or not name:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected MODULE:FUNCTION such as tasks.glue:accuracies"
        )
    return text


def add_engine(parser: argparse.ArgumentParser, device: str | None) -> None:
    """A store to open as an engine, by `running.load_engine`; `device`: what --device is for, if it is there."""
    add_store(parser)
    add_verify(parser)
    add_entry(parser, "--module", "builds the model, where the store has no configuration that tells how")
    if device is not None:
        parser.add_argument("--device", default="cpu", help=f"{device} (default: cpu)")
    else:
        parser.set_defaults(device="cpu")
    add_threads(parser)


def add_store(parser: argparse.ArgumentParser) -> None:
    """The store to work on."""
    parser.add_argument("store", metavar="STORE", help="a store's directory, from `paretofuse stack`")


def add_verify(parser: argparse.ArgumentParser) -> None:
    """Whether to trust the disk."""
    parser.add_argument(
        "--verify", action="store_true", help="first read every file of the store and compare its checksum"
    )


def add_output(parser: argparse.ArgumentParser, metavar: str, text: str, *, required: bool = True) -> None:
    """Where the result goes."""
    parser.add_argument("-o", "--output", required=required, metavar=metavar, help=text)


def add_force(parser: argparse.ArgumentParser) -> None:
    """Whether a training may be lost."""
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace a store even if it is a trained one, whose training is lost",
    )


def add_entry(parser: argparse.ArgumentParser, option: str, text: str, *, required: bool = False) -> None:
    """A Python function by module and name, found as `python -m` finds modules: from the current directory too."""
    parser.add_argument(option, type=entry, required=required, metavar="MODULE:FUNCTION", help=text)


def add_threads(parser: argparse.ArgumentParser) -> None:
    """How many threads do the work."""
    parser.add_argument(
        "--threads", type=_threads, metavar="N", help="threads (default: all this process may use)"
    )


def add_preference(parser: argparse.ArgumentParser, text: str, *, required: bool = False) -> None:
    """The objectives' shares, and whose head."""
    parser.add_argument(
        "--preference", type=named_numbers, required=required, metavar="NAME=SHARE,...", help=text
    )
    parser.add_argument("--head", metavar="NAME", help="use this objective's head")


class Named(argparse.Action):
    """Collects options that are given once for each name, such as --expert NAME=PATH."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option: str | None = None,
    ) -> None:
        """Add a pair of name and value, as the option's type makes it."""
        given = getattr(namespace, self.dest) or []
        if values[0] in dict(given):
            parser.error(f"argument {option}: got {values[0]!r} twice, expected each name once")
        setattr(namespace, self.dest, [*given, values])
