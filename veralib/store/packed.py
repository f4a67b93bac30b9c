"""PackedStore: a million adapters in a few files. Records lie one behind another; SQLite knows where each begins.

    store.json
    data-000001.vera …    records, appended, mapped into memory for reading
    index.sqlite          name, version -> file, place, length; configurations

The records are the truth: they hold name and version, and an index that was lost or lags behind is made good from them. A put
appends, waits for the disk, then writes the index, so a crash between the two leaves a record that the next opening finds.
"""

import os
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import StoreError, StoreUnavailable
from .base import Store, Version
from .codec import Configuration, Precision, digest_of
from .index import Index, settle
from .names import decoded, encoded
from .record import ADAPTER, TOMBSTONE, Record, parse
from .segments import SEGMENT_BYTES, Segments, sync_folder


class PackedStore(Store):
    """For bulk: put_many waits for the disk once, a get is one lookup and one read from mapped memory. Linux and macOS.

    Several processes may read and write. delete and old versions leave their bytes in the files until compact().
    """

    def __init__(self, root: Path, precision: Precision = "float32", keep: int | None = None) -> None:
        super().__init__(precision, keep)
        self.root = root
        self._index = Index(root)
        self._segments = Segments(root)
        self.recovered = 0
        """Records that the index lacked when the store was opened: written by somebody who was killed."""
        self.damaged = 0
        """Places among them that hold no whole record, and were passed over."""
        with self._index.exclusive() as index:
            self._recover(index)

    def __repr__(self) -> str:
        return f"PackedStore({str(self.root)!r})"

    def close(self) -> None:
        super().close()
        self._segments.forget()
        self._index.close()

    # Asked

    def stamp(self, name: str) -> tuple[int, int]:
        rows = self._index.ask("SELECT segment, place FROM adapters WHERE name = ? ORDER BY version DESC LIMIT 1", encoded(name))
        if not rows:
            raise self._unknown(name)
        return rows[0]

    def current(self, name: str) -> int:
        found = self._index.ask("SELECT max(version) FROM adapters WHERE name = ?", encoded(name))[0][0]
        if found is None:
            raise self._unknown(name)
        return found

    def names(self, prefix: str = "") -> Iterator[str]:
        start = prefix.encode("utf-8", "surrogatepass")
        last = b""
        while True:  # in pages: nobody holds a lock while the caller thinks
            rows = self._index.ask("SELECT DISTINCT name FROM adapters WHERE name >= ? AND name > ? LIMIT 1000", start, last)
            for (raw,) in rows:
                if not raw.startswith(start):
                    return
                yield decoded(raw)
            if len(rows) < 1000:
                return
            last = rows[-1][0]

    def page(self, prefix: str = "", after: str = "", limit: int = 100) -> list[str]:
        start, last = (text.encode("utf-8", "surrogatepass") for text in (prefix, after))
        query = "SELECT DISTINCT name FROM adapters WHERE name >= ? AND name > ? ORDER BY name LIMIT ?"
        rows = self._index.ask(query, start, last, limit)
        return [decoded(raw) for (raw,) in rows if raw.startswith(start)]

    def versions(self, name: str) -> list[Version]:
        rows = self._index.ask("SELECT version FROM adapters WHERE name = ? ORDER BY version", encoded(name))
        if not rows:
            raise self._unknown(name)
        out = []
        for (number,) in rows:
            data = self._read(name, number)
            record = parse(data, f'adapter "{name}"')
            out.append(Version(number, record.milliseconds, len(data), record.notes))
        return out

    def __len__(self) -> int:
        return self._index.ask("SELECT count(DISTINCT name) FROM adapters")[0][0]

    def _read(self, name: str, version: int | None) -> bytes | memoryview:
        for attempt in range(4):
            rows = self._index.ask(
                "SELECT segment, place, length FROM adapters WHERE name = ? AND version = ifnull(?, version) "
                "ORDER BY version DESC LIMIT 1",
                *(encoded(name), version),
            )
            if not rows:
                if version is not None:
                    self.current(name)
                raise self._unknown(name, version)
            try:
                return self._segments.read(*rows[0])
            except FileNotFoundError as e:  # compacted between the two looks
                if attempt == 3:
                    raise StoreError(f'{e.filename}, which holds adapter "{name}", is gone: restore it from a backup.') from e
            except OSError as e:
                raise StoreUnavailable(f"can't read {self.root}: {e.strerror or e}.") from e
        raise AssertionError("unreachable")

    # Changed

    def _write(self, records: Sequence[Record]) -> list[int]:
        with self._index.exclusive() as index:
            numbers, numbered, latest = [], [], {}
            for record in records:
                name = encoded(record.name)
                if name not in latest:
                    latest[name] = index.execute("SELECT max(version) FROM adapters WHERE name = ?", (name,)).fetchone()[0] or 0
                latest[name] += 1
                numbers.append(latest[name])
                numbered.append((name, latest[name], replace(record, version=latest[name]).to_bytes()))
            rows = self._append(index, numbered)
            index.executemany("INSERT INTO adapters VALUES(?, ?, ?, ?, ?)", rows)
            if self.keep is not None:
                old = [(name, number - self.keep) for name, number in latest.items() if number > self.keep]
                index.executemany("DELETE FROM adapters WHERE name = ? AND version <= ?", old)
        return numbers

    def delete(self, name: str) -> None:
        with self._index.exclusive() as index:
            last = index.execute("SELECT max(version) FROM adapters WHERE name = ?", (encoded(name),)).fetchone()[0]
            if last is None:
                raise self._unknown(name)
            self._append(index, [(encoded(name), last, Record(name, last, 0, kind=TOMBSTONE).to_bytes())])
            index.execute("DELETE FROM adapters WHERE name = ?", (encoded(name),))

    def compact(self) -> int:
        """Writes what is still wanted into new files and removes the old ones; returns how many bytes that freed.

        StoreUnavailable where a reader holds the index for so long that the old files had to stay: what was deleted is still in
        them, until the next call or the next opening.
        """
        with self._index.exclusive() as index:
            before = sum(self._segments.sizes().values())
            old = [n for (n,) in index.execute("SELECT number FROM segments WHERE dead = 0")]
            rows = index.execute("SELECT name, version, segment, place, length FROM adapters ORDER BY segment, place").fetchall()
            first = index.execute("SELECT ifnull(max(number), 0) + 1 FROM segments").fetchone()[0]
            new = range(first, first + 1 + sum(length for *_, length in rows) // SEGMENT_BYTES)
            # The new files count as dead until all is in them: should this end halfway, nobody takes them for the truth.
            index.executemany("INSERT INTO segments VALUES(?, 0, 1)", [(n,) for n in new])
            settle(index)
            number, size = first, 0
            for k in range(0, len(rows), 4096):
                part = [(name, version, bytes(self._segments.read(*place))) for name, version, *place in rows[k : k + 4096]]
                if size > SEGMENT_BYTES and number + 1 in new:
                    number, size = number + 1, 0
                found = self._append(index, part, number, size)
                size = found[-1][3] + found[-1][4]
                index.executemany("INSERT OR REPLACE INTO adapters VALUES(?, ?, ?, ?, ?)", found)
            index.executemany("UPDATE segments SET dead = 1 WHERE number = ?", [(n,) for n in old])
            # The first one stays also when it is empty, as file and as row: from it the next number is counted, and a number that
            # came back would give a new adapter the stamp of a deleted one.
            self._segments.path(first).touch()
            index.execute("UPDATE segments SET dead = 0 WHERE number = ? OR number > ? AND size > 0", (first, first))
        with self._index.exclusive() as index:
            if not self._remove_dead(index):
                raise StoreUnavailable(
                    f"{self.root} is compacted, but somebody reads an old state of its index, a backup perhaps, so the old files "
                    "are still there, with what was deleted: call compact() again when that has ended."
                )
            return before - sum(self._segments.sizes().values())

    def _append(
        self, index: sqlite3.Connection, records: list[tuple[bytes, int, bytes]], number: int | None = None, size: int = 0
    ) -> list[tuple]:
        """Records behind the last file's end, or behind `size` bytes of file `number`, on the disk when it returns; their rows
        for the index."""
        if number is None:
            last = index.execute("SELECT number, size FROM segments WHERE dead = 0 ORDER BY number DESC LIMIT 1").fetchone()
            number, size = last or (0, 0)
            if last is None or size > SEGMENT_BYTES:
                number, size = index.execute("SELECT ifnull(max(number), 0) + 1 FROM segments").fetchone()[0], 0
        self._segments.append(number, size, (data for *_, data in records))
        rows, end = [], size
        for name, version, data in records:
            rows.append((name, version, number, end, len(data)))
            end += len(data)
        index.execute(
            "INSERT INTO segments VALUES(?, ?, 0) ON CONFLICT(number) DO UPDATE SET size = excluded.size", (number, end)
        )
        return rows

    def _keep_configuration(self, configuration: Configuration) -> None:
        with self._index.exclusive() as index:
            index.execute("INSERT OR IGNORE INTO configurations VALUES(?, ?)", (configuration.digest, configuration.text))
            path = self.root / f"configuration-{configuration.digest.hex()}"
            if not path.exists():  # a copy beside the index, for the day it is lost
                temporary = path.with_suffix(".tmp")
                with open(temporary, "wb") as f:
                    f.write(configuration.text)
                    f.flush()
                    os.fsync(f.fileno())
                os.replace(temporary, path)
                sync_folder(self.root)

    def _read_configuration(self, digest: bytes) -> bytes | None:
        rows = self._index.ask("SELECT text FROM configurations WHERE digest = ?", digest)
        return rows[0][0] if rows else None

    # Opened

    def _recover(self, index: sqlite3.Connection) -> None:
        """The index made to agree with the files: records it lacks are added, rows whose bytes are gone are dropped."""
        for path in self.root.glob("configuration-*"):
            if path.suffix != ".tmp" and digest_of(text := path.read_bytes()).hex() == path.name.partition("-")[2]:
                index.execute("INSERT OR IGNORE INTO configurations VALUES(?, ?)", (digest_of(text), text))
        self._remove_dead(index)
        # Dead files that a reader still holds are copies at best: what they say of deleted adapters is old.
        known = dict(index.execute("SELECT number, size FROM segments WHERE dead = 0").fetchall())
        dead = {number for (number,) in index.execute("SELECT number FROM segments WHERE dead = 1")}
        present = {number: size for number, size in self._segments.sizes().items() if number not in dead}
        for number in sorted(known.keys() | present.keys()):
            size, indexed = present.get(number, 0), known.get(number, 0)
            end = size
            if size > indexed:
                end = self._scan(index, number, indexed)
            elif size < indexed:
                index.execute("DELETE FROM adapters WHERE segment = ? AND place + length > ?", (number, size))
                end = index.execute("SELECT max(place + length) FROM adapters WHERE segment = ?", (number,)).fetchone()[0] or 0
            if end != indexed or number not in known:
                index.execute(
                    "INSERT INTO segments VALUES(?, ?, 0) ON CONFLICT(number) DO UPDATE SET size = excluded.size", (number, end)
                )
        if self.recovered and self.keep is not None:
            latest = "(SELECT max(version) FROM adapters AS other WHERE other.name = adapters.name)"
            index.execute(f"DELETE FROM adapters WHERE version <= {latest} - ?", (self.keep,))

    def _scan(self, index: sqlite3.Connection, number: int, place: int) -> int:
        """Enters the complete records from `place` on; where the last of them ends: _append writes over what is behind it."""
        end = place
        for found in self._segments.scan(number, place):
            if found is None:
                self.damaged += 1
                continue
            record, start, length = found
            name = encoded(record.name)
            if record.kind == ADAPTER:
                row = (name, record.version, number, start, length)
                index.execute("INSERT OR REPLACE INTO adapters VALUES(?, ?, ?, ?, ?)", row)
                self.recovered += 1
            elif record.kind == TOMBSTONE:
                index.execute("DELETE FROM adapters WHERE name = ? AND version <= ?", (name, record.version))
            end = start + length
        return end

    def _remove_dead(self, index: sqlite3.Connection) -> bool:
        """False where they had to stay."""
        dead = [number for (number,) in index.execute("SELECT number FROM segments WHERE dead = 1")]
        if not dead:
            return True
        if not settle(index):
            return False
        self._segments.remove(dead)
        index.executemany("DELETE FROM segments WHERE number = ?", [(number,) for number in dead])
        return True
