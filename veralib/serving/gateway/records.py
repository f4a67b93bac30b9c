"""Records: what the gateway remembers besides adapters, as small JSON files in one folder that several gateways may share.

A record is written whole under another name, synced and renamed, so a reader finds the old one or the new one. Who reads, decides
and then writes holds a lock meanwhile: the kernel lets it go when its process dies. A lease says who works on something for long.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ...errors import ConfigError, StoreError
from ...store.files import LocalFiles
from ...store.names import key_of

GATHER = "gather"
"""The lock of who makes a run."""


class RecordError(StoreError):
    """The state folder, not an adapter: it can't be written or read, or a record in it is damaged."""


class DamagedRecord(RecordError):
    """It was read, and is no record: that won't pass."""


@contextlib.contextmanager
def _telling(what: object) -> Iterator[None]:
    """FileNotFoundError comes through."""
    try:
        yield
    except FileNotFoundError:
        raise
    except StoreError as e:
        raise RecordError(str(e)) from e
    except OSError as e:
        raise RecordError(f"can't use {what}: {e.strerror or e}.") from e


class Records:
    """The folder. RecordError where something in it can't be read or written. Paths are relative to it, with "/"."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        self._files = LocalFiles(self.root)
        try:
            for folder in ("", "locks", "tmp"):
                (self.root / folder).mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as e:
            raise ConfigError(f"can't make the state folder {self.root}: {e.strerror or e}.") from e

    def read(self, path: str, *needed: str) -> dict[str, Any] | None:
        """A record, or None where there is none. DamagedRecord, also where a needed field isn't in it."""
        try:
            with _telling(path):
                found = json.loads(self._files.read(path))
        except FileNotFoundError:
            return None
        except ValueError as e:
            raise DamagedRecord(f"{self.root / path} holds no JSON: {e}. Restore it from a backup, or remove it.") from e
        if not isinstance(found, dict):
            why = f"holds a {type(found).__name__}, expected an object of fields"
            raise DamagedRecord(f"{self.root / path} {why}. Restore it from a backup, or remove it.")
        if missing := [field for field in needed if field not in found]:
            raise DamagedRecord(f'{self.root / path} has no "{missing[0]}". Restore it from a backup, or remove it.')
        return found

    def write(self, path: str, record: Any) -> None:
        """On the disk when it returns."""
        with _telling(path):
            self._files.write(path, json.dumps(record, indent=1).encode() + b"\n")

    def write_chunks(self, path: str, chunks: Iterable[bytes]) -> int:
        """A file of any length, whole and on the disk when it returns, or not there where `chunks` raises; its bytes."""
        temporary, count = self.root / "tmp" / uuid.uuid4().hex, 0
        try:
            with open(temporary, "wb") as f:
                for chunk in chunks:
                    count += f.write(chunk)
                f.flush()
                os.fsync(f.fileno())
            while True:
                (self.root / path).parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.replace(temporary, self.root / path)
                    break
                except FileNotFoundError:  # the folder was removed in between
                    if not temporary.exists():
                        raise
        except OSError as e:
            raise RecordError(f"can't write {self.root / path}: {e.strerror or e}.") from e
        finally:
            temporary.unlink(missing_ok=True)
        return count

    def add_line(self, path: str, record: Any, sync: bool = True) -> None:
        """One more line of a log; nothing where its folder is gone. A line that a crash cut is passed over by lines()."""
        with contextlib.suppress(FileNotFoundError), _telling(path), open(self.root / path, "ab") as f:
            f.write(b"\n" * bool(f.tell() and not self._ends_in_newline(path)) + json.dumps(record).encode() + b"\n")
            if sync:
                f.flush()
                os.fsync(f.fileno())

    def _ends_in_newline(self, path: str) -> bool:
        with open(self.root / path, "rb") as f:
            f.seek(-1, os.SEEK_END)
            return f.read(1) == b"\n"

    def lines(self, path: str) -> list[dict[str, Any]]:
        """A log's whole lines, oldest first; none where there is no log."""
        found = []
        with contextlib.suppress(FileNotFoundError):
            for line in self._files.read(path).splitlines():
                with contextlib.suppress(ValueError):
                    found.append(json.loads(line))
        return found

    def names(self, folder: str) -> list[str]:
        """Names in a folder; none where there is no such folder."""
        return self._files.list(folder)

    def size(self, path: str) -> int:
        """A file's bytes; 0 where it isn't there."""
        with contextlib.suppress(FileNotFoundError):
            return (self.root / path).stat().st_size
        return 0

    def remove(self, path: str) -> None:
        """A file, or a folder with all in it, gone for every reader at once; fine where it is gone already."""
        with _telling(path):
            self._files.remove(path)

    def remove_empty(self, folder: str) -> None:
        """A folder, unless something is in it."""
        with contextlib.suppress(OSError):
            (self.root / folder).rmdir()

    def path(self, path: str) -> Path:
        """Where something lies on the disk."""
        return self.root / path

    @contextlib.contextmanager
    def lock(self, what: str) -> Iterator[None]:
        """One at a time over all threads and processes. GATHER has one of its own; all other things share 256, so none of them is
        taken within another."""
        number = what if what == GATHER else hashlib.sha256(what.encode("utf-8", "surrogatepass")).hexdigest()[:2]
        with open(self.root / "locks" / number, "ab") as f:  # a descriptor of its own: threads exclude each other too
            fcntl.flock(f, fcntl.LOCK_EX)
            yield

    def claim(self, path: str, owner: str, seconds: float) -> bool:
        """Takes a lease for `owner`, or renews it; False where another holds it, or the lease's folder is gone."""
        with self.lock(path):
            if (found := self._lease(path)) is not None and found[0] != owner and found[1] > time.time():
                return False
            if not (self.root / path).parent.is_dir():
                return False
            self.write(path, {"owner": owner, "until": time.time() + seconds})
            return True

    def release(self, path: str, owner: str) -> None:
        """Gives a lease back, if it is still this owner's."""
        with self.lock(path):
            if (found := self._lease(path)) is not None and found[0] == owner:
                self.remove(path)

    def _lease(self, path: str) -> tuple[str, float] | None:
        """(owner, until when); a damaged one is nobody's."""
        try:
            found = self.read(path)
            return None if found is None else (found["owner"], found["until"])
        except (DamagedRecord, KeyError, TypeError):
            return None

    def sweep(self) -> None:
        """Removes what killed processes left in tmp/."""
        self._files.sweep()


def tenant_folder(prefix: str) -> str:
    """A tenant's prefix as a folder name; keys of one prefix share what they have."""
    return key_of(prefix) if prefix else "_all"
