"""What every route shares: errors in OpenAI's form, counting, clients that leave."""

import asyncio
import contextlib
import hmac
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from ...errors import ConfigError, StoreError, StoreUnavailable, UnknownName, VeraError
from ..gateway.errors import ApiError, error_response
from .errors import BadAdapter, BadRequest, EngineBusy, EngineError
from .metrics import Metrics

T = TypeVar("T")
LONGEST_BODY = 32 * 2**20
LONG_TEXT = 10_000
KEY_VARIABLE = "VLLM_API_KEY"
"""vLLM's; a gateway sets it for the engine that it starts."""


def api_error(e: Exception) -> ApiError:
    """What a client is told of an error. Anything that isn't the engine's own doing keeps its words; the rest is a 500."""
    if isinstance(e, ApiError):
        return e
    if isinstance(e, UnknownName):
        return ApiError(404, str(e), code="model_not_found", param="model")
    if isinstance(e, BadAdapter):
        return ApiError(422, str(e), code="bad_adapter", param="model")
    if isinstance(e, BadRequest):
        return ApiError(400, str(e), param=e.param)
    if isinstance(e, EngineBusy):
        return ApiError(429, str(e), code="engine_busy", headers={"Retry-After": "1"})
    if isinstance(e, EngineError):
        return ApiError(503, str(e), code="engine_failed")
    if isinstance(e, StoreUnavailable):
        return ApiError(503, str(e), code="store_unavailable", headers={"Retry-After": "5"})
    if isinstance(e, (ConfigError, StoreError)):
        return ApiError(422, str(e), param="model")
    return ApiError(500, "the engine failed; its log says why.", code="internal_error")


def _answer(error: ApiError) -> Response:
    return error_response(error)


def add_error_handlers(app: FastAPI) -> None:
    """Every error in OpenAI's form."""

    def invalid(request: Request, e: Exception) -> Response:
        assert isinstance(e, RequestValidationError)
        faults = []
        for fault in e.errors()[:10]:
            where = ".".join(str(part) for part in fault["loc"] if part != "body")
            faults.append(f"{where}: {fault['msg']}" if where else str(fault["msg"]))
        first = e.errors()[0]["loc"] if e.errors() else ()
        param = next((str(p) for p in first[1:] if isinstance(p, str)), None)
        return _answer(ApiError(400, "; ".join(dict.fromkeys(faults)) or "the request is malformed.", param=param))

    def status(request: Request, e: Exception) -> Response:
        assert isinstance(e, HTTPException)
        return _answer(ApiError(e.status_code, str(e.detail), headers=dict(e.headers) if e.headers else None))

    app.exception_handler(RequestValidationError)(invalid)
    app.exception_handler(HTTPException)(status)
    for kind in (ApiError, VeraError, Exception):
        app.exception_handler(kind)(lambda request, e: _answer(api_error(e)))


class Counted:
    """Middleware: counts requests and refuses bodies that are too long, also those that don't say how long they are."""

    def __init__(self, app: Any, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start, status, size = time.perf_counter(), 499, 0

        async def limited() -> Any:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > LONGEST_BODY:
                raise HTTPException(413, f"the body has more than {LONGEST_BODY} bytes.")
            return message

        async def noted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, limited, noted)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - start)


class Keyed:
    """Middleware: 401 for whoever doesn't send the key as bearer, except to /health, which says nothing of anybody."""

    def __init__(self, app: Any, key: str) -> None:
        self.app, self.key = app, key.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] != "/health":
            kind, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
            if kind.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self.key):
                message = f"this engine wants the key of its environment variable {KEY_VARIABLE}: Authorization: Bearer KEY."
                return await _answer(ApiError(401, message, code="invalid_api_key"))(scope, receive, send)
        await self.app(scope, receive, send)


class ClientGone(Exception):
    """The client closed the connection before its answer."""


async def aside(size: int, work: Callable[[], T]) -> T:
    """What work() gives; in a thread where the client's text is long, so that other clients' answers go on."""
    return work() if size < LONG_TEXT else await asyncio.get_running_loop().run_in_executor(None, work)


async def until_gone(request: Request, work: Awaitable[T]) -> T:
    """What `work` gives; it is cancelled, and ClientGone raised, where the client leaves first."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        watching.cancel()
        if not working.done():
            working.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await working
