"""Where a FolderStore's files lie: this machine's disk, or any URL that fsspec opens (s3://, gs://, az://, hf://, memory://)."""

import contextlib
import errno
import os
import shutil
import time
import uuid
from pathlib import Path
from typing import Any, Protocol

from ..errors import StoreUnavailable, need

GONE = ".gone"
"""Ends the name of what is being removed."""
STALE_SECONDS = 3600.0
"""What somebody began to write so long ago nobody writes any more."""


class Files(Protocol):
    """What a store asks of a file system; paths are relative, with "/". StoreUnavailable where it doesn't do it."""

    def write(self, path: str, data: bytes) -> None:
        """A new file, whole and durable when it returns, or not there at all."""

    def read(self, path: str) -> bytes:
        """FileNotFoundError where it isn't."""
        ...

    def list(self, folder: str) -> list[str]:
        """Names in a folder; empty where there is no such folder."""
        ...

    def remove(self, path: str) -> None:
        """One file, or a folder with all that is in it, at once or the first by name first; fine where it is gone already."""

    def sweep(self) -> None:
        """Removes what killed processes left half done."""

    def __str__(self) -> str: ...


class LocalFiles:
    """A folder of this machine. Written beside, synced, renamed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.scratch = root / "tmp"

    def __str__(self) -> str:
        return str(self.root)

    def write(self, path: str, data: bytes) -> None:
        target, temporary = self.root / path, self.scratch / uuid.uuid4().hex
        try:
            self.scratch.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            for attempt in range(8):
                self._make_folder(target.parent)
                try:
                    os.replace(temporary, target)
                    break
                except FileNotFoundError:  # somebody deleted the name meanwhile, its folder with it
                    if attempt == 7:
                        raise
            _sync(target.parent)
        except OSError as e:
            why = "the disk is full" if e.errno == errno.ENOSPC else e.strerror or str(e)
            raise StoreUnavailable(f"can't write {target}: {why}. What was there before is unchanged.") from e
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _make_folder(self, folder: Path) -> None:
        if not folder.is_dir():
            self._make_folder(folder.parent)
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
            _sync(folder.parent)

    def read(self, path: str) -> bytes:
        try:
            with open(self.root / path, "rb", buffering=0) as f:
                if hasattr(os, "posix_fadvise"):  # all of it from the disk at once, not by the kernel's growing steps
                    os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
                return f.read()
        except FileNotFoundError:
            raise
        except OSError as e:
            raise StoreUnavailable(f"can't read {self.root / path}: {e.strerror or e}.") from e

    def list(self, folder: str) -> list[str]:
        try:
            return os.listdir(self.root / folder)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as e:
            raise StoreUnavailable(f"can't list {self.root / folder}: {e.strerror or e}.") from e

    def remove(self, path: str) -> None:
        target, aside = self.root / path, self.scratch / f"{uuid.uuid4().hex}{GONE}"
        try:
            self.scratch.mkdir(parents=True, exist_ok=True)
            os.replace(target, aside)  # gone at once for every reader, however many files it holds
            _sync(target.parent)
        except FileNotFoundError:
            return
        except OSError as e:
            raise StoreUnavailable(f"can't remove {target}: {e.strerror or e}.") from e
        _discard(aside)

    def sweep(self) -> None:
        """Removes what killed processes were about to remove, and what they didn't write to its end."""
        for name in self.list(self.scratch.name):
            path = self.scratch / name
            with contextlib.suppress(OSError):
                if name.endswith(GONE) or time.time() - path.stat().st_mtime > STALE_SECONDS:
                    _discard(path)


def _discard(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class RemoteFiles:
    """A folder behind fsspec. An object store writes a file whole or not at all, which is what write() promises."""

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        try:
            import fsspec
        except ImportError as e:
            raise need("fsspec", "store", f"a store at {url}") from e
        self.url = url.rstrip("/")
        self.fs, self.root = fsspec.core.url_to_fs(self.url, **options)

    def __str__(self) -> str:
        return self.url

    def write(self, path: str, data: bytes) -> None:
        where = f"{self.root}/{path}"
        try:
            self.fs.makedirs(where.rpartition("/")[0], exist_ok=True)
            self.fs.pipe_file(where, data)
        except Exception as e:  # each file system has errors of its own
            raise StoreUnavailable(f"can't write {self.url}/{path}: {e}.") from e

    def read(self, path: str) -> bytes:
        try:
            return self.fs.cat_file(f"{self.root}/{path}")
        except FileNotFoundError:
            raise
        except Exception as e:
            raise StoreUnavailable(f"can't read {self.url}/{path}: {e}.") from e

    def list(self, folder: str) -> list[str]:
        try:
            self.fs.invalidate_cache(f"{self.root}/{folder}")
            return [p.rstrip("/").rpartition("/")[2] for p in self.fs.ls(f"{self.root}/{folder}", detail=False)]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except Exception as e:
            raise StoreUnavailable(f"can't list {self.url}/{folder}: {e}.") from e

    def sweep(self) -> None:
        """Nothing is ever half done."""

    def remove(self, path: str) -> None:
        try:
            where = f"{self.root}/{path}"
            self.fs.invalidate_cache(where)
            for earlier in sorted(self.fs.find(where))[:-1]:  # the current version last: no older one is ever the newest
                with contextlib.suppress(FileNotFoundError):
                    self.fs.rm(earlier)
            self.fs.rm(where, recursive=True)
        except FileNotFoundError:
            return
        except Exception as e:
            raise StoreUnavailable(f"can't remove {self.url}/{path}: {e}.") from e
