"""An owner's name as a file name: any unicode name is legal, none leaves the store, no two meet."""

import hashlib

from ..errors import StoreError

PLAIN = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789-_")
LONGEST = 120  # characters of a key; file systems allow 255 bytes
MAX_NAME = 65_535  # bytes


def encoded(name: str) -> bytes:
    """The name's bytes: UTF-8, and half surrogates, which a Python string may hold, as they are. StoreError."""
    if not isinstance(name, str) or not name:
        raise StoreError(f"an adapter's name is {name!r}, expected a string that isn't empty.")
    raw = name.encode("utf-8", "surrogatepass")
    if len(raw) > MAX_NAME:
        raise StoreError(f"the name {name[:40]!r}… has {len(raw)} bytes, expected at most {MAX_NAME}.")
    return raw


def decoded(raw: bytes) -> str:
    """The name whose bytes these are."""
    return raw.decode("utf-8", "surrogatepass")


def key_of(name: str) -> str:
    """The name in a-z, 0-9, "-", "_" and "=xx" for every other byte; a long one is cut and ends in "~" and its SHA-256.

    Capitals are written as bytes, so names differ where a file system folds case; "/" and "." are too, so none is a path.
    """
    raw = encoded(name)
    key = "".join(chr(c) if c in PLAIN else f"={c:02x}" for c in raw)
    return key if len(key) <= LONGEST else f"{key[:60]}~{hashlib.sha256(raw).hexdigest()[:48]}"


def shard_of(name: str) -> str:
    """The folder that a name lies in, one of 256: a folder of a million entries is slow on many file systems."""
    return hashlib.sha256(encoded(name)).hexdigest()[:2]
