"""The API server's side: the name in a request becomes the version that is current in the store, read, checked and loaded.

vLLM itself answers a name that it knows from memory for ever, whatever became of the adapter. Here each request asks the store
(a look into a folder, microseconds), and what goes on to the engine is the version's own name, NAME@VERSION-MARK: no prefix
cache, no table of names and no metric can mix two versions. The answer's "model" tells the client which version it was.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Any

from ...errors import AdapterMismatch, StoreError, StoreUnavailable, UnknownName, VeraError
from ...store import open_store
from ..names import engine_name, is_name, parse_engine_name
from .manager import read
from .metrics import metrics
from .residents import refusal_in
from .settings import Settings, check_with_lora, settings_of
from .wire import STORE, pack, request_id

_LOG = logging.getLogger("vllm.veralib")
KINDS = {
    HTTPStatus.NOT_FOUND: "NotFoundError",
    HTTPStatus.BAD_REQUEST: "BadRequestError",
    HTTPStatus.SERVICE_UNAVAILABLE: "engine_unavailable",
}
STORE_AWAY, CHANGING, FULL = "store_unavailable", "model_changing", "overloaded"
"""Other types of a 503; the gateway passes them on as codes."""


class Refusal(Exception):
    """Why a request can't have its adapter, the HTTP status that says so, and the error's type in the answer."""

    def __init__(self, status: HTTPStatus, text: str, kind: str | None = None) -> None:
        super().__init__(text)
        self.status, self.text, self.kind = status, text, kind or KINDS[status]

    def answer(self) -> Any:
        """As vLLM's ErrorResponse."""
        from vllm.entrypoints.serve import create_error_response

        return create_error_response(self.text, err_type=self.kind, status_code=self.status, param="model")


class Adapters:
    """The adapters that one API server has handed to its engine, over vLLM's OpenAIServingModels.

    models.lora_requests, which /v1/models lists, has every version that the engine may have in memory, superseded ones too: who
    deletes an adapter must find them all.
    """

    def __init__(self, models: Any, settings: Settings) -> None:
        config = models.engine_client.vllm_config
        check_with_lora(config)
        self.models, self.settings = models, settings
        self.store = open_store(settings.store)
        # Half of what the engine keeps: superseded versions, and requests queued in another order, may push out the rest.
        self.capacity: int = max(1, config.lora_config.max_cpu_loras // 2)
        self.loaded: OrderedDict[str, str] = OrderedDict()
        """name -> the version that the engine has been given; who was asked for longest ago first."""
        self._current: dict[str, tuple[float, str]] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._pool = ThreadPoolExecutor(4, thread_name_prefix="vera-store")
        self._metrics = metrics()
        _silence_names_in_metrics(models.engine_client)

    async def request_for(self, name: str) -> Any:
        """The LoRARequest of a name's current version, loaded in the engine. Raises a Refusal."""
        current = await self._version(name)
        found = True
        for _ in range(3):
            known = self.models.lora_requests.get(current)
            plain = current.partition("@")[0]
            if known is not None and self.loaded.get(plain) == current:
                self.loaded.move_to_end(plain)
                self._metrics.hits.inc(found)
                return known
            lock = self._locks.setdefault(current, asyncio.Lock())
            try:
                async with lock:
                    if self.loaded.get(plain) != current:
                        found = False
                        await self._load(plain, current)
            except _Changed:
                current = await self._version(plain, trust=False)
            finally:
                if not lock.locked():
                    self._locks.pop(current, None)
        raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, f'adapter "{name}" changes faster than it can be loaded.', CHANGING)

    async def _version(self, name: str, trust: bool = True) -> str:
        plain = name
        if not is_name(name):
            try:
                plain = parse_engine_name(name)[0]
            except StoreError:
                raise _unknown(name) from None
        now = time.monotonic()
        asked, current = self._current.get(plain, (0.0, ""))
        if not current or not trust or now - asked >= self.settings.check_every:
            current = await self._ask(engine_name, self.store, plain)
            if self.settings.check_every:
                if len(self._current) > 4 * self.capacity:
                    self._current.clear()
                self._current[plain] = (now, current)
        if plain != name and name != current:
            if trust and self.settings.check_every:  # perhaps newer than what is trusted
                return await self._version(name, trust=False)
            raise _unknown(name)
        return current

    async def _load(self, plain: str, current: str) -> None:
        from vllm.lora.request import LoRARequest

        number, path = request_id(current), STORE + current
        self._metrics.misses.inc()
        try:
            packed = await self._ask(lambda: pack(read(self.store, current, self.settings)))
            await self._answer(self.models.engine_client.add_lora(LoRARequest(current, number, packed)))
        except Refusal as e:
            if e.status == HTTPStatus.NOT_FOUND:
                raise _Changed from e
            self._metrics.failures.inc()
            raise
        self.models.lora_requests[current] = LoRARequest(current, number, path)
        self.loaded[plain] = current  # nobody can ask for the version before any more
        self.loaded.move_to_end(plain)
        if len(self.loaded) > self.capacity:
            self.loaded.popitem(last=False)
        await self._look()

    async def unload(self, name: str) -> str:
        """Takes an adapter out of memory, all its versions by its name or one by the version's; a request for it reads it anew.
        Raises a Refusal."""
        removed = 0
        for version in [v for v in self.models.lora_requests if name in (v, v.partition("@")[0])]:
            self._forget(version)
            removed += await self._answer(self.models.engine_client.remove_lora(request_id(version)))
        if not removed:
            raise Refusal(HTTPStatus.NOT_FOUND, f'adapter "{name[:200]}" isn\'t loaded.')
        await self._look()
        return f"Success: LoRA adapter '{name}' removed successfully."

    async def _look(self) -> None:
        """Learns what the engine has in memory now."""
        report = await self._answer(self.models.engine_client.engine_core.call_utility_async("vera_report"))
        for version in report["gone"]:
            self._forget(version)
        while len(self.models.lora_requests) > 4 * self.capacity:  # another API server was told what is gone
            self._forget(next(iter(self.models.lora_requests)))
        self._metrics.set(report)

    def _forget(self, version: str) -> None:
        self.models.lora_requests.pop(version, None)
        plain = version.partition("@")[0]
        if self.loaded.get(plain) == version:
            del self.loaded[plain]

    async def _answer(self, asked: Awaitable[Any]) -> Any:
        """What the engine answers. Raises a Refusal: the plugin's own, or 503 where the engine failed."""
        try:
            return await asked
        except Exception as e:
            refusal = refusal_in(e)
            if isinstance(refusal, AdapterMismatch):
                raise Refusal(HTTPStatus.BAD_REQUEST, str(refusal)) from e
            if refusal is None:
                _LOG.error("the engine failed while adapters were loaded or unloaded: %r", e)
                raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "the engine failed.") from e
            raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, str(refusal), FULL) from e

    async def _ask(self, function: Any, *args: Any) -> Any:
        """A call that reads the store, in a thread: a slow disk or bucket holds up nobody else."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, function, *args)
        except UnknownName as e:
            raise Refusal(HTTPStatus.NOT_FOUND, str(e).partition(" Did you mean")[0]) from e  # names are for who owns them
        except (StoreUnavailable, OSError) as e:
            text = f"the store of adapters can't be read: {str(e).rstrip('.')}. Ask again."
            raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, text, STORE_AWAY) from e
        except VeraError as e:
            raise Refusal(HTTPStatus.BAD_REQUEST, str(e)) from e


class _Changed(Exception):
    """The version went between the look and the reading."""


def _unknown(name: str) -> Refusal:
    return Refusal(HTTPStatus.NOT_FOUND, f'The model "{name[:200]}" does not exist.')


def _silence_names_in_metrics(engine_client: Any) -> None:
    """vllm:lora_requests_info has every combination of names it ever saw as labels, and grows for ever."""
    states = getattr(getattr(engine_client, "output_processor", None), "lora_states", None)
    if states is not None:
        states.log_stats = False


def adapters_of(models: Any) -> Adapters | None:
    """What attach() put on vLLM's OpenAIServingModels; None on a server without VeRA settings."""
    return getattr(models, "vera", None)


