"""A safetensors file, read strictly and written whole or not at all (docs/FORMAT.md, "Container").

Stricter than the safetensors library: no trailing bytes, no key twice, and a checksum over everything that has a meaning.
The library reads what write() writes. Only names, types and bytes here; what they mean is header.py's.
"""

import contextlib
import hashlib
import json
import math
import os
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import AdapterFileError

DTYPES = {
    "F64": torch.float64,
    "I64": torch.int64,
    "F32": torch.float32,
    "I32": torch.int32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
SIZES = {name: dtype.itemsize for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # safetensors' own limit
MAX_DIMENSION = 2**40
MAX_DIMENSIONS = 8
AGAIN = "Copy or download the file again."


class Entry(NamedTuple):
    """One tensor of a file: dtype by safetensors' name, shape, and where its bytes lie in the data section."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Contents(NamedTuple):
    """A file that was read: metadata, tensors in the order of their bytes, and the data section (uint8; empty if unread)."""

    file: str
    metadata: dict[str, str]
    entries: dict[str, Entry]
    data: Tensor
    file_bytes: int


def canonical(value: Any) -> str:
    """Canonical JSON: sorted keys, no spaces, ASCII, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def parse(text: str) -> Any:
    """The JSON value in `text`; ValueError also for a key twice, NaN, Infinity, half a surrogate pair or deep nesting."""
    try:
        value = _decoder.decode(text)
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    if "\\ud" in text or "\\uD" in text:  # half a pair is a str that can't be printed or hashed
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f'its JSON has the key "{next(k for k in keys if keys.count(k) > 1)}" twice')
    return out


def _constant(name: str) -> float:
    raise ValueError(f"its JSON holds {name}, which is no JSON number")


_decoder = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def checksum(metadata: Mapping[str, str], entries: Mapping[str, Entry], data: Tensor) -> str:
    """SHA-256, in hex, of all metadata but "checksum", of names, dtypes and shapes, and of the bytes in order of name."""
    names = sorted(entries)
    rest = {k: v for k, v in metadata.items() if k != "checksum"}
    digest = hashlib.sha256(canonical([rest, [[n, entries[n].dtype, entries[n].shape] for n in names]]).encode())
    raw = _bytes(data)
    begin = end = 0
    for name in names:  # neighbours in one go: 112 calls took as long as the hash itself
        entry = entries[name]
        if entry.begin != end:
            digest.update(raw[begin:end])
            begin = entry.begin
        end = entry.end
    digest.update(raw[begin:end])
    return digest.hexdigest()


def _bytes(data: Tensor) -> memoryview:
    return data.numpy().data


def read(file: str, with_data: bool = True, only_with: str | None = None) -> Contents:
    """The contents of a safetensors file, every rule of the container checked, the checksum not. AdapterFileError.

    only_with: where the metadata lacks this key, the data isn't read: a base model given by mistake has gigabytes.
    """
    try:
        if not stat.S_ISREG(os.stat(file).st_mode):
            raise AdapterFileError(f"{file} is no regular file. Give the path of an adapter file or of its folder.")
        with open(file, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            start = f.read(8)
            length = int.from_bytes(start, "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise AdapterFileError(_no_safetensors(file, size, start, length))
            header = f.read(length)
            space = size - 8 - length
            metadata, entries = _parse_header(file, header, space)
            with_data = with_data and (only_with is None or only_with in metadata)
            data = torch.empty(space if with_data else 0, dtype=torch.uint8)
            if with_data and f.readinto(_bytes(data)) != space:
                raise AdapterFileError(f"{file} shrank while it was read. Wait until it's written, and load it again.")
    except (OSError, ValueError) as e:  # ValueError: a zero byte in the path
        raise AdapterFileError(f"can't read {file}: {getattr(e, 'strerror', None) or e}.") from e
    return Contents(file, metadata, entries, data, size)


def _no_safetensors(file: str, size: int, start: bytes, length: int) -> str:
    if size == 0:
        return f"{file} is empty. {AGAIN}"
    if start == b"version ":
        return f"{file} is a Git LFS pointer, not the file itself. Fetch it: git lfs pull."
    if size < 8 or length <= MAX_HEADER:
        return f"{file} is truncated: it has {size} bytes, and its header alone takes {8 + length}. {AGAIN}"
    return f"{file} is no safetensors file: its first 8 bytes, {start!r}, are no header length. Give an adapter file."


def _parse_header(file: str, raw: bytes, space: int) -> tuple[dict[str, str], dict[str, Entry]]:
    try:
        if raw[:1] != b"{":
            raise ValueError("its header is no JSON object")
        table = parse(raw.decode())
        metadata = table.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise ValueError("its __metadata__ isn't text by text")
        found = [(name, _entry(name, fields)) for name, fields in table.items()]
    except ValueError as e:
        raise AdapterFileError(f"{file} is damaged, or no safetensors file: {e}. {AGAIN}") from e
    found.sort(key=lambda item: item[1][2:])
    at = 0
    for name, entry in found:
        if entry.begin != at:
            raise AdapterFileError(
                f'{file} is damaged: "{name}" begins at byte {entry.begin} of the data, expected {at}. {AGAIN}'
            )
        at = entry.end
    if at > space:
        raise AdapterFileError(f"{file} is truncated: it holds {space} of {at} bytes of data. {AGAIN}")
    if at < space:
        raise AdapterFileError(f"{file} is damaged: {space - at} bytes follow the last tensor. {AGAIN}")
    return metadata, dict(found)


def _entry(name: str, fields: Any) -> Entry:
    try:
        dtype, shape, (begin, end) = fields["dtype"], fields["shape"], fields["data_offsets"]
        size = SIZES[dtype]
        for length in shape:
            # type(), as True is an int too; a bound on each, so that no product overflows in another language's reader.
            if type(length) is not int or not 0 <= length <= MAX_DIMENSION:
                raise ValueError
            size *= length
        fits = type(begin) is int and type(end) is int and begin >= 0 and end - begin == size
        if fits and len(fields) == 3 and len(shape) <= MAX_DIMENSIONS:
            return Entry(dtype, tuple(shape), begin, end)
    except (KeyError, TypeError, ValueError):
        pass
    raise ValueError(
        f'the entry of "{name}" is {fields!r:.150}, expected dtype (one of {", ".join(SIZES)}), shape, and data_offsets '
        "that fit both"
    )


def tensors(contents: Contents) -> dict[str, Tensor]:
    """name -> tensor, views of the data section: one split for each run of one dtype, not one slice a tensor."""
    out: dict[str, Tensor] = {}
    for dtype, group in groupby(contents.entries.items(), key=lambda item: item[1].dtype):
        run = list(group)
        raw = contents.data[run[0][1].begin : run[-1][1].end]
        if run[0][1].begin % SIZES[dtype]:
            raw = raw.clone()  # other software may have put it at an address that the dtype can't have
        if dtype == "BOOL" and raw.numel() and int(raw.max()) > 1:
            raise AdapterFileError(f"{contents.file} is damaged: a BOOL tensor holds bytes besides 0 and 1. {AGAIN}")
        parts = raw.view(DTYPES[dtype]).split([math.prod(entry.shape) for _, entry in run])
        for (name, entry), part in zip(run, parts, strict=True):
            out[name] = part if len(entry.shape) == 1 else part.view(entry.shape)
    return out


def write(file: str, metadata: Mapping[str, str], named: Mapping[str, Tensor], check: Callable[[Contents], object]) -> None:
    """Writes the file, "checksum" added to the metadata: the whole file or, where that fails, nothing. AdapterFileError.

    The same input gives the same bytes. Widest dtype first, then by name: so every tensor is aligned. check: raises where
    it couldn't use what a reader of the file will see; the old file then stays.
    """
    if sys.byteorder != "little":
        raise AdapterFileError("adapter files are little-endian, and this machine isn't: use another one.")
    entries, chunks, at = {}, [], 0
    for name in sorted(named, key=lambda n: (-named[n].element_size(), NAMES[named[n].dtype], n)):
        raw = named[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        entries[name] = Entry(NAMES[named[name].dtype], tuple(named[name].shape), at, at + raw.numel())
        chunks.append(raw)
        at += raw.numel()
    data = torch.cat(chunks) if chunks else torch.empty(0, dtype=torch.uint8)
    table: dict[str, Any] = {"__metadata__": {**metadata, "checksum": checksum(metadata, entries, data)}}
    for name, entry in entries.items():
        table[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [entry.begin, entry.end]}
    header = canonical(table).encode()
    header += b" " * (-len(header) % 8)
    check(Contents(file, *_parse_header(file, header, at), data, 8 + len(header) + at))
    with _replacing(file) as f:
        f.write(len(header).to_bytes(8, "little") + header)
        f.write(_bytes(data))


@contextlib.contextmanager
def _replacing(file: str) -> Iterator[Any]:
    """A file open for writing that takes the place of `file` when the block ends, or leaves no trace."""
    folder, name = os.path.split(os.path.abspath(file))
    # Not tempfile's, which only the owner may read whatever the umask says.
    scratch = os.path.join(folder, f".{name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    try:
        os.makedirs(folder, exist_ok=True)
        try:
            with open(scratch, "xb") as f:
                yield f
                f.flush()
                os.fsync(f.fileno())
            os.replace(scratch, file)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(scratch)
            raise
    except (OSError, ValueError) as e:
        kept = "The old file is as it was" if os.path.isfile(file) else "Nothing was written"
        raise AdapterFileError(
            f"can't write {file}: {getattr(e, 'strerror', None) or e}. {kept}; make room or permit writing, or choose "
            "another path."
        ) from e
    with contextlib.suppress(OSError):  # Windows and some network drives can't sync a folder; the file is in place
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
