"""An adapter as two pieces: its configuration, which thousands share and a store keeps once, and the payload of its own.

A configuration is what an adapter file says besides its vectors' values: config, basis, base model, and every tensor's name
and shape. The payload is the tensors' bytes, the vectors first.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..adapter import Adapter
from ..container import DTYPES, Contents, canonical, parse
from ..errors import StoreError
from ..header import Header, assemble, header_of, metadata_of

Precision = Literal["float32", "bfloat16", "int8"]
VECTOR_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "int8": 1}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PER_RECORD = ("notes", "checksum", "library")  # of a file's metadata: they differ from adapter to adapter


@dataclass(frozen=True, eq=False)
class Configuration:
    """What many adapters of a store share. text: as stored; digest: its hash, 16 bytes."""

    text: bytes
    digest: bytes
    header: Header
    vectors: tuple[tuple[str, int], ...]
    """(tensor name, length) of every d and b, in payload order."""
    others: tuple[tuple[str, str, tuple[int, ...]], ...]
    """(name, dtype by safetensors' name, shape) of biases and module tensors."""
    stored: Mapping[str, Tensor]
    """basis.A and basis.B where they can't be grown from a seed."""
    precision: Precision

    @property
    def payload_bytes(self) -> int:
        entries = sum(n for _, n in self.vectors)
        scales = 4 * len(self.vectors) if self.precision == "int8" else 0
        return entries * VECTOR_BYTES[self.precision] + scales + sum(_bytes_of(d, s) for _, d, s in self.others)


def _bytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * DTYPES[dtype].itemsize


def configuration_of(adapter: Adapter, precision: Precision = "float32") -> Configuration:
    """The configuration of an adapter. Asked for one like the last few, it answers from memory."""
    global _recent
    shapes = tuple((unit, len(d), len(b)) for unit, (d, b) in adapter.vectors.items())
    rest = tuple((name, t.dtype, tuple(t.shape)) for name, t in _others(adapter).items())
    key = (precision, adapter.config, adapter.basis, adapter.base, adapter.layer_ids, shapes, rest)
    for known, found in _recent:
        if known == key:
            return found
    made = _configuration(adapter, precision)
    _recent = [(key, made), *_recent[:7]]
    return made


_recent: list[tuple[tuple, Configuration]] = []


def _others(adapter: Adapter) -> dict[str, Tensor]:
    out = {f"{layer}.bias": bias for layer, bias in adapter.biases.items()}
    return out | {f"module.{name}.{key}": t for name, state in adapter.modules.items() for key, t in state.items()}


def _configuration(adapter: Adapter, precision: Precision) -> Configuration:
    metadata = {k: v for k, v in metadata_of(adapter).items() if k not in _PER_RECORD}
    vectors = [[f"{unit}.{part}", len(t)] for unit, pair in adapter.vectors.items() for part, t in zip("db", pair, strict=True)]
    others = [[name, _NAMES[t.dtype], list(t.shape)] for name, t in _others(adapter).items()]
    pair = adapter.basis.stored
    stored = [] if pair is None else [["basis.A", list(pair.A.shape)], ["basis.B", list(pair.B.shape)]]
    parts = {"metadata": metadata, "precision": precision, "vectors": vectors, "others": others, "stored": stored}
    text = canonical(parts).encode() + b"\n"
    for t in () if pair is None else (pair.A, pair.B):
        text += t.contiguous().numpy().tobytes()
    return read_configuration(text, "the configuration")


def read_configuration(text: bytes, where: str) -> Configuration:
    """A configuration from its bytes. StoreError where they aren't one."""
    line, _, raw = bytes(text).partition(b"\n")
    try:
        parts = parse(line.decode())
        metadata = dict(parts["metadata"]) | {"notes": "{}", "checksum": "", "library": "veralib"}
        vectors = tuple((name, int(length)) for name, length in parts["vectors"])
        others = tuple((name, dtype, tuple(shape)) for name, dtype, shape in parts["others"])
        stored, at = {}, 0
        for name, shape in parts["stored"]:
            size = 4 * math.prod(shape)
            stored[name] = torch.frombuffer(bytearray(raw[at : at + size]), dtype=torch.float32).view(shape)
            at += size
        if at != len(raw) or parts["precision"] not in VECTOR_BYTES:
            raise ValueError("its length or precision")
        header = header_of(Contents(where, metadata, {}, torch.empty(0, dtype=torch.uint8), 0))
    except (KeyError, TypeError, ValueError, UnicodeDecodeError) as e:
        raise StoreError(f"{where} is no configuration of adapters, or a damaged one: {e}.") from e
    return Configuration(text, digest_of(text), header, vectors, others, stored, parts["precision"])


def digest_of(text: bytes) -> bytes:
    """The name of a configuration."""
    return hashlib.sha256(text).digest()[:16]


def encode(adapter: Adapter, configuration: Configuration) -> bytes:
    """The payload. StoreError for NaN or inf, and for a vector that overflows the precision."""
    flat = torch.cat([t.float() for pair in adapter.vectors.values() for t in pair]) if adapter.vectors else torch.empty(0)
    if not torch.isfinite(flat).all():
        raise StoreError("the adapter's vectors hold NaN or inf, so it wasn't stored: its training diverged. Lower the rate.")
    if configuration.precision == "bfloat16":
        low = flat.bfloat16()
        if not torch.isfinite(low).all():
            raise StoreError(
                f"the adapter's largest entry is {flat.abs().max():g}, more than bfloat16 can say, so it wasn't stored: use a "
                "float32 store, or lower the learning rate."
            )
        body = low.view(torch.int16).numpy().tobytes()
    elif configuration.precision == "int8":
        body = b"".join(t.numpy().tobytes() for t in _to_int8(flat, [n for _, n in configuration.vectors]))
    else:
        body = flat.numpy().tobytes()
    return body + b"".join(t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in _others(adapter).values())


def _to_int8(flat: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """One scale a vector, |largest| / 127, float32, then the rounded entries."""
    parts = flat.split(lengths)
    scales = torch.stack([p.abs().max() / 127 if len(p) else p.new_zeros(()) for p in parts])
    spread = scales.clamp(min=torch.finfo(torch.float32).tiny).repeat_interleave(torch.tensor(lengths))
    return scales, (flat / spread).round().to(torch.int8)


def decode(payload: bytes | memoryview, configuration: Configuration, notes: Mapping[str, str], where: str) -> Adapter:
    """The adapter again, d and b float32 views of one block. StoreError where the length or a value is wrong."""
    if len(payload) != configuration.payload_bytes:
        raise StoreError(f"{where} is damaged: a payload of {len(payload)} bytes, expected {configuration.payload_bytes}.")
    lengths = [n for _, n in configuration.vectors]
    entries = sum(lengths)
    data = bytearray(payload)
    raw = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    size = entries * VECTOR_BYTES[configuration.precision]
    if configuration.precision == "int8":
        scales = raw[: 4 * len(lengths)].view(torch.float32)
        flat = raw[4 * len(lengths) : 4 * len(lengths) + size].view(torch.int8).float()
        flat *= scales.repeat_interleave(torch.tensor(lengths))
        size += 4 * len(lengths)
    elif configuration.precision == "bfloat16":
        flat = raw[:size].view(torch.bfloat16).float()
    else:
        flat = raw[:size].view(torch.float32)
    # A sum is finite only where every term is; where huge ones overflow it, look at each.
    if not math.isfinite(flat.sum()) and not torch.isfinite(flat).all():
        raise StoreError(f"{where} holds NaN or inf.")
    tensors = dict(zip((name for name, _ in configuration.vectors), flat.split(lengths), strict=True))
    for name, dtype, shape in configuration.others:
        end = size + _bytes_of(dtype, shape)
        tensors[name] = raw[size:end].clone().view(DTYPES[dtype]).view(shape)
        size = end
    adapter = assemble(configuration.header, tensors | dict(configuration.stored))
    return adapter if not notes else _with_notes(adapter, notes)


def _with_notes(adapter: Adapter, notes: Mapping[str, str]) -> Adapter:
    object.__setattr__(adapter, "notes", dict(notes))  # fresh from assemble: nobody else has it
    return adapter
