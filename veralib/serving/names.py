"""What an adapter is called: NAME by clients, NAME@VERSION-MARK by the engines, so that no two versions share anything there."""

import hashlib
import re

from ..errors import StoreError
from ..store import Store

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
_ENGINE_NAME = re.compile(rf"({NAME.pattern})@(\d{{1,18}})-([0-9a-f]{{12}})")


def is_name(name: object) -> bool:
    """Whether a client may call an adapter so: ASCII letters, digits, ".", "_", ":" and "-", at most 128, no "/" and no "@"."""
    return isinstance(name, str) and NAME.fullmatch(name) is not None


def engine_name(store: Store, name: str) -> str:
    """The engine's name of the version that is current in the store. UnknownName."""
    stamp = store.stamp(name)  # first: where a put comes between the two, the mark is an old one and is asked for again
    return f"{name}@{store.current(name)}-{_mark(stamp)}"


def parse_engine_name(name: str) -> tuple[str, int, str]:
    """(name, version, mark) of an engine's name. StoreError where it is none."""
    found = _ENGINE_NAME.fullmatch(name)
    if found is None:
        raise StoreError(f'"{name[:200]}" names no version of an adapter, expected NAME@VERSION-MARK.')
    return found[1], int(found[2]), found[3]


def _mark(stamp: object) -> str:
    return hashlib.sha256(repr(stamp).encode()).hexdigest()[:12]
