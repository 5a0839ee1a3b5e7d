"""Every refusal in OpenAI's shape: {"error": {"message", "type", "param", "code"}}.

A message says what was got, what was expected and the remedy, as everywhere in ParetoFuse.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

_KINDS = ("str", "Bounds")
"""What pydantic calls the kinds that a field may be of; others are no identifiers."""
_SHOWN = 80
"""Characters of a client's own value that a message repeats."""


class ApiError(HTTPException):
    """A request that is refused.

    Attributes:
        message: got, expected, remedy.
        param: the field of the request that is meant.
        code: a word for programs, such as "queue_full".
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.message, self.param, self.code = message, param, code

    def document(self) -> dict[str, Any]:
        """The answer's body."""
        return {
            "error": {
                "message": self.message,
                "type": _kind(self.status_code),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.document(), self.status_code, self.headers)


class ClientLeft(Exception):
    """The client closed its connection before the answer."""


class ErrorBody(BaseModel):
    """What is inside "error"."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorDocument(BaseModel):
    """A refusal, as OpenAI's clients read it."""

    error: ErrorBody


def too_late() -> ApiError:
    """For a request whose deadline has passed."""
    return ApiError(
        504, "the request took longer than this server allows; ask for fewer tokens, or later", code="timeout"
    )


def shutting_down() -> ApiError:
    """For a request that comes too late."""
    return ApiError(503, "the server is shutting down; ask another one, or later", code="shutting_down")


@contextmanager
def refused(param: str) -> Iterator[None]:
    """Inside, a ValueError or TypeError about what the client sent becomes a 400 that names the field."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ApiError(400, str(error), param=param) from error


def install(app: FastAPI) -> None:
    """Answer all errors of an app in this shape."""

    async def api_error(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return error.response()

    async def http_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return _of_http(request, error).response()

    async def wrong_request(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return _of_validation(error).response()

    async def fault(_: Request, __: Exception) -> JSONResponse:
        return ApiError(500, "the server failed at this request; its log says why").response()

    async def left(_: Request, __: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(ClientLeft, left)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(RequestValidationError, wrong_request)
    app.add_exception_handler(Exception, fault)


def _of_http(request: Request, error: HTTPException) -> ApiError:
    path, method = request.url.path[:_SHOWN], request.method
    if error.status_code == 404:
        message = f"got {method} {path}, which is no address of this server; /docs lists them"
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        message = f"got {method} for {path}, expected {allowed}"
    elif error.status_code == 400:
        message = "got a body that cannot be read, expected JSON in UTF-8; check its encoding"
    else:
        message = str(error.detail)
    return ApiError(error.status_code, message, headers=error.headers)


def _of_validation(error: RequestValidationError) -> ApiError:
    # Of a field that may be of several kinds there is an error for each; one beyond its kind is the one that is meant.
    errors: list[dict[str, Any]] = [dict(own) for own in error.errors()]
    found = next((own for own in errors if not own["type"].endswith("_type")), errors[0])
    where = [str(part) for part in found["loc"] if part not in ("body", *_KINDS) and str(part).isidentifier()]
    where += [str(part) for part in found["loc"] if isinstance(part, int)]
    param = ".".join(where) or None
    if found["type"] == "json_invalid":
        return ApiError(400, f"got a body that is no JSON ({found['ctx']['error']}), expected a JSON object")
    if not where and found["type"] in ("missing", "model_attributes_type"):
        got = "no body" if found["type"] == "missing" else "a body that is not read as a JSON object"
        return ApiError(400, f"got {got}, expected a JSON object with Content-Type application/json")
    if found["type"] == "missing":
        return ApiError(400, f"got no {param!r}, which is required; add it", param=param)
    if found["type"] == "extra_forbidden":
        return ApiError(
            400,
            f"got {param!r}, which this server does not know at this address; leave it out, or see /docs for what "
            "there is",
            param=param,
        )
    if found["loc"][-2:-1] == ("preference",) and found["type"].endswith("_type"):
        return ApiError(
            400,
            f"got {_shown(found.get('input'))} for preference, expected a share of each objective, as in "
            '{"news": 0.7, "poems": 0.3}, or bounds, as in {"at_most": {"news": 30.0}, "best": "poems"}',
            param="preference",
        )
    reason = str(found["msg"])
    reason = reason[:1].lower() + reason[1:]
    return ApiError(400, f"got {_shown(found.get('input'))} for {param or 'the body'}: {reason}", param=param)


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):  # bytes, NaN inside
        text = repr(value)
    text = text.encode("utf-8", "backslashreplace").decode()  # halves of surrogate pairs
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _kind(status: int) -> str:
    """OpenAI's word for a status."""
    words = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
    if status == 429:
        return "rate_limit_error"
    return words.get(status, "invalid_request_error" if status < 500 else "server_error")
