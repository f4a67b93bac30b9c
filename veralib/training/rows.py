"""Rows of one file: csv, tsv, jsonl, json, txt.

csv has a header and quotes; tsv has a header and no quoting at all (GLUE's convention); jsonl has one object a line; txt is one
document, for causal-lm. Each may be compressed (.gz, .xz). Every fault is a DataError that names the file and the line.
"""

import csv
import gzip
import json
import lzma
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from ..errors import DataError

KINDS = ("csv", "tsv", "jsonl", "json", "txt")


def read_rows(path: str | Path, columns: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The rows of one file, as dicts; `columns` names the fields of a csv or tsv file that has no header."""
    path = Path(path)
    kind = file_kind(path)
    if kind is None:
        raise DataError(f"{path} is of no known kind; expected one of {', '.join('.' + k for k in KINDS)} (also .gz, .xz)")
    try:
        with _open(path) as f:
            rows = list(_READERS[kind](f, path, tuple(columns)))
    except OSError as e:
        raise DataError(f"can't read {path}: {e.strerror or e}") from e
    except (UnicodeDecodeError, lzma.LZMAError, EOFError) as e:
        raise DataError(f"{path} isn't UTF-8 text, or its compression is damaged: {e}") from e
    if not rows:
        raise DataError(f"{path} is empty: it holds no rows{'' if kind == 'txt' or columns else ' after the header'}")
    return rows


def file_kind(path: str | Path) -> str | None:
    """csv, tsv, jsonl, json or txt by the file's name, .gz and .xz aside; None for anything else."""
    parts = Path(path).name.lower().split(".")
    if parts[-1] in ("gz", "xz"):
        parts = parts[:-1]
    kind = parts[-1] if len(parts) > 1 else ""
    kind = {"text": "txt", "ndjson": "jsonl"}.get(kind, kind)
    return kind if kind in KINDS else None


def _open(path: Path) -> IO[str]:
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix.lower(), open)
    # utf-8-sig: MRPC's files begin with a byte order mark. newline: a lone \r is text, and csv wants line ends untouched.
    return opener(path, "rt", encoding="utf-8-sig", newline="" if file_kind(path) == "csv" else "\n")  # type: ignore[operator]


def _read_csv(f: IO[str], path: Path, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(f)
    yield from _named(((reader.line_num, fields) for fields in reader if fields), path, columns)


def _read_tsv(f: IO[str], path: Path, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    lines = ((n, line.rstrip("\r\n")) for n, line in enumerate(f, 1))
    yield from _named(((n, line.split("\t")) for n, line in lines if line), path, columns)


def _named(lines: Iterable[tuple[int, list[str]]], path: Path, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    names: Sequence[str] = columns
    for number, fields in lines:
        if not names:
            names = [name.strip() for name in fields]
            continue
        if len(fields) != len(names):
            hint = "" if columns else " Has the file a header? Name its columns with columns if it hasn't."
            raise DataError(f"{path}, line {number} has {len(fields)} fields, expected {len(names)}: {', '.join(names)}.{hint}")
        yield dict(zip(names, fields, strict=True))


def _read_jsonl(f: IO[str], path: Path, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(f, 1):
        if line.strip():
            yield _object(_json(line, f"{path}, line {number}"), f"{path}, line {number}")


def _read_json(f: IO[str], path: Path, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    value = _json(f.read(), str(path))
    if not isinstance(value, list):
        raise DataError(f"{path} holds a {type(value).__name__}, expected a list of objects")
    for number, item in enumerate(value, 1):
        yield _object(item, f"{path}, item {number}")


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise DataError(f"{where} is no JSON: {e.msg} at character {e.pos}") from e


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where} is a {type(value).__name__}, expected an object with a field for each column")
    return value


def _read_txt(f: IO[str], path: Path, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    text = f.read()
    if text.strip():
        yield {"text": text}


_READERS = {"csv": _read_csv, "tsv": _read_tsv, "jsonl": _read_jsonl, "json": _read_json, "txt": _read_txt}
