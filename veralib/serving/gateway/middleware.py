"""What every request passes before its route: its key's limits, the body's, and the count for /metrics."""

import asyncio
import time
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, error_response
from .limits import Limits
from .metrics import Metrics

UPLOADS = "/v1/files"
LIMITED = ("/v1/", "/classify")
"""What counts as a key's request."""
CLOSE = {"Connection": "close"}


class BodyLimits:
    """ASGI middleware: 413 for a body that is too long, also one without a stated length, and 408 for one that takes too long.

    The bytes are counted as they come; none are kept here.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, max_upload_bytes: int, seconds: float) -> None:
        self.app, self.max_bytes, self.max_upload_bytes, self.seconds = app, max_bytes, max_upload_bytes, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        limit = self.max_upload_bytes if scope["path"].startswith(UPLOADS) else self.max_bytes
        message = f"The body is longer than {limit:,} bytes."
        too_long = ApiError(413, message, code="body_too_large", headers=CLOSE)
        stated = next((v for k, v in scope["headers"] if k == b"content-length"), b"")
        if stated.isdigit() and int(stated) > limit:
            return await error_response(too_long)(scope, receive, send)
        seen, complete, deadline = 0, False, time.monotonic() + self.seconds

        async def counted() -> Message:
            nonlocal seen, complete
            if complete:
                return await receive()
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(
                    408, f"The body took longer than {self.seconds:g} seconds.", {"Connection": "close"}
                ) from None
            seen += len(message.get("body", b""))
            complete = message["type"] != "http.request" or not message.get("more_body", False)
            if seen > limit:  # FastAPI lets an HTTPException through and calls every other one a bad body
                raise HTTPException(413, too_long.message, too_long.headers)
            return message

        await self.app(scope, counted, send)


class Admit:
    """ASGI middleware: 429 for a key that sends too many requests, below LIMITED, before their bodies are read: so uploads, slow
    bodies and slow readers count as long as they last."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app, self.limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        tenant = scope.get("state", {}).get("tenant") if scope["type"] == "http" else None
        if tenant is None or not scope["path"].startswith(LIMITED):
            return await self.app(scope, receive, send)
        try:
            leave = self.limits.admit(tenant)
        except ApiError as e:
            return await error_response(e)(scope, receive, send)

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                leave()  # before its last piece: who has the whole answer may ask again
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            leave()


class Measure:
    """ASGI middleware: requests by route and class of code, and how long they took."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, status = time.perf_counter(), 499  # a client that left before an answer began

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noted)
        except Exception:
            status = 500
            raise
        finally:
            route: Any = scope.get("route")
            # The route's own path, never the one that was asked for: that would be a label for every name.
            name = getattr(route, "path", "other")
            self.metrics.requests.labels(name, f"{status // 100}xx").inc()
            self.metrics.seconds.labels(name).observe(time.perf_counter() - began)
