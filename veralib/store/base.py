"""Store: adapters by name, with versions. What every form of store does alike, above records."""

import heapq
import time
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..adapter import Adapter
from ..errors import ConfigError, StoreError, UnknownName, nearest
from . import codec
from .codec import Configuration, Precision
from .names import encoded
from .record import ADAPTER, Record, parse


@dataclass(frozen=True)
class Version:
    """One version of one adapter."""

    number: int
    milliseconds: int
    """Since 1970, when it was put."""
    bytes: int
    """Of the record, the payload in it."""
    notes: Mapping[str, str]


class Store(ABC):
    """Adapters by name: put, get, delete, names, versions, rollback. Made by open_store(where).

    A name is any string that isn't empty. put is durable when it returns; whoever reads meanwhile gets the old version or the
    new one, whole. precision: of d and b in the store, "float32", "bfloat16" or "int8" (a scale for each vector). keep: how
    many versions of a name stay; None, all.
    """

    def __init__(self, precision: Precision = "float32", keep: int | None = None) -> None:
        if precision not in codec.VECTOR_BYTES:
            raise ConfigError(f"precision is {precision!r}, expected one of {', '.join(codec.VECTOR_BYTES)}.")
        if keep is not None and keep < 1:
            raise ConfigError(f"keep is {keep!r}, expected how many versions of a name stay, at least 1, or None for all.")
        self.precision = precision
        self.keep = keep
        self._configurations: dict[bytes, Configuration] = {}

    # What there is for every user

    def put(self, name: str, adapter: Adapter, notes: Mapping[str, str] | None = None) -> int:
        """Stores a new version of the adapter, which is the current one from then on; returns its number."""
        return self.put_many([(name, adapter)], notes)[0]

    def put_many(self, items: Iterable[tuple[str, Adapter]], notes: Mapping[str, str] | None = None) -> list[int]:
        """Several at once, with one wait for the disk where the form of store can; their version numbers."""
        records = []
        for name, adapter in items:
            if not isinstance(adapter, Adapter):
                raise ConfigError(
                    f'the adapter to store as "{name}" is a {type(adapter).__name__}, expected an Adapter: vera.adapter(name), '
                    "or load_adapter(path)."
                )
            configuration = codec.configuration_of(adapter, self.precision)
            if configuration.digest not in self._configurations:
                self._keep_configuration(configuration)
                self._configurations[configuration.digest] = configuration
            payload = codec.encode(adapter, configuration)
            extra = {**adapter.notes, **(notes or {})}
            records.append(Record(name, 0, time.time_ns() // 1_000_000, configuration.digest, extra, payload))
        return self._write(records)

    def get(self, name: str, version: int | None = None) -> Adapter:
        """The adapter, its current version unless told. UnknownName, or StoreError where it is damaged."""
        where = f'adapter "{name}"'
        record = self._record(name, version)
        return codec.decode(record.payload, self._configuration(record.configuration), record.notes, where)

    def rollback(self, name: str, version: int) -> int:
        """Makes an earlier version the current one again, as a new version; returns its number."""
        old = self._record(name, version)
        now = time.time_ns() // 1_000_000
        return self._write([Record(name, 0, now, old.configuration, old.notes, bytes(old.payload))])[0]

    @abstractmethod
    def delete(self, name: str) -> None:
        """Forgets an adapter and all its versions. UnknownName."""

    def delete_unreadable(self, prefix: str) -> int:
        """Forgets adapters whose names begin so and which names() passes over, as no record of theirs can be read; how many."""
        return 0

    @abstractmethod
    def names(self, prefix: str = "") -> Iterator[str]:
        """The names that begin so, in no promised order."""

    def page(self, prefix: str = "", after: str = "", limit: int = 100) -> list[str]:
        """The first names that begin with prefix and come behind `after`, sorted by their bytes.

        Costs a look at every name with that prefix, and in a folder store a listing of all; a packed store reads the page alone.
        """
        start = encoded(after) if after else b""
        behind = ((raw, name) for name in self.names(prefix) if (raw := encoded(name)) > start)
        return [name for _, name in heapq.nsmallest(limit, behind)]

    def latest(self, name: str) -> Version:
        """About the current version; reads its record alone. UnknownName, StoreError."""
        data = self._read(name, None)
        record = parse(data, f'adapter "{name}"')
        return Version(record.version, record.milliseconds, len(data), record.notes)

    @abstractmethod
    def versions(self, name: str) -> list[Version]:
        """All versions that are kept, oldest first. UnknownName."""

    @abstractmethod
    def current(self, name: str) -> int:
        """The number of the current version, read from the store. UnknownName."""

    @abstractmethod
    def stamp(self, name: str) -> Hashable:
        """What tells the current version from every other that ever was, also from one of the same number that was deleted,
        read from the store. UnknownName."""

    @abstractmethod
    def __len__(self) -> int: ...

    def __contains__(self, name: Any) -> bool:
        try:
            self.current(name)
        except UnknownName:
            return False
        return True

    def close(self) -> None:
        """Lets go of files; the store can't be used after it."""
        self._configurations.clear()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    # What a form of store has to do

    @abstractmethod
    def _write(self, records: Sequence[Record]) -> list[int]:
        """Stores records under new version numbers, durably."""

    @abstractmethod
    def _read(self, name: str, version: int | None) -> bytes | memoryview:
        """The bytes of a record. UnknownName."""

    @abstractmethod
    def _keep_configuration(self, configuration: Configuration) -> None:
        """Stores a configuration durably unless it is there."""

    @abstractmethod
    def _read_configuration(self, digest: bytes) -> bytes | None:
        """A configuration's bytes."""

    # Helpers

    def _record(self, name: str, version: int | None) -> Record:
        record = parse(self._read(name, version), f'adapter "{name}"')
        if record.name != name or record.kind != ADAPTER:
            raise StoreError(f'what lies in the place of adapter "{name}" is of "{record.name}": the store is damaged.')
        return record

    def _configuration(self, digest: bytes) -> Configuration:
        found = self._configurations.get(digest)
        if found is None:
            text = self._read_configuration(digest)
            if text is None or codec.digest_of(text) != digest:
                state = "gone" if text is None else "damaged"
                raise StoreError(f"configuration {digest.hex()} of this store is {state}: restore it from a backup.")
            found = codec.read_configuration(text, f"configuration {digest.hex()}")
            self._configurations[digest] = found
        return found

    def _unknown(self, name: str, version: int | None = None) -> UnknownName:
        if version is not None:
            return UnknownName(f'there is no version {version} of adapter "{name}" in this store: versions("{name}") lists them.')
        near = nearest(name, (n for n, _ in zip(self.names(), range(200), strict=False)))
        return UnknownName(f'there is no adapter "{name}" in this store.{near}')
