"""What a study's file says: a table for each step, whose keys are the options of the command of that name.

The commands' own parsers read the values, so an option is told of in one place, with one check and one error text.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from paretofuse.cli.options import Named, entry

ONCE = ("stack", "fit", "sweep", "search")
FIRST = ("recipe",)
NAMED = ("evaluate", "merge", "adapter", "export")
"""Steps of which there may be several, each in a table of its own: [merge.balanced]; recipes come before the stack."""

SERVER = "serve"
"""No step: it does not end."""

_FILES: dict[str, dict[str, str]] = {
    "recipe": {"output": ""},
    "stack": {"output": ""},
    "fit": {"output": "store", "checkpoint": "checkpoint", "log": "log.csv"},
    "sweep": {"output": "front.csv"},
    "search": {"output": "front.csv", "storage": "search.db"},
    "evaluate": {"output": "metrics.json"},
    "merge": {"output": ""},
    "adapter": {"output": ""},
    "export": {"output": "model.pt2"},
    "serve": {},
}
"""Where each step's options of a file's name lead within its folder; "" is the folder itself."""

_OWN = ("store", "output", "checkpoint", "force", "coefficients", "parts")
"""What a study decides itself; its fronts are of preferences, which its report and server need."""


@dataclass(frozen=True)
class Step:
    """One command of a study.

    Attributes:
        name: of its table, such as "fit" or "merge.balanced".
        command: the command's name.
        folder: what it writes lies here, and nothing else does.
        output: its result, in the folder.
        words: the command's words, after its name.
        options: what the command's parser makes of them.
        settings: what the file gives it, by option.
        entries: its entry points by option.
    """

    name: str
    command: str
    folder: Path
    output: Path
    words: tuple[str, ...]
    options: argparse.Namespace
    settings: Mapping[str, Any]
    entries: Mapping[str, str]


@dataclass(frozen=True)
class Study:
    """A whole study.

    Attributes:
        text: the file's.
        title: what the report is called.
        out: the folder of all results.
        steps: in the order in which they are done.
        server: the command that serves the store and the first front.
    """

    text: str
    title: str
    out: Path
    steps: tuple[Step, ...]
    server: Step

    @property
    def store(self) -> Path:
        """The store that fronts and models are made of."""
        return [step.output for step in self.steps if step.command in ("stack", "fit")][-1]

    @property
    def fronts(self) -> dict[str, Path]:
        """The measured fronts' tables by step, the report's own first."""
        return {step.name: step.output for step in self.steps if step.command in ("sweep", "search")}


def read_study(path: Path, out: Path | None, commands: Mapping[str, Any]) -> Study:
    """Read a study's file, .toml or .yaml.

    Args:
        path: the file; relative paths in it count from its folder.
        out: the results' folder, in the place of the file's own.
        commands: the program's commands by name, each with its `add_options`.

    Raises:
        ValueError: the file is no TOML or YAML, a key is not known, a value is none that the command takes, or there
            is nothing to stack or no front to measure; names the key.
        OSError: the file cannot be read.
        ImportError: what reads the file is missing.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name}: this is no text in UTF-8: {error.reason}") from error
    tables = _parsed(path, text)
    known = ("all", *FIRST, *ONCE, *NAMED, SERVER)
    _check_keys(path.name, "the file", tables, ("title", "out", *known))
    for name, kind in (("title", str), ("out", str), *((key, dict) for key in known)):
        if not isinstance(tables.get(name, kind()), kind):
            expected = "a text" if kind is str else f"a table: [{name}]"
            raise ValueError(f"{path.name}: got {tables[name]!r} for {name}, expected {expected}")
    place = out or Path(tables.get("out", "study"))
    shared = dict(tables.get("all", {}))
    found = [
        *_named(path.name, tables, FIRST),
        *((command, command, tables[command]) for command in ONCE if command in tables),
        *_named(path.name, tables, NAMED),
    ]
    given = [command for command, _, _ in found]
    if "stack" not in given or not {"sweep", "search"} & set(given):
        raise ValueError(
            f"{path.name}: got {', '.join(dict.fromkeys(given)) or 'no steps'}, expected [stack] and at least one of "
            "[sweep] and [search]"
        )
    taken: set[str] = set()
    steps, store = [], Path()
    for command, name, table in found:
        step = _step(path.name, commands[command], command, name, table, shared, place, {"store": store})
        taken |= step.settings.keys()
        steps.append(step)
        if command in ("stack", "fit"):
            store = step.output
    front = next(step.output for step in steps if step.command in ("sweep", "search"))
    made = {"store": store, "front": front}
    server = _step(path.name, commands[SERVER], SERVER, SERVER, tables.get(SERVER, {}), shared, place, made)
    taken |= server.settings.keys()
    _check_keys(path.name, "[all]", shared, sorted(taken | _all_options(commands, given)))
    return Study(text, tables.get("title", path.resolve().parent.name), place, tuple(steps), server)


