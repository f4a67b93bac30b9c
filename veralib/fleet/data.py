"""The rows of a fleet by owner: from a data set with an owner column, or a folder with one file an owner."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DataError, VeraError, nearest
from ..store.names import key_of, shard_of
from ..training.chats import chat_columns
from ..training.data import Row, load_rows
from ..training.rows import file_kind, read_rows
from ..training.settings import Settings
from ..training.tokens import encode
from .batches import Example, OwnerData
from .settings import FleetSettings


@dataclass(frozen=True)
class OwnerRows:
    """Rows by owner, in the order in which owners appear. unusable: owner -> why it can't train."""

    rows: Mapping[str, Sequence[Row]]
    unusable: Mapping[str, str] = field(default_factory=dict)


def read_owners(settings: FleetSettings) -> OwnerRows:
    """The rows that the settings name, by owner. DataError where there is no owner column, or nothing at all."""
    folder = Path(settings.data[0]).expanduser() if len(settings.data) == 1 else None
    if folder is not None and folder.is_dir():
        return _read_folder(folder)
    single = settings.row_settings()
    rows = load_rows(single)
    there = list(rows[0])
    if settings.owner not in there:
        raise DataError(
            f'{", ".join(settings.data)} has no owner column "{settings.owner}".{nearest(settings.owner, there)} Columns there: '
            f"{', '.join(map(str, there))}. Name yours with owner, or give a folder with one file for each owner."
        )
    if single.task == "chat":
        chat_columns(rows[0], single.text, ", ".join(settings.data))
    elif missing := next((c for c in single.text_columns if c not in there), None):
        raise DataError(
            f'{", ".join(settings.data)} has no column "{missing}".{nearest(missing, there)} Columns there: '
            f"{', '.join(map(str, there))}. Name yours with text."
        )
    _check_mark(settings, rows)
    found: dict[str, list[Row]] = {}
    nameless = 0
    for row in rows:
        owner = row.get(settings.owner)
        if owner is None or str(owner) == "":
            nameless += 1
        else:
            found.setdefault(str(owner), []).append(row)
    if not found:
        raise DataError(f'no row of {", ".join(settings.data)} names an owner in column "{settings.owner}".')
    return OwnerRows(found, {"": f"{nameless} rows name no owner"} if nameless else {})


def _check_mark(settings: FleetSettings, rows: Sequence[Row]) -> None:
    """DataError where no row at all has the column that marks held-out rows; a row of JSON may go without."""
    column, there = settings.held_out_column, dict[str, None]()
    if column is not None and not any(column in row for row in rows):
        for row in rows:
            there |= dict.fromkeys(map(str, row))
        raise DataError(
            f'no row of {", ".join(settings.data)} has the column "{column}".{nearest(column, list(there))} Columns there: '
            f"{', '.join(there)}. Name the one that marks held-out rows with held_out_column."
        )


def _read_folder(folder: Path) -> OwnerRows:
    found: dict[str, Path] = {}
    files = [p for p in sorted(folder.iterdir()) if p.is_file() and file_kind(p)]
    if not files:
        raise DataError(f"{folder} has no files of rows: expected one csv, tsv, jsonl or txt file for each owner.")
    for path in files:
        owner = path.name.removesuffix(".gz").removesuffix(".xz").rpartition(".")[0]
        if owner in found:
            raise DataError(f'{folder} has two files for the owner "{owner}": keep one, or put both into one file.')
        found[owner] = path
    return OwnerRows(_Files(found))


class _Files(Mapping[str, Sequence[Row]]):
    """A file's rows for each owner, read when they are asked for: so memory doesn't grow with the number of owners."""

    def __init__(self, paths: Mapping[str, Path]) -> None:
        self.paths = paths

    def __getitem__(self, owner: str) -> Sequence[Row]:
        return read_rows(self.paths[owner])

    def __iter__(self) -> Iterator[str]:
        return iter(self.paths)

    def __len__(self) -> int:
        return len(self.paths)


