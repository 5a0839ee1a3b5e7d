"""What a run's result depends on, as plain JSON, and how two such descriptions differ."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

_LARGE = 256
"""Numbers in an array that are written out; of more, a digest is."""


def plain(value: Any, seen: set[int] | None = None) -> Any:
    """A description of a value that JSON gives back as it is, the same for equal values in every process.

    Arrays and tensors become lists, or a digest; objects their class with what they hold; functions their name.

    Args:
        value: anything.
        seen: objects on the way here, which are named rather than described again: a solver may hold a cycle.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | float):
        return int(value) if isinstance(value, int) else float(value)
    if hasattr(value, "tolist"):
        array = np.asarray(value.tolist())
        if array.size <= _LARGE:
            return array.tolist()
        return hashlib.sha256(repr(array.shape).encode() + array.tobytes()).hexdigest()[:16]
    seen = set() if seen is None else seen
    if id(value) in seen or isinstance(value, type) or hasattr(value, "__qualname__"):
        return _name(value)
    seen.add(id(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item, seen) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, seen) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((plain(item, seen) for item in value), key=repr)
    if isinstance(value, functools.partial):
        held: Any = {"function": value.func, "arguments": value.args, "options": value.keywords}
    elif is_dataclass(value):
        held = {field.name: getattr(value, field.name) for field in fields(value)}
    else:
        held = getattr(value, "__dict__", {})
    described = {str(name): plain(item, seen) for name, item in held.items()}
    return {"kind": _name(value), **described} if described else _name(value)


def differences(theirs: Any, ours: Any, name: str = "") -> Iterator[str]:
    """Where two descriptions differ: "name=theirs (now ours)", the innermost names, for all that is in `ours`."""
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        for key in [*ours, *(key for key in theirs if name and key not in ours)]:
            yield from differences(theirs.get(key), ours.get(key), f"{name}.{key}" if name else str(key))
    elif theirs != ours:
        yield f"{name}={theirs!r} (now {ours!r})"


def _name(value: Any) -> str:
    named = value if hasattr(value, "__qualname__") else type(value)
    return str(named.__qualname__)
