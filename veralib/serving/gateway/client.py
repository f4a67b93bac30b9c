"""EngineClient: what the gateway asks an engine, over HTTP in vLLM's dialect, and what the engine's failures become."""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import httpx2

from ..names import NAME
from .errors import LOG, ApiError, shown, store_unavailable

ENGINE_NAMES = re.compile(rf"{NAME.pattern}@\d{{1,18}}-[0-9a-f]{{12}}")
ABOUT_SECONDS, LOOK_SECONDS = 30.0, 2.0
SILENT, ABSENT = 0, -1
"""In place of a status: nothing came, and nobody listens at the port."""
LATER = ("overloaded", "model_changing", "engine_unavailable")
"""Types of an engine's 503 that say why in words for clients, and are our codes."""
COUNTS = 32
"""Questions for a count of tokens at a time: they come before the queue, and must not take the connections of what runs."""
IDLE_SECONDS = 2.0
"""How long an unused connection is kept: engines that aren't ours close theirs after 5, and what is sent then is lost."""
LOST_SECONDS = 1.0
"""A connection that ends so soon and without a word was closed before the request came: it is sent once more."""
LOST = (httpx2.RemoteProtocolError, httpx2.ReadError, httpx2.WriteError)


class Where(Protocol):
    """An engine, started by us or by somebody else. url is None while there is none; run changes with every start."""

    url: str | None
    key: str | None
    run: int


@dataclass(frozen=True)
class About:
    """The engine's base model. name: what the engine calls it. max_length: tokens of prompt and answer; None: unknown."""

    name: str
    max_length: int | None
    created: int


