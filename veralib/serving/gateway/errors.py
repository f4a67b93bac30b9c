"""ApiError: what a client gets instead of an answer, in the OpenAI API's form."""

import json
import logging
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
    faults = e.errors()
    lines, first = [], None
    for fault in faults[:5]:
        where = shown(".".join(str(part)[:60] for part in fault["loc"] if part not in ("body", "query", "path")), 200)
        first = first or where or None
        if fault["type"] == "extra_forbidden":
            lines.append(f"{where}: this field isn't taken here")
        elif fault["type"] == "json_invalid":
            lines.append("the body is no JSON")
        else:
            lines.append(f"{where or 'body'}: {shown(str(fault['msg']))}")
    more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
    return ApiError(400, "; ".join(lines) + more, code="invalid_request", param=first)
