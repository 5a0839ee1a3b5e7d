"""GET / and the files of the page. All are the package's own, found by name in a dict: no client's path is opened."""

from __future__ import annotations

from functools import cache
from importlib import resources

from fastapi import APIRouter
from fastapi.responses import HTMLResponse, Response

from paretofuse.fronts import html
from paretofuse.serving.errors import ApiError

SCRIPTS = ("requests.js", "answers.js", "served.js")
"""The scripts of this folder, loaded after those of every front's page."""

FILES = ("plotly.js", "page.css", "served.css", *html.SCRIPTS, *SCRIPTS)

OPEN = ("/", *(f"/page/{name}" for name in FILES))
"""Addresses that need no key: the page holds no data, and asks for the key itself."""


def page_routes() -> APIRouter:
    """GET / and /page/{name}."""
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse(_page())

    @router.get("/page/{name}")
    async def file(name: str) -> Response:
        if name not in FILES:
            raise ApiError(404, f"got the file {name[:80]!r}, which is not one of the page's")
        kind = "text/css" if name.endswith(".css") else "text/javascript"
        # Plotly's 5 MB are worth keeping; the rest is small, and new with each version.
        kept = "private, max-age=86400" if name == "plotly.js" else "no-cache"
        return Response(_content(name), media_type=kind, headers={"Cache-Control": kept})

    return router


@cache
def _page() -> str:
    styles = [f'<link rel="stylesheet" href="page/{name}">' for name in ("page.css", "served.css")]
    scripts = [
        f'<script defer src="page/{name}"></script>' for name in ("plotly.js", *html.SCRIPTS, *SCRIPTS)
    ]
    places = {name: _own(f"{name}.html") for name in ("top", "default", "ask", "download")}
    return html.filled(head="\n".join(styles + scripts), **places)


@cache
def _content(name: str) -> bytes:
    if name == "plotly.js":
        return html.plotly_script().encode()
    own = name == "served.css" or name in SCRIPTS
    return (_own(name) if own else html.asset(name)).encode()


def _own(name: str) -> str:
    return resources.files("paretofuse.serving.page").joinpath(name).read_text(encoding="utf-8")
