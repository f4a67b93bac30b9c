"""ApiError: what a client gets instead of an answer, in the OpenAI API's form."""

import json
import logging
import re
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from ...errors import StoreError, StoreUnavailable
from .records import RecordError

LOG = logging.getLogger("veralib.gateway")
SHOWN = 300
"""Characters of a client's text that an error repeats: a name of 10 MB isn't sent back."""
_NO_FIELD = re.compile(r"body|query|path|str|int|float|bool|constrained-\w+|(literal|list|dict|function-\w+)\[.*", re.DOTALL)
"""Parts of a pydantic location that are no field's name: where the value came from, and which kind of a union was tried."""


class ApiError(Exception):
    """status: the HTTP code. code: a word for programs. param: the field that is wrong. headers: Retry-After and the like."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, headers

    def body(self) -> dict[str, Any]:
        """{"error": {message, type, param, code}}."""
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """JSON in ASCII: a text may hold half a surrogate pair, which UTF-8 can't write."""
    return Response(json.dumps(content), status, headers, "application/json")


def error_response(error: ApiError) -> Response:
    """The HTTP answer."""
    return json_response(error.body(), error.status, error.headers)


def store_unavailable() -> ApiError:
    """503: no adapter is at fault."""
    message = "The store of the adapters can't be used now. Try again in 5 seconds."
    return ApiError(503, message, code="store_unavailable", headers={"Retry-After": "5"})


def shown(text: str, limit: int = SHOWN) -> str:
    """A client's text in a message: cut, and without line breaks and other control characters."""
    cut = text if len(text) <= limit else text[:limit] + "…"
    return "".join(c if c.isprintable() else " " if c.isspace() else "�" for c in cut)


def install(app: FastAPI) -> None:
    """Every exception of the application becomes an answer in the OpenAI API's form."""

    async def api(_: Request, e: Exception) -> Response:
        assert isinstance(e, ApiError)
        return error_response(e)

    async def http(_: Request, e: Exception) -> Response:
        assert isinstance(e, HTTPException)
        return error_response(ApiError(e.status_code, str(e.detail), headers=dict(e.headers or {})))

    async def validation(_: Request, e: Exception) -> Response:
        assert isinstance(e, RequestValidationError)
        return error_response(from_validation(e))

    async def store(request: Request, e: Exception) -> Response:
        LOG.warning("%s %s: %s", request.method, request.url.path[:SHOWN], e)
        if isinstance(e, RecordError):
            message = "The gateway can't use its own records now; its log says why. Try again in 30 seconds."
            return error_response(ApiError(503, message, code="state_unavailable", headers={"Retry-After": "30"}))
        if isinstance(e, StoreUnavailable):
            return error_response(store_unavailable())
        return error_response(ApiError(422, "The adapter can't be read from the store.", code="adapter_damaged"))

    async def unforeseen(_: Request, e: Exception) -> Response:
        return error_response(ApiError(500, "The gateway failed on this request; its log says why.", code="internal_error"))

    for kind, handler in {
        ApiError: api, HTTPException: http, RequestValidationError: validation, StoreError: store, Exception: unforeseen,
    }.items():  # fmt: skip
        app.add_exception_handler(kind, handler)


def from_validation(e: RequestValidationError) -> ApiError:
    """400 with the first faults by field, never the values: they may be long, and secret."""
    by_field: dict[str, list[str]] = {}
    for fault in e.errors():
        where = shown(".".join(str(part)[:60] for part in fault["loc"] if not _NO_FIELD.fullmatch(str(part))), 200)
        if fault["type"] == "extra_forbidden":
            text = "this field isn't taken here"
        elif fault["type"] == "json_invalid":
            where, text = "body", "it is no JSON"
        else:
            text = shown(str(fault["msg"]))
        by_field.setdefault(where or "body", []).append(text)
    # A field of several kinds has a fault for each kind.
    lines = [f"{where}: {', or '.join(dict.fromkeys(texts[:5]))}" for where, texts in by_field.items()]
    more = f"; and {len(lines) - 5} more" if len(lines) > 5 else ""
    first = next((field for field in by_field if field != "body"), None)
    return ApiError(400, "; ".join(lines[:5]) + more, code="invalid_request", param=first)