class EngineClient:
    """Asks one engine. Every failure is an ApiError without any name of the engine's own and without paths."""

    def __init__(self, engine: Where, seconds: float, connections: int, hidden: tuple[str, ...] = ()) -> None:
        self.engine = engine
        self.hidden = tuple(h for h in hidden if h)
        """Texts that no answer may hold: the paths of store, state and model."""
        # trust_env=False: a proxy that is set for downloads isn't for the engine on this machine.
        self._http = httpx2.AsyncClient(
            timeout=httpx2.Timeout(seconds, connect=5.0, pool=5.0),
            limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=64, keepalive_expiry=IDLE_SECONDS),
            trust_env=False,
            headers={"Accept-Encoding": "identity"},
        )
        # Of its own, as a look must not wait behind requests: an engine that doesn't answer it is ended.
        self._looks = httpx2.AsyncClient(
            timeout=LOOK_SECONDS, limits=httpx2.Limits(max_connections=2, keepalive_expiry=IDLE_SECONDS), trust_env=False
        )
        self._looking: asyncio.Future[int] | None = None
        self._counting = asyncio.Semaphore(COUNTS)
        self._about: tuple[int, float, About] | None = None
        self._asking = asyncio.Lock()

    async def close(self) -> None:
        """Ends the connections."""
        await self._http.aclose()
        await self._looks.aclose()

    async def get(self, path: str, seconds: float | None = None) -> httpx2.Response:
        """ApiError 503 or 504 where there is no answer."""
        async with self._failing():
            kind: dict[str, Any] = {"timeout": seconds} if seconds else {}
            return await self._send(lambda: self._request("GET", path, **kind))

    async def post(self, path: str, body: dict[str, Any]) -> httpx2.Response:
        """The same."""
        async with self._failing():
            return await self._send(lambda: self._request("POST", path, content=encode(body)))

    @asynccontextmanager
    async def stream(self, path: str, body: dict[str, Any]) -> AsyncIterator[httpx2.Response]:
        """The answer with its head read; leaving the block ends the request at the engine."""
        async with self._failing():
            answer = await self._send(lambda: self._request("POST", path, content=encode(body)), stream=True)
            try:
                yield answer
            finally:
                await answer.aclose()

    def _request(self, method: str, path: str, **kind: Any) -> httpx2.Request:
        return self._http.build_request(method, self._url(path), headers=self._headers(), **kind)

    async def _send(self, request: Callable[[], httpx2.Request], stream: bool = False) -> httpx2.Response:
        began = time.monotonic()
        try:
            return await self._http.send(request(), stream=stream)
        except LOST:
            if time.monotonic() - began > LOST_SECONDS:
                raise
        return await self._http.send(request(), stream=stream)

    async def healthy(self) -> bool:
        """Whether the engine answers now, and well."""
        return await self.health() == 200

    async def health(self) -> int:
        """The status of the engine's /health; SILENT where none comes, ABSENT where nobody listens. All who ask at a time share
        one look: /ready is open to everybody."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.ensure_future(self._look())
        return await asyncio.shield(self._looking)

    async def _look(self) -> int:
        try:
            async with self._failing():
                return (await self._looks.get(self._url("/health"), headers=self._headers())).status_code
        except ApiError as e:
            return ABSENT if _refused(e) else SILENT

    async def about(self, fresh: bool = False) -> About:
        """Asked again after a restart, and now and then: by one at a time, as vLLM lists every adapter it has with it."""
        began = time.monotonic()
        if (known := self._known(fresh, began)) is not None:
            return known
        async with self._asking:
            return self._known(fresh, began) or await self._ask_about()

    def _known(self, fresh: bool, began: float) -> About | None:
        """What was asked lately; fresh: after `began`."""
        if self._about is None:
            return None
        run, at, about = self._about
        lately = at >= began if fresh else time.monotonic() - at < ABOUT_SECONDS
        return about if run == self.engine.run and lately else None

    async def _ask_about(self) -> About:
        known = self._about
        run = self.engine.run
        for card in await self._cards():
            if not card.get("parent") and ENGINE_NAMES.fullmatch(str(card.get("id"))) is None:
                length, created = card.get("max_model_len"), card.get("created")
                about = About(
                    str(card["id"]), length if isinstance(length, int) else None, created if type(created) is int else 0
                )
                if known and known[2].name == about.name and known[0] == run:
                    about = About(about.name, about.max_length, known[2].created)  # vLLM answers the present time
                self._about = (run, time.monotonic(), about)
                return about
        raise ApiError(502, "The engine names no base model.", code="engine_error")

    async def resident(self, name: str | None = None) -> list[str]:
        """The engine's names of the versions that it has in memory, of one adapter or of all."""
        found = [str(c.get("id")) for c in await self._cards()]
        return [n for n in found if (n.startswith(f"{name}@") if name is not None else ENGINE_NAMES.fullmatch(n))]

    async def forget(self, name: str) -> int:
        """Unloads every version of an adapter; returns how many there were."""
        names = await self.resident(name)
        for each in names:
            answer = await self.post("/v1/unload_lora_adapter", {"lora_name": each})
            if answer.status_code not in (200, 400, 404):  # 400 and 404: gone meanwhile
                raise self.failed(answer)
        return len(names)

    async def count_tokens(self, body: dict[str, Any]) -> int | None:
        """Of a prompt or of messages; None where this engine can't say."""
        async with self._counting:
            answer = await self.post("/tokenize", body)
        if answer.status_code in (404, 405, 501):
            return None
        if answer.status_code != 200:
            raise self.failed(answer)
        count = read_json(answer).get("count")
        return count if isinstance(count, int) else None

    async def metrics(self) -> str:
        """The engine's page, "" where there is none."""
        try:
            answer = await self.get("/metrics", seconds=2.0)
        except ApiError:
            return ""
        return answer.text if answer.status_code == 200 else ""

    def failed(self, answer: httpx2.Response, asked: str = "", called: str = "") -> ApiError:
        """The ApiError for an answer, whose body was read, that is none. asked: the name that the engine was asked for; called:
        what the client calls it."""
        status, message = answer.status_code, _message(answer)
        if status == 404 and asked:  # a path that this engine lacks
            return ApiError(400, f"The engine has no {answer.request.url.path} for this model.", code="unsupported")
        if status in (400, 413, 422):
            return ApiError(status, self.clean(message, asked, called), code="invalid_request")
        error = error_of(answer)
        if status == 503 and "store_unavailable" in (error.get("code"), error.get("type")):
            return store_unavailable()
        if status == 503 and error.get("type") in LATER:  # of vLLM with the plugin
            return unavailable(self.clean(message, asked, called), code=error["type"])
        if status in (429, 503):
            return unavailable("The engine is overloaded.", code="overloaded")
        LOG.warning("the engine answered %d: %s", status, shown(message, 2000))
        return ApiError(502, f"The engine failed on this request (HTTP {status}).", code="engine_error")

    def clean(self, text: str, asked: str, called: str) -> str:
        """An engine's text as its client may read it: the name that the client knows, no other names, no paths."""
        if asked:
            text = text.replace(asked, called)
        text = ENGINE_NAMES.sub("…", text)
        for path in self.hidden:
            text = text.replace(path, "…")
        return shown(text, 2000)

    async def _cards(self) -> list[dict[str, Any]]:
        answer = await self.get("/v1/models")
        if answer.status_code != 200:
            raise self.failed(answer)
        found = read_json(answer).get("data")
        return [c for c in found if isinstance(c, dict)] if isinstance(found, list) else []

    def _url(self, path: str) -> str:
        if self.engine.url is None:
            raise unavailable("The engine is starting.")
        return self.engine.url + path

    def _headers(self) -> dict[str, str]:
        key = {"Authorization": f"Bearer {self.engine.key}"} if self.engine.key else {}
        return {"Content-Type": "application/json", **key}

    @asynccontextmanager
    async def _failing(self) -> AsyncIterator[None]:
        try:
            yield
        except (httpx2.ConnectTimeout, httpx2.PoolTimeout) as e:
            raise unavailable("The engine doesn't take connections.") from e
        except httpx2.TimeoutException as e:
            raise ApiError(504, "The engine didn't answer in time.", code="engine_timeout") from e
        except httpx2.HTTPError as e:
            LOG.debug("the engine is gone: %r", e)  # whoever looks after the engine says so once
            raise unavailable("The engine is gone; it is being started again.") from e


