"""Relay: the answer to one generating request, piece by piece from the engine, under the client's name for the model."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx2
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .client import About, EngineClient, names_no_model, read_json, unavailable
from .errors import ApiError, error_response, json_response
from .lengths import fit
from .limits import Limits, Ticket
from .metrics import Metrics
from .models import Names, follow
from .tenants import Tenant

STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class _TakesNothing(Exception):
    """A client that keeps its connection and reads nothing: the engine works for others."""


class Relay(Response):
    """Asks the engine while it is sent; a client that leaves takes the engine's request with it.

    path and body: the engine's, without model, which is put in here: the version that is live when the engine is asked.
    """

    def __init__(
        self, tenant: Tenant, path: str, called: str, body: dict[str, Any], *, tokens: int, usage: bool, max_tokens: int,
        taking_seconds: float, names: Names, client: EngineClient, limits: Limits, metrics: Metrics, base_name: str | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.tenant, self.path, self.called, self.payload, self.tokens, self.usage = tenant, path, called, body, tokens, usage
        self.max_tokens, self.taking_seconds, self.base_name = max_tokens, taking_seconds, base_name
        self.names, self.client, self.limits, self.metrics = names, client, limits, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.ensure_future(self._answer(scope, receive, send))
        left = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
            else:
                self.metrics.disconnects.inc()
        except _TakesNothing:
            self.metrics.disconnects.inc()
        finally:
            for task in (work, left):
                task.cancel()
            await asyncio.gather(work, left, return_exceptions=True)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = False

        async def noted(message: Any) -> None:
            nonlocal began
            began = True
            try:
                async with asyncio.timeout(self.taking_seconds):
                    await send(message)  # waits while the connection is full
            except TimeoutError:
                raise _TakesNothing from None

        try:
            async with self.limits.enter(self.tenant, self.tokens) as ticket:
                about = await self.client.about()
                asked = await self._asked(about)
                body = await fit(self.client, about, self.path, self.payload, self.max_tokens)
                async with self.limits.slot():
                    await self._ask(asked, body, ticket, scope, receive, noted)
        except ApiError as e:
            if began:
                raise  # nothing more can be said: the connection ends
            await error_response(e)(scope, receive, send)

    async def _asked(self, about: About) -> str:
        """The engine's name for what the client calls so."""
        return about.name if self.called == (self.base_name or about.name) else await self.names.live(self.tenant, self.called)

    async def _ask(self, asked: str, body: dict[str, Any], ticket: Ticket, scope: Scope, receive: Receive, send: Send) -> None:
        began, fresh = time.perf_counter(), True

        async def live() -> str:
            nonlocal fresh
            about, fresh = await self.client.about(fresh), False  # perhaps the engine has another base model
            return await self._asked(about)

        async def ask(name: str) -> bool:
            async with self.client.stream(self.path, {"model": name, **body}) as answer:
                if answer.status_code == 200 and answer.headers.get("content-type", "").startswith("text/event-stream"):
                    await self._pass_on(answer, name, ticket, began, send)
                    return True
                await answer.aread()
            if names_no_model(answer):
                return False
            if answer.status_code != 200:
                raise self.client.failed(answer, name, self.called)
            content = read_json(answer)
            self._count(content, ticket)
            await json_response(self._renamed(content), 200)(scope, receive, send)
            return True

        await follow(asked, live, ask, self.metrics.retries.inc)

    async def _pass_on(self, answer: httpx2.Response, asked: str, ticket: Ticket, began: float, send: Send) -> None:
        headers = [(k.lower().encode(), v.encode()) for k, v in {"Content-Type": "text/event-stream", **STREAM_HEADERS}.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        first, ended = True, False
        try:
            async for data in events(answer.aiter_bytes()):
                if data == b"[DONE]":
                    ended = True
                elif (data := self._piece(data, asked, ticket)) == b"":
                    continue
                if first:
                    self.metrics.first_token.observe(time.perf_counter() - began)
                    first = False
                await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True})
                await asyncio.sleep(0)  # what is always ready never gives way: a fast stream would hold up everybody else
            error = None if ended else unavailable("The engine ended within this answer.")
        except httpx2.TimeoutException:
            error = ApiError(504, "The engine fell silent within this answer.", code="engine_timeout")
        except (httpx2.HTTPError, ValueError):
            error = unavailable("The engine is gone; it is being started again.")
        last = b"" if error is None else b"data: " + json.dumps(error.body()).encode() + b"\n\n"
        await send({"type": "http.response.body", "body": last, "more_body": False})

    def _piece(self, data: bytes, asked: str, ticket: Ticket) -> bytes:
        """One event's JSON as the client gets it; b"": it isn't for the client."""
        content = json.loads(data)
        if not isinstance(content, dict):
            raise ValueError("no object")
        if "error" in content:
            found = content["error"]
            text = found.get("message") if isinstance(found, dict) else found
            error = ApiError(500, self.client.clean(str(text), asked, self.called), code="engine_error")
            return json.dumps(error.body()).encode()
        self._count(content, ticket)
        if not self.usage and content.get("usage") is not None:
            if not content.get("choices"):
                return b""
            del content["usage"]
        return json.dumps(self._renamed(content), separators=(",", ":")).encode()

    def _renamed(self, content: dict[str, Any]) -> dict[str, Any]:
        content.pop("kv_transfer_params", None)
        if "model" in content:
            content["model"] = self.called
        return content

    def _count(self, content: dict[str, Any], ticket: Ticket) -> None:
        usage = content.get("usage")
        if not isinstance(usage, dict):
            return
        read, written = (usage.get(k) or 0 for k in ("prompt_tokens", "completion_tokens"))
        if ticket.used is None:
            self.metrics.tokens.labels("in").inc(read)
            self.metrics.tokens.labels("out").inc(written)
        ticket.used = read + written


async def events(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of each server-sent event, as soon as it is whole."""
    rest = b""
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
