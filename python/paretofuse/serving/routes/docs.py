"""GET /docs: the OpenAPI description as a page that needs no network and no script."""

from __future__ import annotations

from html import escape
from typing import Any

from fastapi import APIRouter, FastAPI
from starlette.responses import HTMLResponse

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}: addresses</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 50rem; margin: 2rem auto; padding: 0 1rem }}
h2 {{ font: 600 1rem ui-monospace, monospace; margin: 2rem 0 0 }}
table {{ border-collapse: collapse }} td, th {{ text-align: left; vertical-align: top; padding: .1rem 1rem .1rem 0 }}
</style></head><body>
<h1>{title} {version}</h1>
<p>For programs: <a href="openapi.json">openapi.json</a>. Errors have OpenAI's shape.</p>
{operations}
</body></html>
"""


def docs_routes(app: FastAPI) -> APIRouter:
    """GET /docs."""
    router = APIRouter(include_in_schema=False)

    @router.get("/docs")
    async def docs() -> HTMLResponse:
        description = app.openapi()
        operations = [
            _operation(description, method, path, operation)
            for path, methods in description["paths"].items()
            for method, operation in methods.items()
        ]
        info = description["info"]
        return HTMLResponse(
            _PAGE.format(
                title=escape(info["title"]), version=escape(info["version"]), operations="\n".join(operations)
            )
        )

    return router


def _operation(description: dict[str, Any], method: str, path: str, operation: dict[str, Any]) -> str:
    """One address: what it does, and the fields of its body."""
    text = f"<h2>{method.upper()} {escape(path)}</h2><p>{escape(operation.get('description', ''))}</p>"
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    name = content.get("schema", {}).get("$ref", "").rpartition("/")[2]
    if not name:
        return text
    schema = description["components"]["schemas"][name]
    required = schema.get("required", [])
    rows = "".join(
        f"<tr><th><code>{escape(field)}</code></th><td>{escape(_kind(own))}</td>"
        f"<td>{'required' if field in required else ''}</td></tr>"
        for field, own in schema["properties"].items()
    )
    return f"{text}<table>{rows}</table>"


def _kind(schema: dict[str, Any]) -> str:
    """A field's type in words."""
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "enum" in schema:
        return " or ".join(map(repr, schema["enum"]))
    if "const" in schema:
        return repr(schema["const"])
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_kind(own) for own in schema["anyOf"] if own.get("type") != "null"))
    if schema.get("type") == "array":
        return f"list of {_kind(schema['items'])}"
    return str(schema.get("type", "anything"))