def unavailable(message: str, code: str = "engine_unavailable") -> ApiError:
    """503, with the advice to try again."""
    return ApiError(503, message + " Try again in 2 seconds.", code=code, headers={"Retry-After": "2"})


def _refused(e: BaseException | None) -> bool:
    """Whether a connection was refused. One that this process couldn't make, for want of descriptors, is another matter."""
    while e is not None:
        if isinstance(e, ConnectionRefusedError):
            return True
        e = e.__cause__ or e.__context__
    return False


def encode(body: Any) -> bytes:
    """ApiError 400 for what JSON's reader let in and no engine should get: NaN, half a surrogate pair, endless nesting."""
    try:
        return json.dumps(body, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as e:
        raise ApiError(400, f"The request can't be written as JSON: {e}.", code="invalid_request") from None


def read_json(answer: httpx2.Response) -> dict[str, Any]:
    """The object that the engine answered. ApiError 502."""
    try:
        found = answer.json()
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ApiError(502, "The engine's answer is no JSON object.", code="engine_error")
    return found


def error_of(answer: httpx2.Response) -> dict[str, Any]:
    """The fields of an engine's error: of vLLM's {"error": {"message", "type", "code"}}, its older form without "error", and
    FastAPI's {"detail"}. {} where it is none of them."""
    try:
        found = answer.json()
    except ValueError:
        return {"message": answer.text[:2000]}
    if not isinstance(found, dict):
        return {}
    error = found.get("error", found)
    return error if isinstance(error, dict) else {"message": error}


def names_no_model(answer: httpx2.Response) -> bool:
    """Whether the engine says that it has no such model: vLLM by the error's type, the embedded one by its code. A path that an
    engine lacks is a 404 too."""
    error = error_of(answer)
    return answer.status_code == 404 and (error.get("type") == "NotFoundError" or error.get("code") == "model_not_found")


def _message(answer: httpx2.Response) -> str:
    error = error_of(answer)
    texts = (error.get("message"), error.get("detail"))
    return next((text for text in texts if isinstance(text, str)), "The engine refused this request.")