def attach(models: Any, upstream: Any, *args: Any, **options: Any) -> None:
    """OpenAIServingModels.__init__."""
    upstream(models, *args, **options)
    settings = settings_of(models.engine_client.vllm_config)
    if settings is not None:
        from . import patches

        patches.demand(patches.API_SERVER)  # routes that are made later rest on these
        models.vera = Adapters(models, settings)


async def _named(models: Any, request: Any) -> None:
    """request.model becomes the name of the version that answers it. Raises a Refusal."""
    adapters = adapters_of(models)
    name = getattr(request, "model", None)
    if adapters is not None and name and not models.is_base_model(name):
        request.model = (await adapters.request_for(name)).lora_name


async def check_model(serving: Any, upstream: Any, request: Any) -> Any:
    """BaseServing._check_model: what every route of a generating model asks first."""
    try:
        await _named(serving.models, request)
    except Refusal as e:
        return e.answer()
    return await upstream(serving, request)


async def check_pooling_model(serving: Any, upstream: Any, request: Any) -> Any:
    """PoolingBaseServing._check_model: the same for pooling models, where an answer would be dropped."""
    from fastapi import HTTPException
    from vllm.exceptions import VLLMNotFoundError

    try:
        await _named(serving.models, request)
    except Refusal as e:
        if e.status == HTTPStatus.SERVICE_UNAVAILABLE:
            raise HTTPException(e.status, e.text) from e
        raise (VLLMNotFoundError(e.text) if e.status == HTTPStatus.NOT_FOUND else ValueError(e.text)) from e
    return await upstream(serving, request)


async def load_adapter(models: Any, upstream: Any, request: Any, base_model_name: str | None = None) -> Any:
    """POST /v1/load_lora_adapter: lora_name is the adapter's name in the store, or its version's; lora_path isn't looked at."""
    adapters = adapters_of(models)
    if adapters is None:
        return await upstream(models, request, base_model_name)
    try:
        loaded = await adapters.request_for(request.lora_name)
    except Refusal as e:
        return e.answer()
    return f"Success: LoRA adapter '{loaded.lora_name}' added successfully."


async def unload_adapter(models: Any, upstream: Any, request: Any) -> Any:
    """POST /v1/unload_lora_adapter."""
    adapters = adapters_of(models)
    if adapters is None:
        return await upstream(models, request)
    try:
        return await adapters.unload(request.lora_name)
    except Refusal as e:
        return e.answer()
