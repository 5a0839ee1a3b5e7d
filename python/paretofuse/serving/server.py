"""uvicorn around the app, and the store behind it: a new version is taken up while requests go on."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from paretofuse.engine.engine import Engine
from paretofuse.engine.store.reader import MANIFEST
from paretofuse.serving.app import reload

_LOG = logging.getLogger("paretofuse.serving")
_LOOK_EVERY = 2.0
"""Seconds between two looks at the manifest."""
_SLOWEST = 30.0
"""Seconds that a request may take to come, headers and body; uvicorn itself waits for ever."""


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Nothing: `serve` sets the handlers, and ends with a return instead of the signal."""
        yield


def serve(
    app: FastAPI,
    host: str,
    port: int,
    *,
    started: Callable[[str], None],
    store: Path | None = None,
    load: Callable[[], Engine] | None = None,
) -> None:
    """Serve an app until SIGINT or SIGTERM; requests that are in work end first.

    A second signal closes their connections instead, and waits for no work.

    Args:
        app: from `create_app`.
        host: the address to listen at.
        port: 0 for a free one.
        started: called with the server's URL once it listens.
        store: whose manifest to look at every 2 s. When it is another one, or SIGHUP comes, the store is opened anew
            and served in the place of the old one.
        load: opens it.

    Raises:
        OSError: the address is taken, or not of this machine.
    """
    with listening(host, port) as listener:
        shown = f"[{host}]" if ":" in host else host
        url = f"http://{shown}:{listener.getsockname()[1]}"
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            ws="none",
            timeout_graceful_shutdown=int(app.state.serving.limits.timeout),
        )
        asyncio.run(_serve(app, _Server(config), listener, lambda: started(url), store, load))


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens at an address; port 0 takes a free one.

    It says that it is TCP's, which `socket.create_server` leaves out: asyncio sends small packets at once (TCP_NODELAY)
    on such sockets only, and an answer in two packets would wait 40 ms for the first to be acknowledged.

    Raises:
        OSError: the address is taken, or not of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(1024)
    except BaseException as error:
        listener.close()
        if isinstance(error, OSError):  # which does not say of what it speaks
            error.filename = f"{host}:{port}"
        raise
    return listener


async def _serve(
    app: FastAPI,
    server: uvicorn.Server,
    listener: socket.socket,
    started: Callable[[], None],
    store: Path | None,
    load: Callable[[], Engine] | None,
) -> None:
    loop, asked = asyncio.get_running_loop(), asyncio.Event()

    def end() -> None:
        if server.should_exit and server.started:
            app.state.serving.hurry()
            for door in server.servers:
                door.close()
            for connection in server.server_state.connections:  # cancels its request, as a client that leaves
                connection.transport.abort()
        server.should_exit = True

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, end)
    loop.add_signal_handler(signal.SIGHUP, asked.set)
    watching = asyncio.create_task(_watch(app, asked, store, load)) if store and load else None
    announcing = asyncio.create_task(_announce(server, started))
    hurrying = asyncio.create_task(_end_slow_requests(server))
    try:
        await server.serve([listener])
    finally:
        for task in (watching, announcing, hurrying):
            if task is not None:
                task.cancel()


async def _announce(server: uvicorn.Server, started: Callable[[], None]) -> None:
    while not server.started:
        await asyncio.sleep(0.01)
    started()


async def _end_slow_requests(server: uvicorn.Server) -> None:
    """Close connections whose request does not come to its end: each holds a place and what has come of its body."""
    waiting: dict[
        Any, tuple[Any, float]
    ] = {}  # a connection's request, None before its headers, and since when
    while True:
        await asyncio.sleep(_SLOWEST / 10)
        now, before = time.monotonic(), waiting
        waiting = {}
        connections: list[Any] = list(server.server_state.connections)
        for connection in connections:
            if not hasattr(connection, "cycle"):
                continue  # of another protocol than uvicorn's two of HTTP/1.1
            request = connection.cycle
            if request is not None and not request.more_body and not request.response_complete:
                continue  # it is here, and being answered
            first, since = before.get(connection, (request, now))
            waiting[connection] = (request, since if first is request else now)
            if now - waiting[connection][1] > _SLOWEST:
                connection.transport.abort()


async def _watch(app: FastAPI, asked: asyncio.Event, store: Path, load: Callable[[], Engine]) -> None:
    """Reload when the manifest is another, or when asked to."""
    seen = _version(store)
    while True:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asked.wait(), _LOOK_EVERY)
        found = _version(store)
        if found is None or (found == seen and not asked.is_set()):
            continue  # a store that is not there is being replaced
        asked.clear()
        try:
            await asyncio.to_thread(lambda: reload(app, load()))
            _LOG.warning("%s: its new version is served now", store)
        except Exception as error:  # the old one is served on, until there is yet another
            _LOG.error("%s: its new version cannot be served, the old one still is: %s", store, error)
        seen = found


def _version(store: Path) -> tuple[int, int, int] | None:
    try:
        stat = (store / MANIFEST).stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size
