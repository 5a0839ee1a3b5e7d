"""A front as one HTML file that opens without a server; its page is the one that `paretofuse serve` shows too.

The page's parts lie in fronts/page/. Needs plotly (the extra "serve"), whose JavaScript is written into the file.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np

from paretofuse.engine.store.atomic import write_file
from paretofuse.fronts.arguments import other_fronts, single_models

if TYPE_CHECKING:
    from paretofuse.fronts.front import Front

SCRIPTS = ("front.js", "figure.js", "curve.js", "triangle.js", "parallel.js", "explore.js", "commands.js")
"""The page's scripts, in the order in which they load; plotly's own comes before them."""

_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
"""The file loads nothing from anywhere and tells nobody."""

_START = """
const front = JSON.parse(document.getElementById("front").textContent);
const state = explore(front);
showCommands(state, localCommands);
"""


def write_html(
    front: Front,
    path: str | os.PathLike[str],
    *,
    points: Mapping[str, Sequence[float] | np.ndarray] | None = None,
    others: Mapping[str, Front] | None = None,
    title: str | None = None,
    store: str | None = None,
    report: str = "",
) -> None:
    """Write the file; see Front.to_html, which is the same.

    Args:
        store: the path of the store that the page's commands name; "STORE" unless told.
        report: HTML of further sections, at the page's end.

    Raises:
        ImportError: plotly is missing.
        ValueError: points or others do not have this front's metrics.
    """
    data = as_data(front, points=points, others=others, title=title)
    if store is not None:
        data["store"] = store
    plotly = plotly_script()
    styles = (
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n<style>{asset("page.css")}</style>'
    )
    text = json.dumps(data).replace("<", "\\u003c")  # so that no name ends the element
    scripts = [_script(script) for script in (plotly, *map(asset, SCRIPTS))]
    scripts += [f'<script type="application/json" id="front">{text}</script>', _script(_START)]
    write_file(path, filled(head=styles, report=report, scripts="\n".join(scripts)).encode())


def as_data(
    front: Front,
    *,
    points: Mapping[str, Sequence[float] | np.ndarray] | None = None,
    others: Mapping[str, Front] | None = None,
    title: str | None = None,
) -> dict[str, Any]:
    """What the page's scripts know of a front; a server's GET /v1/front answers with the same names.

    Raises:
        ValueError: points or others do not have this front's metrics.
    """
    models, fronts = single_models(front, points), other_fronts(front, others)
    return {
        "model": title,
        "objectives": list(front.objectives),
        "metrics": {
            name: {"maximize": larger} for name, larger in zip(front.metrics, front.directions, strict=True)
        },
        "points": _points(front),
        "models": {name: dict(zip(front.metrics, row.tolist(), strict=True)) for name, row in models.items()},
        "others": {name: _points(other) for name, other in fronts.items()},
        "notes": list(front.notes),
    }


def _points(front: Front) -> list[dict[str, dict[str, float]]]:
    return [
        {
            "preference": dict(zip(front.objectives, shares, strict=True)),
            "values": dict(zip(front.metrics, values, strict=True)),
        }
        for shares, values in zip(front.preferences.tolist(), front.values.tolist(), strict=True)
    ]


def asset(name: str) -> str:
    """The text of one of the page's parts."""
    return resources.files("paretofuse.fronts").joinpath("page", name).read_text(encoding="utf-8")


def filled(**parts: str) -> str:
    """The page with HTML in the places that its comments name, such as `<!-- head -->`; other places stay empty."""
    page = asset("page.html")
    for place, html in parts.items():
        page = page.replace(f"<!-- {place} -->", html)
    return page


def plotly_script() -> str:
    """Plotly's JavaScript, out of the installed package.

    Raises:
        ImportError: plotly is missing.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError(
            "the page of a front needs plotly, which is not installed; pip install 'paretofuse[serve]'"
        ) from error
    return str(get_plotlyjs())


def _script(text: str) -> str:
    """A script element; none of the text ends it, and in JavaScript the text still means the same."""
    safe = re.sub("</(?=script)", r"<\\/", text, flags=re.IGNORECASE)
    return f"<script>{safe}</script>"
