"""What commands share while they run: entry points, threads, progress bars, sizes and messages in their words."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paretofuse.engine.engine import Engine

Result = tuple[str, dict[str, Any], int]
"""What a command's `run` returns: a text for people, a document for --json, the exit code."""


def entry_point(option: str, text: str) -> Callable[..., Any]:
    """The function that MODULE:FUNCTION names.

    Raises:
        ValueError: the module has no such name, or it is no function; names the option.
        ImportError: there is no such module, or one that it imports is missing.
    """
    module, _, name = text.partition(":")
    if os.getcwd() not in sys.path:  # as `python -m` does
        sys.path.insert(0, os.getcwd())
    try:
        function: Any = import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there, and imports another that is not
        raise ModuleNotFoundError(
            f"got {option} {text}, but there is no module {error.name!r} here or among the installed packages; "
            f"check the spelling, or run the command where {error.name.replace('.', '/')}.py lies",
            name=error.name,
        ) from error
    for part in name.split("."):
        if not hasattr(function, part):
            raise ValueError(f"got {option} {text}, but {module} has no {name!r}; check the spelling")
        function = getattr(function, part)
    if not callable(function):
        raise ValueError(f"got {option} {text}, which is a {type(function).__name__}, expected a function")
    return function  # type: ignore[no-any-return]


def load_engine(options: argparse.Namespace, *, replicas: int = 2) -> Engine:
    """The engine that the options of `add_engine` name; `replicas` as `pf.load` takes it."""
    import paretofuse

    module = entry_point("--module", options.module)() if options.module else None
    if options.module and module is None:
        raise ValueError(
            f"got nothing from --module {options.module}, expected the model; does it return it?"
        )
    use_threads(options)
    return paretofuse.load(
        options.store, device=options.device, module=module, replicas=replicas, verify=options.verify
    )


def use_threads(options: argparse.Namespace) -> None:
    """Limit torch, and with it every merge of a live module, to --threads."""
    if options.threads is not None:
        import torch

        torch.set_num_threads(options.threads)


def shows_progress(options: argparse.Namespace) -> bool:
    """Whether there is anybody to see a progress bar."""
    return not options.quiet and sys.stderr is not None and sys.stderr.isatty()


@contextmanager
def bar(
    options: argparse.Namespace, name: str, unit: str, total: int | None
) -> Iterator[Callable[[int], None] | None]:
    """A progress bar's update function, or None where there is nobody to see one."""
    if not shows_progress(options):
        yield None
        return
    from tqdm import tqdm

    with tqdm(desc=name, unit=unit, unit_scale=True, total=total, file=sys.stderr) as shown:
        yield lambda done: shown.update(done) and None


@contextmanager
def bytes_bar(options: argparse.Namespace, name: str) -> Iterator[Callable[[int, int], None] | None]:
    """The same for work that reports the bytes done so far and the bytes in all."""
    if not shows_progress(options):
        yield None
        return
    from tqdm import tqdm

    with tqdm(desc=name, unit="B", unit_scale=True, file=sys.stderr) as shown:

        def progress(done: int, total: int) -> None:
            shown.total = total
            shown.update(done - shown.n)

        yield progress


def size(nbytes: int) -> str:
    """A number of bytes for people."""
    number = float(nbytes)
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB"


def in_options(message: str, names: Iterable[str]) -> str:
    """A message about Python's arguments in the words of the command line: "dtype=torch.float16" is "--dtype float16".

    Args:
        message: what a function of the library raised.
        names: the command's options, named as the library names its arguments.
    """
    known = "|".join(sorted({*names, "out"}, key=len, reverse=True))

    def option(match: re.Match[str]) -> str:
        value = re.sub(r"torch\.|[\[\]'\"]|\bTrue\b", "", match["value"])
        name = "output" if match["name"] == "out" else match["name"].replace("_", "-")
        return f"--{name} {value}".rstrip()

    message = message.replace("maximize=False", "--minimize").replace(
        "pass maximize=True", "leave --minimize out"
    )
    message = re.sub(r"= to pf\.\w+", "=", message)
    return re.sub(rf"\b(?P<name>{known})s?=(?P<value>\[[^\]]*\]|'[^']*'|[^\s,;:)]*)", option, message)
