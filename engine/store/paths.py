"""Paths that users give, before they reach C++."""

from __future__ import annotations

import os
from pathlib import Path


def as_path(path: str | os.PathLike[str]) -> Path:
    """A path that the system can be asked for.

    Raises:
        TypeError: it is neither a text nor a path.
        ValueError: no file can have that name.
    """
    try:
        text = os.fsdecode(path)
    except TypeError:
        raise TypeError(
            f"got a path of type {type(path).__name__}, expected a str or a pathlib.Path"
        ) from None
    if not text:
        raise ValueError("got path '', expected the name of a file or directory")
    try:
        unusable = b"\0" in os.fsencode(text)
    except UnicodeEncodeError:  # half of a surrogate pair
        unusable = True
    if unusable:
        raise ValueError(
            f"got path {text!r}, which no file can have as its name; take the odd characters out"
        )
    return Path(text)
