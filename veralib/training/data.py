"""Rows of a data set, from files, folders or the hub. Files need nothing but Python; hub ids need `datasets`."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DataError, nearest, need
from .chats import chat_columns
from .e2e import release_splits
from .rows import file_kind, read_rows
from .sampling import draw_shots, split_off
from .settings import WITH_HEAD, Settings

Row = Mapping[str, Any]
REST = "rest"
"""The test set that is every training row which `shots` leaves."""
VALIDATION_NAMES = ("validation", "valid", "val", "dev")


@dataclass(frozen=True)
class Data:
    """The rows of one run. labels: a classification's names, in the order of their ids."""

    train: Sequence[Row]
    validation: Sequence[Row] | None
    test: Sequence[Row] | None
    labels: tuple[str, ...] = ()
    hashes: Mapping[str, str] = field(default_factory=dict)
    """split/file name -> SHA-256 of the file, or a hub data set's fingerprint; split/images -> of the images in use."""


def load_data(settings: Settings) -> Data:
    """The rows that a run's settings name, checked: columns are there, nothing is empty, validation has no unseen labels."""
    find = _image_splits(settings) or release_splits(settings) or _local_splits(settings) or _hub_splits(settings)
    train, hashes = find("train")
    hashes = {f"train/{k}": v for k, v in hashes.items()}
    held: dict[str, Sequence[Row] | None] = {"validation": None, "test": None}
    for role in held:
        wanted = getattr(settings, role)
        if role == "validation" and settings.share is not None:
            train, held[role] = split_off(train, settings.share, settings.split_seed)
        elif role == "test" and wanted == REST:
            if not settings.shots:
                raise DataError(f'test is "{REST}", the training rows that shots leave: set shots, or name a split')
        elif (found := find(role, wanted)) is not None:
            held[role] = found[0]
            hashes |= {f"{role}/{k}": v for k, v in found[1].items()}
    if settings.shots and train:
        column_values(train, settings.label, "the train data")
        whole, train = train, draw_shots(train, settings.label, settings.shots, settings.split_seed)
        if settings.test == REST:
            drawn = {id(row) for row in train}
            held["test"] = [row for row in whole if id(row) not in drawn]
    labels = _check(settings, train, held)
    if settings.task == "images":
        from .images import check_images

        splits = {"train": train, **held}
        hashes = {f"{role}/images": check_images(rows, settings) for role, rows in splits.items() if rows is not None}
    return Data(train, held["validation"], held["test"], labels, hashes)


def check_there(settings: Settings) -> None:
    """DataError where the data are named as local files, and aren't there; nothing is read."""
    _local_splits(settings)


def load_rows(settings: Settings) -> Sequence[Row]:
    """The training rows that a run's settings name, as they are. DataError where there are none."""
    find = _local_splits(settings) or _hub_splits(settings)
    rows, _ = find("train")
    if not rows:
        raise DataError(f"the train data are empty: {', '.join(settings.data)}")
    return rows


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal text."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def column_values(rows: Sequence[Row], column: str, where: str) -> list[Any]:
    """One column of all rows; DataError names the columns there are, or the first row without a value."""
    if column not in rows[0]:
        there = list(rows[0])
        raise DataError(
            f'{where} has no column "{column}".{nearest(column, there)} Columns there: {", ".join(map(str, there))}. '
            "Name yours with text and label, or with columns where the file has no header."
        )
    for number, row in enumerate(rows, 1):
        if row.get(column) is None:
            raise DataError(f'row {number} of {where} has nothing in column "{column}"')
    return [row[column] for row in rows]


def _image_splits(settings: Settings):
    """The same over images, or None for a task of texts."""
    if settings.task != "images":
        return None
    from .images import image_splits

    return image_splits(settings)


def _local_splits(settings: Settings):
    """A function (role, wanted=None) -> (rows, hashes) over local files, or None where `data` is no local path."""
    paths = [Path(p).expanduser() for p in settings.data]
    folder = paths[0] if len(paths) == 1 and paths[0].is_dir() else None
    if folder is None:
        if len(paths) == 1 and not paths[0].exists() and file_kind(paths[0]) is None and not pathlike(settings.data[0]):
            return None
        for path in paths:
            if not path.is_file():
                raise DataError(f"there is no data file {path} (now in {Path.cwd()})")

    def split_file(name: str) -> Path | None:
        assert folder is not None
        found = [p for p in sorted(folder.iterdir()) if file_kind(p) and p.name.split(".")[0] == name]
        if len(found) > 1:
            raise DataError(f"{folder} has {len(found)} files for split {name}: {', '.join(p.name for p in found)}; name one")
        return found[0] if found else None

    def tested(name: str, file: Path) -> bool:
        """Whether the test takes it, which then is no validation."""
        test = settings.test
        return test is not None and (test == name or (Path(test).is_file() and Path(test).samefile(file)))

    def read(files: Sequence[Path]):
        rows = [row for file in files for row in read_rows(file, settings.columns)]
        return rows, {file.name: sha256_file(file) for file in files}

    def find(role: str, wanted: str | None = None):
        if role == "train":
            if folder is None:
                return read(paths)
            file = split_file(settings.split)
            if file is None:
                there = ", ".join(sorted(p.name for p in folder.iterdir())[:12]) or "nothing"
                raise DataError(f"{folder} has no file {settings.split}.csv, .tsv, .jsonl or .txt. There: {there}.")
            return read([file])
        if wanted is None:
            names = VALIDATION_NAMES if role == "validation" and folder else ()
            file = next((f for name in names if (f := split_file(name)) and not tested(name, f)), None)
            return read([file]) if file else None
        if Path(wanted).is_file():
            return read([Path(wanted)])
        if folder and (file := split_file(wanted)):
            return read([file])
        raise DataError(f"{role} is {wanted!r}: there is no such file" + (f", and no such split in {folder}" if folder else ""))

    return find


