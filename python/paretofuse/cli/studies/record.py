"""What a study's folder knows of its steps: from what each was made, so that only what changed is made again."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paretofuse.cli.studies.file import Step
from paretofuse.engine.store.atomic import write_file

RECORD = "study.json"
_SMALL = 1 << 20
"""Files up to so many bytes are told apart by their content, larger ones by size and time."""


class Record:
    """study.json in a study's folder, written whole after every step.

    Attributes:
        steps: by name: "inputs" that it was begun with and, once it was finished, "done": what it said.
    """

    def __init__(self, out: Path) -> None:
        """Open a study's folder, or begin one.

        Raises:
            ValueError: something else stands there.
        """
        self.path = out / RECORD
        self.steps: dict[str, dict[str, Any]] = {}
        if self.path.is_file():
            try:
                self.steps = json.loads(self.path.read_bytes())["steps"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.path}: damaged; move it away to make the study anew") from error
        elif out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(
                f"got the results' folder {out}, which is there and no study's; give another out, or move it away"
            )

    def begin(self, step: Step, inputs: Mapping[str, str]) -> None:
        """Note what a step is made from."""
        self.steps[step.name] = {"inputs": dict(inputs)}
        self._write()

    def finish(self, step: Step, done: Mapping[str, Any]) -> None:
        """Note what came of it."""
        self.steps[step.name]["done"] = dict(done)
        self._write()

    def changes(self, step: Step, inputs: Mapping[str, str]) -> list[str] | None:
        """Which inputs are others than those that the step was begun with; None if it never was."""
        if step.name not in self.steps:
            return None
        before = self.steps[step.name]["inputs"]
        return [key for key in {**before, **inputs} if before.get(key) != inputs.get(key)]

    def is_done(self, step: Step) -> bool:
        """Whether it was finished, and its result is still there."""
        return "done" in self.steps.get(step.name, {}) and os.path.lexists(step.output)

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_file(self.path, (json.dumps({"steps": self.steps}, indent=1) + "\n").encode())


def inputs_of(step: Step) -> dict[str, str]:
    """What a step is made from: its settings, the files and directories that they name, its functions' modules."""
    found = {f"{key}": json.dumps(value) for key, value in step.settings.items()}
    for text in (*_texts(step.settings), *_models_of(step)):
        if (path := Path(text)).exists():
            found[f"the content of {text}"] = stamp(path)
    for text in step.entries.values():
        if (source := _source(text.partition(":")[0])) is not None:
            found[f"the module {text.partition(':')[0]}"] = stamp(source)
    store = getattr(step.options, "store", None)
    if store is not None:
        found["the store"] = stamp(Path(store))
    return found


def _models_of(step: Step) -> list[str]:
    """The models that a recipe's own file names, among its other texts."""
    if step.command != "recipe" or not (config := Path(step.options.config)).is_file():
        return []
    from paretofuse.recipes.reading import read_yaml

    return _texts(read_yaml(config.read_text(encoding="utf-8"), config.name).plain())


def stamp(path: Path) -> str:
    """Tells a file or directory from what it was before; "" where there is none."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        text = "\n".join(f"{file.relative_to(path)} {stamp(file)}" for file in files)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
    if not path.exists():
        return ""
    found = path.stat()
    if found.st_size > _SMALL:
        return f"{found.st_size} bytes of {found.st_mtime_ns}"
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _texts(value: Any) -> list[str]:
    """Every text in nested settings."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        return [text for part in value for text in _texts(part)]
    return [value] if isinstance(value, str) and value and "\n" not in value else []


def _source(module: str) -> Path | None:
    """A module's file, found as `running.entry_point` finds it."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # said better when it is imported
        return None
    return Path(spec.origin) if spec is not None and spec.origin and os.path.isfile(spec.origin) else None
