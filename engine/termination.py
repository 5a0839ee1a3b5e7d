"""Being told to end (SIGTERM, SIGHUP), as an exception: unsaved work can be saved, half-written files removed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextmanager
def termination_raises() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise SystemExit inside the block, as SIGINT raises KeyboardInterrupt anyway.

    Only where a signal would end the process on the spot: whoever handles or ignores it already (nohup, a server)
    keeps it. Python runs handlers in the main thread alone, so in another thread nothing changes.
    """
    ours: list[signal.Signals] = []
    if threading.current_thread() is threading.main_thread():
        ours = [number for number in _SIGNALS if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, _leave)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)  # the exit code by which shells report a signal