def pathlike(name: str) -> bool:
    """Whether a name can only be a path, no hub id."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name or name.endswith(".zip")


def _hub_splits(settings: Settings):
    """The same over a hub data set, by the package datasets."""
    name = settings.data[0]
    whole = hub_data(name, settings.data_config)
    import datasets

    def rows_of(split: str):
        part = whole[split]
        rows = part.to_list()
        for column, feature in part.features.items():  # class ids to names, so that labels mean something
            if isinstance(feature, datasets.ClassLabel):
                for row in rows:
                    row[column] = feature.int2str(row[column]) if row[column] is not None and row[column] >= 0 else None
        return rows, {split: part._fingerprint}

    def find(role: str, wanted: str | None = None):
        if role != "train" and wanted is None:
            names = [n for n in VALIDATION_NAMES if n in whole and n != settings.test]  # what the test takes is no validation
            wanted = names[0] if names and role == "validation" else None
            return rows_of(wanted) if wanted else None
        split = settings.split if role == "train" else str(wanted)
        if role != "train" and Path(split).is_file():
            return read_rows(split, settings.columns), {Path(split).name: sha256_file(split)}
        if split not in whole:
            raise DataError(f'"{name}" has no split "{split}".{nearest(split, whole)} There: {", ".join(whole)}.')
        return rows_of(split)

    return find


def hub_data(name: str, config: str | None) -> Any:
    """The DatasetDict of a hub id. DataError with the hub's reason, MissingPackage."""
    try:
        import datasets
    except ImportError as e:
        raise need("datasets", "data", f'Training data by hub id ("{name}", which is no file or folder here)') from e
    try:
        return datasets.load_dataset(name, config)
    except Exception as e:  # datasets raises a dozen kinds, and the network's
        raise DataError(f'can\'t load "{name}": it is no file or folder here, and as a hub data set: {e}') from e


def _check(settings: Settings, train: Sequence[Row], held: Mapping[str, Sequence[Row] | None]) -> tuple[str, ...]:
    """The labels of a classification, in order, after every split has been looked at."""
    splits = {f"the {role} data": rows for role, rows in {"train": train, **held}.items() if rows is not None}
    for where, rows in splits.items():
        if not rows:
            raise DataError(f"{where} are empty: {', '.join(settings.data)}")
        if settings.task == "chat":
            chat_columns(rows[0], settings.text, where)
        for column in settings.text_columns if settings.task != "chat" else ():
            column_values(rows, column, where)
    if settings.task not in WITH_HEAD:
        return ()
    values = {where: column_values(rows, settings.label, where) for where, rows in splits.items()}
    if "the test data" in values:
        _refuse_unlabelled(values["the test data"], values["the train data"], settings.label)
    if settings.task == "regression":
        for where, found in values.items():
            numbers(found, where)
        return ()
    labels = ordered({str(v) for v in values["the train data"]})
    if len(labels) < 2:
        raise DataError(f'column "{settings.label}" of the train data holds one label alone, "{labels[0]}"; expected two or more')
    if settings.task == "classification" and len(labels) > 1000 and len(labels) > len(train) / 2:
        raise DataError(
            f'column "{settings.label}" of the train data holds {len(labels)} different values in {len(train)} rows, which are '
            "hardly labels: name the label column with label, or use task regression"
        )
    for where, found in values.items():
        label_ids(found, labels, where)
    return labels


def _refuse_unlabelled(values: Sequence[Any], trained: Sequence[Any], column: str) -> None:
    """DataError where every row has one label: a stand-in, as in GLUE's public test sets. A score against it means nothing."""
    if len(values) > 1 and len({str(v) for v in values}) == 1 and len({str(v) for v in trained}) > 1:
        raise DataError(
            f'column "{column}" of the test data holds {values[0]!r} in all {len(values)} rows: they look unlabelled, and no '
            "score against them means anything. Name a split with labels; GLUE's are train and validation."
        )


def numbers(values: Sequence[Any], where: str) -> list[float]:
    """The values as floats; DataError names the first that is none."""
    out = []
    for number, value in enumerate(values, 1):
        try:
            out.append(float(value))
        except (TypeError, ValueError) as e:
            raise DataError(f"row {number} of {where} has label {value!r}, and regression needs a number") from e
    return out


def label_ids(values: Sequence[Any], labels: Sequence[str], where: str) -> list[int]:
    """Each label's id; DataError lists the labels that training has never seen."""
    ids = {label: i for i, label in enumerate(labels)}
    unseen = sorted({str(v) for v in values} - set(ids))
    if unseen:
        shown = ", ".join(f'"{u}"' for u in unseen[:5])
        known = ", ".join(f'"{k}"' for k in labels[:12])
        raise DataError(
            f"{where} has labels that training has never seen: {shown}. Known: {known}. Fix the data, or the columns."
        )
    return [ids[str(v)] for v in values]


def ordered(labels: set[str]) -> tuple[str, ...]:
    """Sorted, as numbers where all of them are whole numbers: "10" comes after "9"."""
    if all(label.lstrip("-").isdecimal() for label in labels):
        return tuple(sorted(labels, key=lambda label: (int(label), label)))
    return tuple(sorted(labels))
