"""The data files of a PackedStore: records one behind another, appended and never changed, mapped into memory for reading.

    data-000001.vera …

Threads may read at once. Who writes has the store to itself; PackedStore sees to that.
"""

import contextlib
import errno
import mmap
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ..errors import StoreError, StoreUnavailable
from .record import FORMAT, HEAD, MAGIC, Record, length_at, parse

SEGMENT_BYTES = 2**30  # a new file is begun when the last one is this large


def sync_folder(path: Path) -> None:
    """A folder's new names, on the disk when it returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Segments:
    """The files by number."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.mapped: dict[int, mmap.mmap] = {}
        self._mapping = threading.Lock()

    def path(self, number: int) -> Path:
        """Where a file lies, or would."""
        return self.root / f"data-{number:06d}.vera"

    def sizes(self) -> dict[int, int]:
        """Bytes of every file that is there."""
        return {int(p.stem.partition("-")[2]): p.stat().st_size for p in sorted(self.root.glob("data-*.vera"))}

    def forget(self) -> None:
        """Lets go of every mapped file; a memoryview that read() gave stays valid."""
        with self._mapping:
            self.mapped.clear()

    def remove(self, numbers: Sequence[int]) -> None:
        """The files, if they are there; gone from the disk when it returns."""
        for number in numbers:
            with self._mapping:
                self.mapped.pop(number, None)
            self.path(number).unlink(missing_ok=True)
        sync_folder(self.root)

    def read(self, number: int, place: int, length: int) -> memoryview:
        """Bytes of a file. FileNotFoundError where there is none; StoreError where it is shorter."""
        with self._mapping:
            known = self.mapped.get(number)
            if known is None or len(known) < place + length:
                with open(self.path(number), "rb") as f:
                    size = os.fstat(f.fileno()).st_size
                    if size < place + length:
                        raise StoreError(
                            f"{f.name} ends at byte {size}, and a record of the index goes to {place + length}: it was cut. Open "
                            "the store anew; complete records survive."
                        )
                    known = self.mapped[number] = mmap.mmap(f.fileno(), size, access=mmap.ACCESS_READ)
                for other in [n for n in self.mapped if not self.path(n).exists()]:  # compacted away by somebody else
                    del self.mapped[other]
        return memoryview(known)[place : place + length]

    def append(self, number: int, size: int, records: Iterable[bytes]) -> None:
        """Records behind the first `size` bytes of a file, on the disk when it returns; all or none. StoreUnavailable."""
        path = self.path(number)
        try:
            with open(path, "ab") as f:
                f.truncate(size)  # what somebody who was killed had begun
                try:
                    f.writelines(records)
                    f.flush()
                    os.fsync(f.fileno())
                except OSError:
                    with contextlib.suppress(OSError):
                        os.truncate(path, size)
                    raise
            if not size:
                sync_folder(self.root)
        except OSError as e:
            why = "the disk is full" if e.errno == errno.ENOSPC else e.strerror or str(e)
            raise StoreUnavailable(f"can't write {path}: {why}. What was there before is unchanged.") from e

    def scan(self, number: int, start: int) -> Iterator[tuple[Record, int, int] | None]:
        """The complete records of a file from byte `start` on, each with its place and length; None for a damaged place that is
        passed over. What is behind the last record was never written whole. StoreError for a newer format."""
        with open(self.path(number), "rb") as f:
            f.seek(start)
            data = f.read()
        where = str(self.path(number))
        at, whole = 0, True
        while at + HEAD.size <= len(data):
            if whole and data[at : at + len(MAGIC)] == MAGIC and data[at + len(MAGIC)] > FORMAT:
                length_at(data[at : at + HEAD.size], where)  # says which format, and what to do
            try:
                length = length_at(data[at : at + HEAD.size], where)
                record = parse(data[at : at + length], where)
            except StoreError:
                following = data.find(MAGIC, at + 1)
                if following < 0:
                    return
                if whole:
                    yield None
                at, whole = following, False
                continue
            yield record, start + at, length
            at, whole = at + length, True
