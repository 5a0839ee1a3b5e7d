"""The C++ extension, for the rooms whose files it works for; or an error that says how to build it."""

from __future__ import annotations

import os

try:
    from paretofuse import _C
except ImportError as error:
    raise ImportError(
        f"ParetoFuse's native extension could not be loaded ({error}). Build it with `pip install .` (or "
        "`pip install -e .` in a checkout), which needs a C++17 compiler with OpenMP"
    ) from error

__all__ = ["_C", "thread_count"]


MOST_THREADS = 1024
"""What the core takes at most; see csrc/src/core/parallel.h."""


def thread_count(threads: int | None) -> int:
    """The given number of threads, or as many as this process may use.

    Raises:
        ValueError: too many, or none.
    """
    if threads is not None:
        if not 1 <= threads <= MOST_THREADS:
            raise ValueError(f"threads: got {threads}, expected 1 to {MOST_THREADS}")
        return threads
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
