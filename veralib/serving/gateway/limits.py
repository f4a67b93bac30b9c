"""Limits on how much runs: each key's rate and concurrency, and one queue in front of the engine.

All of it is this gateway's own count: two gateways let through twice as much.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from .errors import ApiError
from .metrics import Metrics
from .settings import GatewaySettings
from .tenants import Tenant

IDLE_KEYS = 1024
"""Beyond so many keys, those that are as new ones would be are dropped."""


class Bucket:
    """A minute's worth that refills evenly. What is taken may exceed what is there, once: the next one waits for the debt."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.size, self.rate, self.clock = float(per_minute), per_minute / 60, clock
        self.level, self._at = self.size, clock()

    def wait_seconds(self, needed: float = 0.0) -> float:
        """How long until something may be taken; 0: now. needed: how much must be there, 0 for anything at all."""
        now = self.clock()
        self.level = min(self.size, self.level + (now - self._at) * self.rate)
        self._at = now
        missing = needed - self.level if needed else (0.0 if self.level > 0 else 1.0 - self.level)
        return max(0.0, missing) / self.rate

    def is_full(self) -> bool:
        """Whether it is as a new one would be."""
        self.wait_seconds()
        return self.level >= self.size

    def take(self, amount: float) -> None:
        """Takes it; a negative amount gives back."""
        self.level = min(self.size, self.level - amount)


@dataclass
class _Key:
    requests: Bucket
    tokens: Bucket
    running: int = 0


@dataclass
class Ticket:
    """One request that was let in. used: its tokens as the engine counted them, set before it ends; None: as estimated."""

    key: _Key
    estimated: int
    used: int | None = None


class Limits:
    """admit: a key's rate and concurrency; enter: its tokens; 429. slot: the engine's queue, 503. What was taken is given back
    when the block, or the request, ends, however it ends."""

    def __init__(self, settings: GatewaySettings, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self.settings, self.metrics, self.clock = settings, metrics, clock
        self._keys: dict[str, _Key] = {}
        self._tidy_at = IDLE_KEYS
        self._slots = asyncio.Semaphore(settings.running)
        self._waiting = 0

    def admit(self, tenant: Tenant) -> Callable[[], None]:
        """Counts a request, before its body is read; what is returned is called at its end, once or more. ApiError 429."""
        s, key = self.settings, self._key(tenant)
        if key.running >= s.key_concurrency:
            raise self._refuse(429, "key_concurrency", f"This key has {key.running} requests running, the limit.", 1)
        if s.key_requests_per_minute and (wait := key.requests.wait_seconds(1)):
            raise self._refuse(429, "key_requests", f"This key may send {s.key_requests_per_minute} requests a minute.", wait)
        key.requests.take(1)
        key.running += 1

        left = False

        def leave() -> None:
            nonlocal left
            key.running -= not left
            left = True

        return leave

    @contextlib.asynccontextmanager
    async def enter(self, tenant: Tenant, tokens: int) -> AsyncIterator[Ticket]:
        """tokens: what the request may cost at most, roughly; corrected at the end by the engine's count."""
        s, key = self.settings, self._key(tenant)
        if s.key_tokens_per_minute and (wait := key.tokens.wait_seconds()):
            raise self._refuse(429, "key_tokens", f"This key may use {s.key_tokens_per_minute} tokens a minute.", wait)
        key.tokens.take(tokens)
        ticket = Ticket(key, tokens)
        try:
            yield ticket
        finally:
            if ticket.used is not None:
                key.tokens.take(ticket.used - tokens)

    @contextlib.asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """One of the requests that the engine has at a time, first come, first served."""
        if self._slots.locked() and self._waiting >= self.settings.queue:
            raise self._refuse(503, "queue", "The queue is full.", 2)
        self._waiting += 1
        self.metrics.waiting.set(self._waiting)
        try:
            async with asyncio.timeout(self.settings.queue_seconds):
                await self._slots.acquire()
        except TimeoutError:
            raise self._refuse(503, "queue_time", f"No turn within {self.settings.queue_seconds:g} seconds.", 5) from None
        finally:
            self._waiting -= 1
            self.metrics.waiting.set(self._waiting)
        self.metrics.running.inc()
        try:
            yield
        finally:
            self.metrics.running.dec()
            self._slots.release()

    def _key(self, tenant: Tenant) -> _Key:
        key = self._keys.get(tenant.id)
        if key is None:
            s = self.settings
            requests, of_tokens = (Bucket(n or 1, self.clock) for n in (s.key_requests_per_minute, s.key_tokens_per_minute))
            if len(self._keys) >= self._tidy_at:
                self._keys = {id: known for id, known in self._keys.items() if not self._is_idle(known)}
                self._tidy_at = max(IDLE_KEYS, 2 * len(self._keys))  # not at every new key while all are busy
            key = self._keys[tenant.id] = _Key(requests, of_tokens)
        return key

    def _is_idle(self, key: _Key) -> bool:
        s = self.settings
        return (
            key.running == 0
            and (not s.key_requests_per_minute or key.requests.is_full())
            and (not s.key_tokens_per_minute or key.tokens.is_full())
        )

    def _refuse(self, status: int, limit: str, message: str, wait: float) -> ApiError:
        self.metrics.refused.labels(limit).inc()
        seconds = max(1, math.ceil(wait))
        code = "rate_limit_exceeded" if status == 429 else "overloaded"
        message = f"{message} Try again in {seconds} seconds."
        return ApiError(status, message, code=code, headers={"Retry-After": str(seconds)})
