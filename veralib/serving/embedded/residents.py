"""Residents: which adapters are in the model's memory. Read from the store on demand, the least recently used go first."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from ... import basis
from ...adapter import Adapter
from ...bank import Member
from ...basis import Basis
from ...errors import StoreError, StoreUnavailable, UnknownName, VeraError
from ...model import Vera
from ...store import Store
from ..names import engine_name, is_name, parse_engine_name
from .errors import BadAdapter, EngineBusy, unknown_model


class Between(Protocol):
    """Runs a function between two steps of the model, in the thread that runs them."""

    def __call__(self, function: Callable[[], Any]) -> "Future[Any]": ...


@dataclass
class Resident:
    """One adapter in memory. pins: how many running requests use it; doomed: it goes when the last of them ends."""

    member: Member
    bases: frozenset[Basis]
    bytes: int
    pins: int = 0
    doomed: bool = False


@dataclass(frozen=True)
class Statistics:
    """hits, misses, evictions and failures since the start; adapters, bytes and bases held now."""

    hits: int
    misses: int
    evictions: int
    failures: int
    adapters: int
    bytes: int
    bases: int


@dataclass
class Limits:
    """slots: adapters that stay when unused; those that running requests use stay besides. max_bases: different pairs A, B."""

    slots: int = 256
    max_rank: int = 1024
    max_bases: int = 8
    layers: frozenset[str] | None = field(default=None, repr=False)
    """The layers that may be adapted: None, all of them."""
    heads: bool = False
    """Whether modules that are trained in full can be served."""


class Residents:
    """Adapters by engine name. pin() in any thread, then release(); the model is only changed between its steps."""

    def __init__(self, vera: Vera, store: Store | None, limits: Limits, between: Between) -> None:
        self.vera = vera
        self.store = store
        self.limits = limits
        self.between = between
        self.entries: OrderedDict[str, Resident] = OrderedDict()
        self._loading: dict[str, Future[None]] = {}
        self._lock = threading.Lock()
        self._hits = self._misses = self._evictions = self._failures = 0

    # Names

    def resolve(self, name: str) -> str:
        """The engine's name of what a request asks for: NAME@VERSION-MARK itself, if it is the current version, or that of
        NAME. UnknownName."""
        if self.store is None or not isinstance(name, str):
            raise unknown_model(str(name))
        try:
            plain, _, _ = parse_engine_name(name)
        except StoreError:
            plain = name
        if not is_name(plain):
            raise unknown_model(name)
        try:
            current = engine_name(self.store, plain)
        except UnknownName:
            self.forget(name)
            raise unknown_model(name) from None
        if name not in (plain, current):
            self.forget(name)
            raise unknown_model(name)
        return current

    # In and out

    def pin(self, name: str) -> str:
        """The engine's name of an adapter that is in memory now and stays until release(name). Waits for the disk.

        UnknownName; BadAdapter where it is damaged or doesn't fit; StoreUnavailable; EngineBusy.
        """
        name = self.resolve(name)
        while True:
            with self._lock:
                entry = self.entries.get(name)
                if entry is not None:
                    entry.doomed = False  # it was unloaded a moment ago, and is the current version all the same
                    entry.pins += 1
                    self._hits += 1
                    self.entries.move_to_end(name)
                    return name
                loading = self._loading.get(name)
                if mine := loading is None:
                    loading = self._loading[name] = Future()
                    self._misses += 1
            assert loading is not None
            if not mine:
                loading.result()  # raises what the one who loads it met
                continue
            try:
                adapter = self._read(name)
                self.between(lambda adapter=adapter: self._enter(name, adapter)).result()  # type: ignore[misc]
                with self._lock:
                    del self._loading[name]
                loading.set_result(None)
                return name
            except BaseException as e:
                with self._lock:
                    del self._loading[name]
                    self._failures += 1
                loading.set_exception(e)
                raise

    def release(self, name: str) -> None:
        """Ends one pin(), when no step can use the adapter for it any more."""
        with self._lock:
            entry = self.entries[name]
            entry.pins -= 1
            surplus = not entry.pins and (entry.doomed or len(self.entries) > self.limits.slots)
        if surplus:
            self.between(self._drop_surplus)

    def forget(self, name: str) -> bool:
        """Takes an adapter out of memory, at once or when its last request ends; whether it was there."""
        with self._lock:
            entry = self.entries.get(name)
            if entry is None:
                return False
            entry.doomed = True
        self.between(self._drop_surplus)
        return True

    @property
    def statistics(self) -> Statistics:
        with self._lock:
            held = sum(e.bytes for e in self.entries.values())
            bases = len(self._bases())
            counts = (self._hits, self._misses, self._evictions, self._failures)
            return Statistics(*counts, len(self.entries), held, bases)

    def member(self, name: str) -> Member:
        """The model's entry of an adapter that is pinned."""
        return self.entries[name].member

    @property
    def names(self) -> list[str]:
        with self._lock:
            return list(self.entries)

    # Reading, in the caller's thread

    def _read(self, name: str) -> Adapter:
        assert self.store is not None
        plain, version, _ = parse_engine_name(name)
        try:
            adapter = self.store.get(plain, version)
            if engine_name(self.store, plain) != name:  # put or deleted between the two: it may be another one's
                raise unknown_model(name)
        except UnknownName:
            raise unknown_model(name) from None
        except StoreUnavailable:
            raise
        except (VeraError, OSError) as e:
            raise BadAdapter(f'the adapter "{plain}" can\'t be read: {e}') from e
        self._check(plain, adapter)
        # A and B grow here, in the caller's thread: a large pair takes a tenth of a second that no step should wait for.
        device, dtype = self.vera.inside.device, next(self.vera.model.parameters()).dtype
        for unit, (d, b) in adapter.vectors.items():
            pair, n = adapter.basis_of(unit), adapter.base.layers[unit.partition(":")[0]][1]
            if n:
                pair.A(d.numel(), n, device, dtype)
                pair.B(b.numel(), d.numel(), device, dtype)
        return adapter

    def _check(self, name: str, adapter: Adapter) -> None:
        rank = max((d.numel() for d, _ in adapter.vectors.values()), default=0)
        if rank > self.limits.max_rank:
            raise BadAdapter(f'the adapter "{name}" has rank {rank}; this engine serves up to {self.limits.max_rank}.')
        bases = {adapter.basis_of(unit) for unit in adapter.vectors}
        if len(bases) > self.limits.max_bases:
            raise BadAdapter(
                f'the adapter "{name}" has {len(bases)} pairs A, B of its own; this engine holds up to {self.limits.max_bases}.'
            )
        if adapter.modules and not self.limits.heads:
            raise BadAdapter(
                f'the adapter "{name}" carries modules that are trained in full ({", ".join(adapter.modules)}), which can\'t be '
                "chosen for each token: it can't be served with a language model."
            )
        if self.limits.layers is not None:
            strange = [layer for layer in adapter.base.layers if layer not in self.limits.layers]
            if strange:
                raise BadAdapter(
                    f'the adapter "{name}" adapts "{strange[0]}", which this model has not or doesn\'t call once for each token.'
                )

    # Between two steps

    def _enter(self, name: str, adapter: Adapter) -> None:
        """Into the model, pinned once."""
        bases = frozenset(adapter.basis_of(unit) for unit in adapter.vectors)
        self._make_room(bases)
        try:
            self.vera.load(adapter, name=name)
        except VeraError as e:
            raise BadAdapter(str(e)) from e
        with self._lock:
            self.entries[name] = Resident(self.vera.members[name], bases, adapter.bytes, pins=1)

    def _make_room(self, bases: frozenset[Basis]) -> None:
        with self._lock:
            idle = [n for n, e in self.entries.items() if not e.pins]
            while len(self.entries) >= self.limits.slots and idle:
                self._drop(idle.pop(0), evicted=True)
            for n in idle:
                if len(self._bases() | bases) <= self.limits.max_bases:
                    break
                if not self.entries[n].bases <= bases:
                    self._drop(n, evicted=True)
            if len(used := self._bases() | bases) > self.limits.max_bases:
                raise EngineBusy(
                    f"running requests use {len(used) - 1} different pairs A, B, and this engine holds up to "
                    f"{self.limits.max_bases} at once: ask again later."
                )
            basis.keep_only(used, self.limits.max_bases)

    def _drop_surplus(self) -> None:
        """What is doomed, and what was more than the slots while requests used it."""
        with self._lock:
            for name in [n for n, e in self.entries.items() if e.doomed and not e.pins]:
                self._drop(name)
            idle = [n for n, e in self.entries.items() if not e.pins]
            for name in idle[: max(0, len(self.entries) - self.limits.slots)]:
                self._drop(name, evicted=True)

    def _drop(self, name: str, evicted: bool = False) -> None:
        del self.entries[name]
        self.vera.remove(name)
        self._evictions += evicted

    def _bases(self) -> set[Basis]:
        return {b for e in self.entries.values() for b in e.bases}


def distinct(members: Iterable[Member | None]) -> list[Member]:
    """The members without repetition, in order."""
    return [m for m in dict.fromkeys(members) if m is not None]
