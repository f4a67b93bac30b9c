"""FolderStore: a file for each version of each adapter, on a disk or behind an fsspec URL.

    store.json
    configurations/<hash>
    adapters/<shard>/<key of the name>/<version>-<random>.vera

The version with the greatest file name is the current one. Nothing is ever changed in place: two who write one name at once
make two files, and one of them is the greatest.
"""

import logging
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import replace

from ..errors import StoreError, StoreUnavailable, UnknownName
from .base import Store, Version
from .codec import Configuration, Precision
from .files import Files
from .names import decoded, key_of, shard_of
from .record import Record, parse

LOG = logging.getLogger(__name__)
ABOUT = "store.json"
_FILE = re.compile(r"(\d{12})-[0-9a-f]{8}\.vera")
_ESCAPED = re.compile(r"=([0-9a-f]{2})")


class FolderStore(Store):
    """One file a version: easy to copy, back up and look at. For hundreds of thousands of adapters and more, PackedStore."""

    def __init__(self, files: Files, precision: Precision = "float32", keep: int | None = None) -> None:
        super().__init__(precision, keep)
        self.files = files

    def __repr__(self) -> str:
        return f"FolderStore({str(self.files)!r})"

    def delete(self, name: str) -> None:
        self._files_of(name)
        self.files.remove(self._folder(name))

    def delete_unreadable(self, prefix: str) -> int:
        start, gone = key_of(prefix) if prefix else "", 0
        for shard in self.files.list("adapters"):
            for key in self.files.list(f"adapters/{shard}"):
                if "~" not in key or not key.partition("~")[0].startswith(start):
                    continue
                try:
                    self._name_of(shard, key)
                except StoreUnavailable:
                    raise
                except StoreError:
                    self.files.remove(f"adapters/{shard}/{key}")
                    gone += 1
        return gone

    def names(self, prefix: str = "") -> Iterator[str]:
        start = key_of(prefix)[:60] if prefix else ""  # of a long name the key holds 60 characters
        for shard in self.files.list("adapters"):
            for key in self.files.list(f"adapters/{shard}"):
                # Where the key already tells, its folder isn't listed.
                try:
                    found = self._name_of(shard, key) if key.startswith(start) else None
                except StoreUnavailable:
                    raise
                except StoreError as e:
                    LOG.warning("passed over, since only its records know its name and none can be read: %s", e)
                    continue
                if found is not None and found.startswith(prefix):
                    yield found

    def versions(self, name: str) -> list[Version]:
        out = []
        for file in self._files_of(name):
            try:
                data = self.files.read(f"{self._folder(name)}/{file}")
            except FileNotFoundError:  # it went since the look, as a newer one came or all were deleted
                continue
            record = parse(data, f'adapter "{name}"')
            out.append(Version(_number(file), record.milliseconds, len(data), record.notes))
        if not out:
            raise self._unknown(name)
        return out

    def current(self, name: str) -> int:
        return _number(self._files_of(name)[-1])

    def stamp(self, name: str) -> str:
        return self._files_of(name)[-1]

    def __len__(self) -> int:
        return sum(1 for _ in self.names())

    def _folder(self, name: str) -> str:
        return f"adapters/{shard_of(name)}/{key_of(name)}"

    def _unknown(self, name: str, version: int | None = None) -> UnknownName:
        if ABOUT not in self.files.list(""):  # a disk that isn't mounted, and no name is known
            raise StoreUnavailable(f"{self.files} holds no {ABOUT} any more: it was moved, or isn't mounted.")
        return super()._unknown(name, version)

    def _files_of(self, name: str) -> list[str]:
        """The files of all versions, oldest first."""
        found = sorted(f for f in self.files.list(self._folder(name)) if _FILE.fullmatch(f))
        if not found:
            raise self._unknown(name)
        return found

    def _name_of(self, shard: str, key: str) -> str | None:
        files = [f for f in self.files.list(f"adapters/{shard}/{key}") if _FILE.fullmatch(f)]
        if not files:
            return None  # deleted meanwhile, or about to be written
        if "~" in key:  # cut: the record knows the whole name
            return self._name_within(f"adapters/{shard}/{key}", files)
        raw = _ESCAPED.sub(lambda m: chr(int(m[1], 16)), key)
        return decoded(raw.encode("latin-1"))

    def _name_within(self, folder: str, files: list[str]) -> str | None:
        """The name that the newest readable record has; None where all went since the look. StoreError where none can be read."""
        damaged: StoreError | None = None
        for file in sorted(files, reverse=True):
            try:
                return parse(self.files.read(f"{folder}/{file}"), folder).name
            except FileNotFoundError:
                continue
            except StoreError as e:
                damaged = e
        if damaged is not None:
            raise damaged
        return None

    def _write(self, records: Sequence[Record]) -> list[int]:
        numbers = []
        for record in records:
            folder = self._folder(record.name)
            known = sorted(f for f in self.files.list(folder) if _FILE.fullmatch(f))
            number = _number(known[-1]) + 1 if known else 1
            file = f"{number:012d}-{secrets.token_hex(4)}.vera"
            self.files.write(f"{folder}/{file}", replace(record, version=number).to_bytes())
            for old in known[: max(0, len(known) + 1 - self.keep)] if self.keep is not None else ():
                self.files.remove(f"{folder}/{old}")
            numbers.append(number)
        return numbers

    def _read(self, name: str, version: int | None) -> bytes:
        for attempt in range(4):
            files = self._files_of(name)
            if version is not None:
                files = [f for f in files if _number(f) == version]
            if not files:
                raise self._unknown(name, version)
            try:
                return self.files.read(f"{self._folder(name)}/{files[-1]}")
            except FileNotFoundError as e:  # a newer version came and this one went, between the two looks
                if attempt == 3:
                    raise StoreUnavailable(f'adapter "{name}" changes faster than it can be read.') from e
        raise AssertionError("unreachable")

    def _keep_configuration(self, configuration: Configuration) -> None:
        path = f"configurations/{configuration.digest.hex()}"
        if configuration.digest.hex() not in self.files.list("configurations"):
            self.files.write(path, configuration.text)

    def _read_configuration(self, digest: bytes) -> bytes | None:
        try:
            return self.files.read(f"configurations/{digest.hex()}")
        except FileNotFoundError:
            return None


def _number(file: str) -> int:
    return int(file[:12])
