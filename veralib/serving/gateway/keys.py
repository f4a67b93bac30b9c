"""API keys: one small file each in the state folder, which holds a hash of the key and never the key.

    STATE/keys/<id>.json    {"id", "prefix", "admin", "sha256", "created", "note"}

A key is sk-vera-<id>-<256 random bits>. Plain SHA-256 is the right hash for it: slow hashes protect what people make up, and
nobody tries 2^256 keys; here a slow one would only let anybody keep the gateway busy with wrong keys. Files are never
changed, so a look at the folder's time of change tells whether keys came or went.
"""

import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from ...errors import ConfigError, unknown_name
from .tenants import PREFIX, Tenant

LOG = logging.getLogger("veralib.gateway")
_KEY = re.compile(r"sk-vera-([0-9a-f]{12})-([A-Za-z0-9_-]{43})")
_SETTLED_NS = 2_000_000_000
"""A folder changed less than so long ago is read again: two changes may lie within one tick of its clock."""


@dataclass(frozen=True)
class KeyRecord:
    """What is known of one key."""

    id: str
    prefix: str
    admin: bool
    sha256: str
    created: int
    """Seconds since 1970."""
    note: str = ""

    @property
    def tenant(self) -> Tenant:
        return Tenant(self.id, self.prefix, self.admin)


class Keys:
    """The keys of a state folder, as they are now: find, add, list, revoke. Safe for threads and processes."""

    def __init__(self, state: str | os.PathLike[str]) -> None:
        self.folder = Path(state) / "keys"
        try:
            for folder in (Path(state), self.folder):  # chats lie beside the keys: mkdir's mode is not that of its parents
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as e:
            raise ConfigError(f"can't make the folder {self.folder}: {e.strerror or e}.") from e
        self._known: dict[str, KeyRecord] = {}
        self._seen: int | None = None
        self._lock = threading.Lock()

    def find(self, key: str) -> Tenant | None:
        """Whose key it is, None where it is nobody's. Costs one look at the folder's time, and a hash."""
        parts = _KEY.fullmatch(key)
        record = self._current().get(parts[1]) if parts else None
        expected = record.sha256 if record is not None else "0" * 64  # the same work for a wrong id
        matches = hmac.compare_digest(_digest(key), expected)
        return record.tenant if record is not None and matches else None

    def holds(self, id: str) -> bool:
        """Whether a key is there now: looked up on the disk, where another process may just have revoked it."""
        return (self.folder / f"{id}.json").exists()

    def add(self, prefix: str | None = None, *, admin: bool = False, note: str = "") -> tuple[str, KeyRecord]:
        """(the key, which can't be had again, and its record). prefix: such as "acme:"; an admin key has none."""
        if admin == (prefix is not None):
            raise ConfigError('a key has either a prefix, such as "acme:", or is an admin key.')
        if prefix is not None and PREFIX.fullmatch(prefix) is None:
            raise ConfigError(
                f'prefix is "{prefix[:80]}", expected letters, digits, ".", "_" or "-", at most 63 and the first a letter or a '
                'digit, and ":" at the end, such as "acme:".'
            )
        id = secrets.token_hex(6)
        key = f"sk-vera-{id}-{secrets.token_urlsafe(32)}"
        record = KeyRecord(id, prefix or "", admin, _digest(key), int(time.time()), note)
        path, temporary = self.folder / f"{id}.json", self.folder / f".{id}.tmp"
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as f:
                json.dump(asdict(record), f)
                f.flush()
                os.fsync(f.fileno())
            os.rename(temporary, path)
        except OSError as e:
            raise ConfigError(f"can't write {path}: {e.strerror or e}.") from e
        return key, record

    def list(self) -> list[KeyRecord]:
        """All of them, by prefix and age."""
        return sorted(self._current().values(), key=lambda r: (r.prefix, r.created, r.id))

    def revoke(self, id: str) -> None:
        """Forgets a key: its next request gets 401, at every gateway on this folder. UnknownName."""
        known = self._current()
        if id not in known:
            raise unknown_name("key", id[:80], sorted(known))
        (self.folder / f"{id}.json").unlink(missing_ok=True)

    def _current(self) -> dict[str, KeyRecord]:
        try:
            changed = os.stat(self.folder).st_mtime_ns
        except FileNotFoundError:
            return {}
        if changed == self._seen:
            return self._known
        with self._lock:
            now = time.time_ns()
            found: dict[str, KeyRecord] = {}
            for path in sorted(self.folder.glob("*.json")):
                id = path.stem
                if (known := self._known.get(id)) is not None:
                    found[id] = known
                elif (record := _read(path)) is not None:
                    found[id] = record
            self._known = found
            self._seen = changed if now - changed > _SETTLED_NS else None
            return found


def _read(path: Path) -> KeyRecord | None:
    """None where it was revoked meanwhile, and where it is damaged: one bad file shuts nobody else out."""
    try:
        record = KeyRecord(**json.loads(path.read_text()))
        if (
            record.id == path.stem
            and record.sha256.isascii()
            and (record.prefix == "" if record.admin else PREFIX.fullmatch(record.prefix))
        ):
            return record
        why = f"id {record.id!r}, prefix {record.prefix!r}"
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError, OSError) as e:
        why = str(e)
    LOG.warning("%s is no key's record and counts for nothing: %s. Remove it, and make a new key for its owner.", path, why)
    return None


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
