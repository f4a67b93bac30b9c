"""CachedStore: a bounded memory in front of a store; who was asked for longest ago goes first."""

import threading
import time
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

from ..adapter import Adapter
from .base import Store


@dataclass(frozen=True)
class CacheStatistics:
    """hits and misses since the start; bytes and adapters held now."""

    hits: int
    misses: int
    bytes: int
    adapters: int


class CachedStore:
    """get() from memory where the current version is there; everything else goes to the store behind it.

    max_bytes: of the held adapters' tensors. check_every: for how many seconds a version counts as current without asking the
    store; 0 asks each time, which a local store answers in microseconds. Safe for threads. Adapters are shared: don't write
    into their tensors.
    """

    def __init__(self, store: Store, max_bytes: int = 2**30, check_every: float = 0.0) -> None:
        self.store = store
        self.max_bytes = max_bytes
        self.check_every = check_every
        self._held: OrderedDict[str, tuple[Hashable, float, Adapter]] = OrderedDict()
        self._bytes = self._hits = self._misses = 0
        self._lock = threading.Lock()

    def get(self, name: str) -> Adapter:
        """The current version. UnknownName, StoreError."""
        with self._lock:
            held = self._held.get(name)
        if held is not None:
            stamp, asked, adapter = held
            now = time.monotonic()
            trusted = now - asked < self.check_every
            if trusted or self._is_current(name, stamp):
                with self._lock:
                    self._hits += 1
                    if self._held.get(name) is held:
                        self._held[name] = (stamp, asked if trusted else now, adapter)
                        self._held.move_to_end(name)
                return adapter
        return self._fetch(name)

    def _is_current(self, name: str, stamp: Hashable) -> bool:
        try:
            return self.store.stamp(name) == stamp
        except KeyError:
            self.forget(name)
            raise

    def _fetch(self, name: str) -> Adapter:
        asked = time.monotonic()
        stamp = self.store.stamp(name)  # before the adapter: a put between the two is then seen at the next get
        adapter = self.store.get(name)
        with self._lock:
            self._misses += 1
            self._drop(name)
            if adapter.bytes <= self.max_bytes:
                self._held[name] = (stamp, asked, adapter)
                self._bytes += adapter.bytes
            while self._bytes > self.max_bytes:
                self._drop(next(iter(self._held)))
        return adapter

    def _drop(self, name: str) -> None:
        held = self._held.pop(name, None)
        if held is not None:
            self._bytes -= held[2].bytes

    def forget(self, name: str) -> None:
        """Drops one adapter from memory, not from the store."""
        with self._lock:
            self._drop(name)

    @property
    def statistics(self) -> CacheStatistics:
        with self._lock:
            return CacheStatistics(self._hits, self._misses, self._bytes, len(self._held))
