"""One version of one adapter as bytes: a fixed head, the name, notes, the payload, a checksum. docs/STORE.md."""

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import StoreError
from .names import decoded, encoded

MAGIC = b"VRST"
FORMAT = 1
HEAD = struct.Struct("<4sBBHIIQQ16s")  # magic, format, kind, name, notes, payload bytes, version, milliseconds, configuration
DIGEST = 16
ADAPTER, TOMBSTONE = 0, 1


@dataclass(frozen=True)
class Record:
    """name: the owner. configuration: the hash of what is stored once for all (codec.py); empty in a tombstone."""

    name: str
    version: int
    milliseconds: int
    """Since 1970, when it was put."""
    configuration: bytes = bytes(16)
    notes: Mapping[str, str] = field(default_factory=dict)
    payload: bytes | memoryview = b""
    kind: int = ADAPTER

    def to_bytes(self) -> bytes:
        """The record as it lies in a file."""
        name = encoded(self.name)
        notes = json.dumps(dict(self.notes), sort_keys=True).encode() if self.notes else b""
        head = HEAD.pack(
            MAGIC,
            FORMAT,
            self.kind,
            len(name),
            len(notes),
            len(self.payload),
            self.version,
            self.milliseconds,
            self.configuration,
        )
        body = b"".join((head, name, notes, self.payload))
        return body + hashlib.sha256(body).digest()[:DIGEST]


def length_at(head: bytes | memoryview, where: str) -> int:
    """The whole length of the record that begins with these HEAD.size bytes. StoreError where none does."""
    magic, written, _, name, notes, payload, *_ = HEAD.unpack(head[: HEAD.size])
    if magic != MAGIC:
        raise StoreError(f"{where} holds no adapter record: it begins with {bytes(magic)!r}, expected {MAGIC!r}. It is damaged.")
    if written > FORMAT:
        raise StoreError(
            f"{where} is in store format {written}; this veralib reads up to {FORMAT}. Upgrade: pip install -U veralib."
        )
    return HEAD.size + name + notes + payload + DIGEST


def parse(data: bytes | memoryview, where: str) -> Record:
    """The record in these bytes, its checksum compared; the payload is a view of them. StoreError says `where` it is damaged."""
    if len(data) < HEAD.size + DIGEST:
        raise StoreError(f"{where} is damaged: {len(data)} bytes, expected at least {HEAD.size + DIGEST}.")
    length = length_at(data, where)
    if len(data) != length:
        raise StoreError(f"{where} is damaged: {len(data)} bytes, expected {length}.")
    view = memoryview(data)
    if hashlib.sha256(view[:-DIGEST]).digest()[:DIGEST] != view[-DIGEST:]:
        raise StoreError(f"{where} is damaged: its bytes don't have the checksum that was written. Put the adapter again.")
    _, _, kind, name, notes, payload, version, when, configuration = HEAD.unpack(view[: HEAD.size])
    at = HEAD.size + name
    text = bytes(view[at : at + notes])
    return Record(
        decoded(bytes(view[HEAD.size : at])),
        version,
        when,
        configuration,
        json.loads(text) if text else {},
        view[at + notes : at + notes + payload],
        kind,
    )
