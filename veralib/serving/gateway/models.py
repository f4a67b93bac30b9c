"""Names: from the name that a client gives to the version that is live, and pages of a tenant's own names."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from ...errors import StoreError, StoreUnavailable, UnknownName, nearest
from ...store import Store, Version
from ..names import engine_name, is_name
from .client import unavailable
from .errors import LOG, ApiError, shown
from .tenants import Tenant

T = TypeVar("T")
VERSIONS = 20
"""How many versions of a model one request follows, where each is outdated when its turn has come."""
REFUSALS = 3
"""How often in a row an engine may have no such model, while the one that is live is still the same."""
NEAR_NAMES, NEAR_SECONDS, NEAR_TENANTS = 200, 30.0, 1000


class Names:
    """Asks the store, in threads of its own: a folder on a network may take its time.

    Nothing of what the store says is kept, so a put is seen by the very next request. What a key doesn't own never reaches the
    store at all: whether it is there shows neither in the answer nor in its time.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._threads = ThreadPoolExecutor(8, "store")
        self._pages = ThreadPoolExecutor(2, "store-pages")  # a folder store looks at every name: nobody's answer waits for that
        self._near: OrderedDict[str, tuple[float, list[str]]] = OrderedDict()
        self._looking = False

    def close(self) -> None:
        """Ends the threads."""
        for threads in (self._threads, self._pages):
            threads.shutdown(wait=False, cancel_futures=True)

    async def ask(self, call: Callable[..., T], *arguments: Any) -> T:
        """A call of the store's, in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *arguments)

    async def live(self, tenant: Tenant, name: str) -> str:
        """The engine's name of the version that is live. ApiError 404, StoreError."""
        if self.owned(tenant, name):
            try:
                return await self.ask(engine_name, self.store, name)
            except UnknownName:
                pass
        raise await self.unknown(tenant, name)

    def owned(self, tenant: Tenant, name: str) -> bool:
        """Whether it is worth asking the store for it."""
        return is_name(name) and tenant.owns(name)

    async def of_owner(self, tenant: Tenant, name: str, call: Callable[..., T], *arguments: Any) -> T:
        """call(name, …) of the store's, for an adapter of the tenant's own. ApiError 404."""
        if self.owned(tenant, name):
            try:
                return await self.ask(call, name, *arguments)
            except UnknownName:
                pass
        raise await self.unknown(tenant, name)

    async def unknown(self, tenant: Tenant, name: str) -> ApiError:
        """The 404: the same for what isn't there and for what is somebody else's, with a near name of the tenant's own."""
        near = nearest(name[:128], await self._own(tenant))
        text = f'There is no model "{shown(name, 128)}" for this key.{near}'
        return ApiError(404, text, code="model_not_found", param="model")

    async def page(self, tenant: Tenant, after: str, limit: int) -> list[str]:
        """The tenant's names behind `after`, in order. Those that no client may use aren't among them."""
        found: list[str] = []
        size = limit
        while True:
            names = await asyncio.get_running_loop().run_in_executor(self._pages, self.store.page, tenant.prefix, after, size)
            found += [name for name in names if is_name(name)]
            if len(found) >= limit or len(names) < size:
                return found[:limit]
            after, size = names[-1], 1000

    async def latest(self, name: str) -> Version | None:
        """About the current version; None where it was deleted or is damaged. StoreUnavailable."""
        try:
            return await self.ask(self.store.latest, name)
        except StoreUnavailable:
            raise
        except (UnknownName, StoreError):
            return None

    async def _own(self, tenant: Tenant) -> list[str]:
        """Some names of the tenant's own, for near names: not always the newest, and looked up one tenant at a time, as a folder
        store has to look at every name there is for it."""
        known = self._near.get(tenant.prefix)
        if known is not None and time.monotonic() - known[0] < NEAR_SECONDS:
            return known[1]
        if self._looking:
            return known[1] if known else []
        self._looking = True
        try:
            names = await self.page(tenant, "", NEAR_NAMES)
        finally:
            self._looking = False
        self._near[tenant.prefix] = (time.monotonic(), names)
        self._near.move_to_end(tenant.prefix)
        while len(self._near) > NEAR_TENANTS:
            self._near.popitem(last=False)
        return names


async def follow(
    asked: str, live: Callable[[], Awaitable[str]], ask: Callable[[str], Awaitable[bool]], again: Callable[[], None]
) -> None:
    """Asks the engine for `asked`; where it has no such model, for the one that is live then: a newer version came meanwhile, or
    this one was just unloaded.

    live: the engine's name of what is live; raises a 404 where nothing is. ask: whether the engine had it. again: called
    before each further question. ApiError 503 where the engine goes on having no such model.
    """
    refused = 0
    for _ in range(VERSIONS):
        if await ask(asked):
            return
        latest = await live()
        refused = refused + 1 if latest == asked else 0
        if refused == REFUSALS:
            LOG.error('the engine has no "%s", which is live: does it read the same store?', asked)
            raise unavailable("The engine doesn't find this model, though it is there.", "engine_error")
        asked = latest
        again()
    raise unavailable("This model gets new versions faster than the engine can be asked for them.", "model_changing")
