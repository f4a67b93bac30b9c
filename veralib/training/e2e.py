"""The E2E NLG data (Novikova et al., 2017; CC BY-SA 4.0) as rows of prompts and completions.

A meaning representation is written as Hu et al. (2021) write it: name[Blue Spice], eatType[coffee shop], area[city centre]
becomes the prompt "name : Blue Spice | Type : coffee shop | area : city centre||"; the completion is a space and the reference.
Theirs is a tokenised copy of the data ("£ 30", a space before each full stop); this is the official release, only its runs of
spaces made one.
"""

import csv
import hashlib
import io
import json
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError, nearest

FILES = {"train": "trainset.csv", "validation": "devset.csv", "test": "testset_w_refs.csv"}
ATTRIBUTES = {
    **{"name": "name", "eatType": "Type", "food": "food", "priceRange": "price", "customer rating": "customer rating"},
    **{"area": "area", "familyFriendly": "family friendly", "near": "near"},
}
END = "||"
SLOT = r"([^\[\],]+)\[([^\]]*)\]"
WHERE = "Get e2e-dataset.zip from the releases of github.com/tuetschek/e2e-dataset."

Row = dict[str, Any]


def prompt_of(mr: str) -> str:
    """The prompt of a meaning representation; DataError where it isn't attribute[value], attribute[value] …"""
    if not re.fullmatch(f"{SLOT}(,{SLOT})*", mr.strip()):
        raise DataError(f'"{mr}" is no meaning representation, expected attribute[value], attribute[value] …')
    parts = []
    for name, value in ((n.strip(), " ".join(v.split())) for n, v in re.findall(SLOT, mr)):
        if name not in ATTRIBUTES:
            raise DataError(f'"{mr}" has the attribute "{name}".{nearest(name, ATTRIBUTES)} Known: {", ".join(ATTRIBUTES)}.')
        parts.append(f"{ATTRIBUTES[name]} : {value}")
    return " | ".join(parts) + END


def is_release(path: str | Path) -> bool:
    """Whether a path looks like the release: a zip, or a folder with one of its files."""
    path = Path(path)
    return path.suffix == ".zip" or (path.is_dir() and any((path / name).is_file() for name in FILES.values()))


def release_splits(settings: Any) -> Callable[..., Any] | None:
    """A function (role, wanted=None) -> (rows, hashes) over the release, or None where `data` of a run's settings isn't it."""
    path = Path(settings.data[0]).expanduser()
    if settings.task != "prompt-completion" or len(settings.data) != 1 or not path.exists() or not is_release(path):
        return None

    def find(role: str, wanted: str | None = None) -> tuple[list[Row], dict[str, str]] | None:
        own = role == "validation" and settings.test != "validation"  # what the test takes is no validation
        split = settings.split if role == "train" else wanted or ("validation" if own else None)
        if split is None or (wanted is None and role == "validation" and path.is_dir() and not (path / FILES[split]).is_file()):
            return None
        if wanted and Path(wanted).is_file():
            from .data import read_rows

            return read_rows(wanted), {Path(wanted).name: hashlib.sha256(Path(wanted).read_bytes()).hexdigest()}
        if split not in FILES:
            raise DataError(f'the E2E release has no split "{split}", expected {", ".join(FILES)}')
        file = path if path.is_file() else path / FILES[split]
        rows = read_e2e(path, split)
        return rows, {f"{file.name}:{split}": hashlib.sha256(file.read_bytes()).hexdigest()}

    return find


def read_e2e(source: str | Path, split: str) -> list[Row]:
    """The rows of "train", "validation" or "test" of the official release, e2e-dataset.zip or its folder.

    Training and validation: prompt and completion, a row for each reference. Test: a row for each meaning representation, with
    all its references as a list, and the first as completion. Errors: DataError, with the line where it is one's fault.
    """
    name = FILES[split]
    rows = list(_pairs(_text(Path(source), name), f"{name} of {source}"))
    made = [{"prompt": prompt, "completion": " " + reference} for prompt, reference in rows]
    return grouped(made) if split == "test" else made


def grouped(rows: Sequence[Mapping[str, Any]], prompt: str = "prompt", completion: str = "completion") -> list[Row]:
    """A row for each distinct prompt, in the order they come: prompt, completion (the first) and references (all, as a list)."""
    found: dict[str, list[str]] = {}
    for row in rows:
        found.setdefault(str(row[prompt]), []).append(str(row[completion]))
    return [{prompt: p, completion: cs[0], "references": [c.strip() for c in cs]} for p, cs in found.items()]


def prepare(source: str | Path, folder: str | Path) -> dict[str, int]:
    """Writes train.jsonl, validation.jsonl and test.jsonl, the data of a run of task prompt-completion; the rows of each."""
    folder = Path(folder)
    splits = {split: read_e2e(source, split) for split in FILES}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for split, rows in splits.items():
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    except OSError as e:
        raise DataError(f"can't write {folder}: {e.strerror or e}") from e
    return {split: len(rows) for split, rows in splits.items()}


def _text(source: Path, name: str) -> str:
    """The text of one of the release's files."""
    try:
        if source.is_dir():
            there, data = [p.name for p in source.iterdir()], None
            if name in there:
                data = (source / name).read_bytes()
        else:
            with zipfile.ZipFile(source) as archive:
                there = [Path(n).name for n in archive.namelist() if not n.endswith("/")]
                member = next((n for n in archive.namelist() if Path(n).name == name and "__MACOSX" not in n), None)
                data = archive.read(member) if member else None
        if data is not None:
            return data.decode("utf-8-sig")
    except (OSError, zipfile.BadZipFile, UnicodeDecodeError) as e:
        raise DataError(f"can't read {source} as the E2E release: {e}. {WHERE}") from e
    hint = ""
    if name == FILES["test"] and "testset.csv" in there:
        hint = " testset.csv has no references: scores need testset_w_refs.csv, which the full release holds."
    raise DataError(f"{source} has no {name}.{hint} There: {', '.join(sorted(there)) or 'nothing'}. {WHERE}")


def _pairs(text: str, where: str):
    """(prompt, reference) of each line of a csv file with the columns mr and ref."""
    lines = csv.reader(io.StringIO(text))
    names = [name.strip().lower() for name in next(lines, [])]
    missing = [name for name in ("mr", "ref") if name not in names]
    if missing:
        raise DataError(
            f"{where} has no column {' and '.join(missing)}; expected mr and ref, found {', '.join(names) or 'nothing'}"
        )
    mr, ref, empty = names.index("mr"), names.index("ref"), True
    for fields in lines:
        if not fields:
            continue
        at = f"{where}, line {lines.line_num}"
        if len(fields) != len(names):
            raise DataError(f"{at} has {len(fields)} fields, expected {len(names)}: {', '.join(names)}")
        reference = " ".join(fields[ref].split())
        if not reference:
            raise DataError(f"{at} has no reference text")
        try:
            prompt = prompt_of(fields[mr])
        except DataError as e:
            raise DataError(f"{at}: {e}") from e
        empty = False
        yield prompt, reference
    if empty:
        raise DataError(f"{where} holds no rows after the header. {WHERE}")
