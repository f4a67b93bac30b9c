"""Index: the SQLite file of a packed store, which knows where each record lies. One writer at a time, any number of readers."""

import contextlib
import fcntl
import os
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import StoreError, StoreUnavailable

_TABLES = """
CREATE TABLE IF NOT EXISTS adapters(
    name BLOB NOT NULL, version INTEGER NOT NULL, segment INTEGER NOT NULL, place INTEGER NOT NULL, length INTEGER NOT NULL,
    PRIMARY KEY(name, version)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS segments(number INTEGER PRIMARY KEY, size INTEGER NOT NULL, dead INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS configurations(digest BLOB PRIMARY KEY, text BLOB NOT NULL) WITHOUT ROWID;
"""


class Index:
    """Of the store in a folder. Every thread and every forked process has a connection of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._local = threading.local()

    def close(self) -> None:
        """This thread's connection; the next question opens another."""
        if (connection := getattr(self._local, "connection", None)) is not None:
            connection.close()
            del self._local.connection

    def ask(self, query: str, *values: Any) -> list[Any]:
        """The rows."""
        try:
            return self._connection().execute(query, values).fetchall()
        except sqlite3.Error as e:
            raise _error(f"the index of {self.root} can't be read: {e}", e) from e

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[sqlite3.Connection]:
        """One writer at a time, over all threads and processes, in one transaction."""
        try:
            lock = open(self.root / "lock", "ab")  # noqa: SIM115
        except OSError as e:
            raise StoreUnavailable(f"can't write {self.root / 'lock'}: {e.strerror or e}.") from e
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            connection = self._connection()
            try:
                connection.execute("BEGIN IMMEDIATE")
                yield connection
                connection.execute("COMMIT")
            except sqlite3.Error as e:
                with contextlib.suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
                raise _error(f"the index of {self.root} failed: {e}. What was there before is unchanged", e) from e
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
                raise

    def _connection(self) -> sqlite3.Connection:
        """This thread's."""
        if getattr(self._local, "connection", None) is None or self._local.process != os.getpid():
            path = self.root / "index.sqlite"
            try:
                connection = sqlite3.connect(path, timeout=60, isolation_level=None)
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("PRAGMA synchronous=NORMAL")  # the records are the truth, and they are synced
                connection.executescript(_TABLES)
            except sqlite3.Error as e:
                raise _error(f"the index {path} can't be opened: {e}", e) from e
            self._local.connection, self._local.process = connection, os.getpid()
        return self._local.connection


def settle(connection: sqlite3.Connection) -> bool:
    """What the transaction changed so far is on the disk, whatever happens to the machine; False where readers kept it from that.

    An ordinary commit may wait in the index's log, since the records make it good. What no record says may not.
    """
    connection.execute("COMMIT")
    busy = connection.execute("PRAGMA wal_checkpoint(FULL)").fetchone()[0]
    connection.execute("BEGIN IMMEDIATE")
    return not busy


def _error(text: str, e: sqlite3.Error) -> StoreError:
    if isinstance(e, sqlite3.OperationalError):  # locked, full, no permission, no disk
        return StoreUnavailable(f"{text}.")
    return StoreError(f"{text}. Remove it (index.sqlite*), and it is made anew from the data files.")