def owner_data(
    name: str,
    rows: Sequence[Row],
    tokenizer: Any,
    settings: FleetSettings,
    single: Settings,
    longest: int,
    labels: Sequence[str] = (),
) -> OwnerData:
    """One owner's examples, some of them held out: those of marked rows (held_out_column), else by a hash of the example.
    DataError where no row can be learned.

    So an example that trained once isn't held out later, when rows have joined. A text longer than max_length becomes several
    examples; they are what is drawn then, for a text may be the only row.
    """
    marked = [settings.held_out_column is not None and _is_marked(row.get(settings.held_out_column), name) for row in rows]
    if any(marked):
        parts = [[row for row, m in zip(rows, marked, strict=True) if m is which] for which in (False, True)]
        if not parts[0]:
            raise DataError(f'every row of owner "{name}" is marked as held out: there is none to learn from')
        where = f'the rows of owner "{name}"', f'the held-out rows of owner "{name}"'
        return OwnerData(name, *(encode(p, tokenizer, single, labels, longest, w) for p, w in zip(parts, where, strict=True)))
    examples: list[Example] = list(encode(rows, tokenizer, single, labels, longest, f'the rows of owner "{name}"'))
    seen: Counter[str] = Counter()
    picked = _held_out([_place(settings.seed, name, e, seen) for e in examples], settings.held_out)
    return OwnerData(
        name,
        [e for i, e in enumerate(examples) if i not in picked],
        [e for i, e in enumerate(examples) if i in picked],
    )


def _is_marked(value: Any, name: str) -> bool:
    if isinstance(value, str):
        value = {"": False, "0": False, "false": False, "1": True, "true": True}.get(value.strip().lower(), value)
    if value not in (None, True, False):
        raise DataError(f'the mark of a held-out row of owner "{name}" is {str(value)[:40]!r}, expected true, false, 1 or 0')
    return bool(value)


def _place(seed: int, name: str, example: Example, seen: Counter[str]) -> float:
    """A number from 0 to 1 that follows from the owner and the example alone, and from how often it came before."""
    text = repr((seed, name, example["input_ids"], example["labels"]))
    seen[text] += 1
    text += str(seen[text])
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:6], "big") / 2**48


def _held_out(places: Sequence[float], share: float) -> set[int]:
    """The examples below `share`: at least the lowest where there are two, never all."""
    if not share or len(places) < 2:
        return set()
    picked = {i for i, place in enumerate(places) if place < share} or {min(range(len(places)), key=places.__getitem__)}
    if len(picked) == len(places):
        picked.discard(max(picked, key=places.__getitem__))
    return picked


def prepare(
    owners: OwnerRows,
    names: Sequence[str],
    tokenizer: Any,
    settings: FleetSettings,
    longest: int,
    unusable: dict[str, str],
    labels: Sequence[str] = (),
) -> Iterator[OwnerData]:
    """The named owners' data, one after another as slots ask for them; who has no usable row is noted in `unusable`."""
    single = settings.row_settings()
    for name in names:
        try:
            yield owner_data(name, owners.rows[name], tokenizer, settings, single, longest, labels)
        except VeraError as e:
            unusable[name] = str(e)


# Kept rows: OUTPUT/data/<shard>/<key>.jsonl, the owner's name in the first line


def kept_file(output: Path, name: str) -> Path:
    """Where an owner's rows are kept."""
    return output / "data" / shard_of(name) / f"{key_of(name)}.jsonl"


def keep_rows(output: Path, name: str, rows: Sequence[Row]) -> None:
    """Writes an owner's rows, in place of those kept before. DataError where the disk won't have them."""
    path = kept_file(output, name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        with open(partial, "w", encoding="utf-8", errors="surrogatepass") as f:
            f.write(json.dumps({"owner": name}) + "\n")
            f.writelines(json.dumps(dict(row), ensure_ascii=False, default=str) + "\n" for row in rows)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except OSError as e:
        raise DataError(f'can\'t keep the rows of owner "{name}" in {path}: {e.strerror or e}.') from e


def kept_rows(output: Path, name: str) -> list[dict[str, Any]]:
    """An owner's kept rows; empty where none were kept."""
    path = kept_file(output, name)
    if not path.exists():
        return []
    with open(path, encoding="utf-8", errors="surrogatepass") as f:
        return [json.loads(line) for line in f][1:]


def all_kept(output: Path) -> OwnerRows:
    """Every owner's kept rows."""
    found: dict[str, Sequence[Row]] = {}
    for path in sorted((output / "data").glob("*/*.jsonl")):
        with open(path, encoding="utf-8", errors="surrogatepass") as f:
            lines = [json.loads(line) for line in f]
        found[lines[0]["owner"]] = lines[1:]
    if not found:
        raise DataError(f"{output} keeps no rows of its owners (keep_data): name the data again with data.")
    return OwnerRows(found)
