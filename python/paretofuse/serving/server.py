"""uvicorn around the app."""

from __future__ import annotations

import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI


def serve(app: FastAPI, host: str, port: int, started: Callable[[str], None]) -> None:
    """Serve an app until SIGINT or SIGTERM; requests that are in work end first.

    Args:
        app: from `create_app`.
        host: the address to listen at.
        port: 0 for a free one.
        started: called with the server's URL.

    Raises:
        OSError: the address is taken, or not of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family, backlog=1024) as listener:
        at = listener.getsockname()[1]
        shown = f"[{host}]" if ":" in host else host
        started(f"http://{shown}:{at}")
        uvicorn.Server(uvicorn.Config(app, log_level="warning", server_header=False)).run([listener])
