"""Errors that callers may want to catch by type; everything else is a ValueError or TypeError."""

from __future__ import annotations

from collections.abc import Sequence


class StoreError(ValueError):
    """A store, or a checkpoint file, cannot be read: truncated, altered, too new, or not a store."""


class CheckpointError(ValueError):
    """A base model and its experts do not fit together, or hold values that cannot be merged."""


def some(names: Sequence[str], count: int = 4) -> str:
    """The first few of many names for a message, or "none"."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return (", ".join(map(repr, names[:count])) or "none") + more