def _named(
    file: str, tables: Mapping[str, Any], commands: Collection[str]
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Command, step's name and table of the steps that have names of their own."""
    for command in commands:
        for name, table in tables.get(command, {}).items():
            if not isinstance(table, dict) or not re.fullmatch(r"[\w-]+", name):
                raise ValueError(
                    f"{file}: got the key {name!r} in [{command}], expected tables with names of letters, digits, _ "
                    f"and -, such as [{command}.balanced]"
                )
            yield command, f"{command}.{name}", table


def _parsed(path: Path, text: str) -> dict[str, Any]:
    if path.suffix in (".yml", ".yaml"):
        from paretofuse.recipes.reading import read_yaml

        root = read_yaml(text, path.name)
        root.mapping("a study")
        return root.plain()  # type: ignore[no-any-return]
    if path.suffix != ".toml":
        raise ValueError(f"got {path.name}, expected a file that ends in .toml, .yaml or .yml")
    try:
        if sys.version_info >= (3, 11):
            import tomllib
        else:
            import tomli as tomllib
    except ImportError as error:
        raise ImportError(
            'Python 3.10 reads TOML by tomli, which is not installed; pip install "paretofuse[study]"'
        ) from error
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path.name}: this is no TOML: {error}") from error


def _check_keys(file: str, where: str, table: Mapping[str, Any], known: Collection[str]) -> None:
    """ValueError for a key that is not known, with the nearest that is."""
    for key in table:
        if key.replace("-", "_") not in known:
            near = difflib.get_close_matches(key.replace("-", "_"), known, n=1)
            told = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"
            raise ValueError(f"{file}: got the key {key!r} in {where}, which is not known; {told}")


class _Parser(argparse.ArgumentParser):
    """Of one command's options; raises ValueError where argparse would print and exit."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _parser(module: Any) -> tuple[_Parser, dict[str, argparse.Action]]:
    """A command's parser, and its options by name."""
    parser = _Parser(add_help=False)
    module.add_options(parser)
    return parser, {action.dest: action for action in parser._actions}


def _all_options(commands: Mapping[str, Any], given: Collection[str]) -> set[str]:
    return {name for command in given for name in _parser(commands[command])[1]} - set(_OWN)


def _step(
    file: str,
    module: Any,
    command: str,
    name: str,
    table: Mapping[str, Any],
    shared: Mapping[str, Any],
    out: Path,
    made: Mapping[str, Path],
) -> Step:
    parser, actions = _parser(module)
    where = f"[{name}]"
    _check_keys(file, where, table, [key for key in actions if key not in _OWN])
    settings = {key.replace("-", "_"): value for key, value in shared.items()}
    settings = {key: value for key, value in settings.items() if key in actions}
    settings.update({key.replace("-", "_"): value for key, value in table.items()})
    folder = out.joinpath(*name.split("."))
    files = {key: folder / value for key, value in _FILES[command].items() if key not in settings}
    own: dict[str, Any] = {key: str(place) for key, place in files.items()}
    if "storage" in own:
        own["storage"] = f"sqlite:///{own['storage']}"
    own.update({key: str(path) for key, path in made.items() if key in actions and key not in settings})
    if command in ("stack", "fit"):
        own["force"] = True  # whether a training may be lost, the study asks itself
    given, words = {**settings, **own}, list[str]()
    for key, action in actions.items():
        if key in given:
            words += _words(f"{file}: {where} {key}", action, given[key])
    try:
        options = parser.parse_args(words)
    except ValueError as error:
        message = re.sub(r"^argument (?:\S*/)?(?:--)?([\w-]+): ", r"\1: ", str(error))
        raise ValueError(f"{file}: {where} {message}") from error
    entries = {key: settings[key] for key in settings if actions[key].type is entry}
    return Step(
        name,
        command,
        folder,
        folder / _FILES[command].get("output", ""),
        tuple(words),
        options,
        settings,
        entries,
    )


def _words(where: str, action: argparse.Action, value: Any) -> list[str]:
    """An option and its value as words of a command line; of several values one word for each, or joined by commas."""
    flag = max(action.option_strings, key=len, default="")
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"{where}: got {json.dumps(value)}, expected true or false")
        return [flag] if value else []
    if isinstance(value, dict):
        texts = [f"{name}={_text(where, part)}" for name, part in value.items()]
    else:
        texts = [_text(where, part) for part in (value if isinstance(value, list) else [value])]
    if not isinstance(action, Named | argparse._AppendAction):
        texts = [",".join(texts)]
    return [f"{flag}={text}" for text in texts] if flag else texts


def _text(where: str, value: Any) -> str:
    if isinstance(value, list):
        return ",".join(_text(where, part) for part in value)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{where}: got {value!r}, expected a text or a number")
    return str(value)
