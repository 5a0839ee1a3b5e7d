"""Errors that callers may want to catch by type; everything else is a ValueError or TypeError."""

from __future__ import annotations


class StoreError(ValueError):
    """A store, or a checkpoint file, cannot be read: truncated, altered, too new, or not a store."""


class CheckpointError(ValueError):
    """A base model and its experts do not fit together, or hold values that cannot be merged."""
