"""The C++ extension, for the rooms whose files it works for; or an error that says how to build it."""

from __future__ import annotations

try:
    from paretofuse import _C
except ImportError as error:
    raise ImportError(
        f"ParetoFuse's native extension could not be loaded ({error}). Build it with `pip install .` (or "
        "`pip install -e .` in a checkout), which needs a C++17 compiler with OpenMP"
    ) from error

__all__ = ["_C"]
