"""What every request passes first: its size, its key, its host; and the headers that every answer gets.

Plain ASGI, so that streams and disconnects pass through untouched.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Collection, Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from paretofuse.serving.errors import ApiError
from paretofuse.serving.metrics import Metrics

OPEN = ("/healthz", "/readyz")
"""Addresses that need no key: what asks them has none."""

HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
"""The styles inline are those that plotly.js sets; scripts are files of this server only."""


class Guard:
    """Refuses what is too large or has no key, counts requests, adds HEADERS, and answers HEAD wherever GET is.

    Args:
        app: what answers.
        metrics: counts by route and status.
        body_bytes: of a body, at most.
        keys: of the API; none lets everybody in.
        open_paths: addresses that need no key besides OPEN.
        hosts: names that the Host header may have; None takes any. A page elsewhere whose name is made to point at
            this machine (DNS rebinding) is refused by it.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        *,
        body_bytes: int,
        keys: Sequence[str] = (),
        open_paths: Collection[str] = (),
        hosts: Collection[str] | None = None,
    ) -> None:
        self._app, self._metrics, self._body_bytes = app, metrics, body_bytes
        self._keys = [_digest(key.encode()) for key in keys]
        self._open = {*OPEN, *open_paths}
        self._hosts = None if hosts is None else {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500
        left = self._body_bytes
        head = scope["method"] == "HEAD"
        if head:  # as GET, whose body is left out; it costs what GET costs
            scope = {**scope, "method": "GET"}

        async def bounded() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise _too_large(self._body_bytes)
            return message

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                given = {name.lower() for name, _ in message["headers"]}
                extra = [(n.encode(), v.encode()) for n, v in HEADERS.items() if n.encode() not in given]
                message["headers"] = [*message["headers"], *extra]
            elif head:
                message = {**message, "body": b""}
            await send(message)

        try:
            refusal = self._refusal(scope)
            if refusal is not None:
                await refusal.response()(scope, receive, sending)
                return
            await self._app(scope, bounded, sending)
        finally:
            route = scope.get("route")
            path = getattr(route, "path", "other")  # of the route, so that clients make no new labels
            self._metrics.requests.labels(path, str(status)).inc()

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
        if self._hosts is not None and name not in self._hosts:
            return ApiError(
                403,
                f"got the host {name[:100]!r}, expected one of {sorted(self._hosts)}; ask by that name, or start the "
                "server with --host",
                code="wrong_host",
            )
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > self._body_bytes:
            return _too_large(self._body_bytes)
        if (
            self._keys
            and scope["path"] not in self._open
            and not self._knows(headers.get(b"authorization", b""))
        ):
            return ApiError(
                401,
                "got no API key that this server knows, expected the header 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return None

    def _knows(self, authorization: bytes) -> bool:
        """Whether a key is a known one, in a time that does not tell which, or how much of it is right."""
        kind, _, key = authorization.partition(b" ")
        digest = _digest(key.strip())
        found = [hmac.compare_digest(digest, known) for known in self._keys]
        return kind.lower() == b"bearer" and any(found)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _too_large(bound: int) -> ApiError:
    return ApiError(
        413,
        f"got a body of more than {bound} bytes, expected a smaller one; send fewer inputs at once",
        code="too_large",
    )
