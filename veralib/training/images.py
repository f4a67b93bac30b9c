"""Rows of images: from class folders, a known set (image_sets.py), an .npz or the hub. Pictures are read when asked for.

Folder: SPLIT/CLASS/*.jpg (or any format that Pillow reads). npz: `data`, the images' bytes one after another, image i at
offsets[i]:offsets[i + 1]; `labels`, a class number each; `split`, 0 for train, 1 for val; `wnids` or `names`, the classes' names.
"""

import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import DataError, nearest, need
from .data import VALIDATION_NAMES, Row, hub_data, pathlike
from .settings import Settings

NPZ_SPLITS = ("train", "val")


@dataclass(frozen=True)
class Picture:
    """An image that hasn't been read yet. name: where it is, for messages."""

    name: str
    read: Callable[[], bytes]

    def decode(self) -> Any:
        """The image as Pillow's RGB, turned upright by its EXIF tag. DataError names the file that can't be read."""
        try:
            from PIL import Image, ImageOps
        except ImportError as e:
            raise need("pillow", "images", "Task images") from e
        try:
            with Image.open(io.BytesIO(self.read())) as image:
                return ImageOps.exif_transpose(image).convert("RGB")
        except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as e:
            reason = "its format is none that Pillow reads" if isinstance(e, Image.UnidentifiedImageError) else str(e)
            raise DataError(f"{self.name} can't be read as an image: {reason}; replace it or leave it out") from e


def image_splits(settings: Settings) -> Callable[..., tuple[list[Row], dict[str, str]] | None]:
    """A function (role, wanted=None) -> (rows, {}) over the images that `data` names; rows hold a Picture and a class name."""
    if len(settings.data) != 1:
        raise DataError(f"images come from one folder, one .npz file or one hub id; data names {len(settings.data)}")
    path = Path(settings.data[0]).expanduser()
    splits: Mapping[str, Callable[[], list[Row]]]
    if path.is_dir():
        from .image_sets import original_splits

        splits = original_splits(path, settings) or {
            p.name: partial(folder_rows, p, settings) for p in sorted(path.iterdir()) if p.is_dir()
        }
    elif path.is_file() or path.suffix == ".npz":
        splits = _npz(path, settings)
    elif pathlike(settings.data[0]):
        raise DataError(f"there is no folder or .npz file {path} (now in {Path.cwd()})")
    else:
        splits = _hub(settings)

    def find(role: str, wanted: str | None = None) -> tuple[list[Row], dict[str, str]] | None:
        name = settings.split if role == "train" else wanted
        if name is None and role == "validation":  # what the test takes is no validation
            name = next((n for n in VALIDATION_NAMES if n in splits and n != settings.test), None)
        if name is None:
            return None
        if name not in splits:
            form = " Expected a folder of that name with a folder for each class in it." if path.is_dir() else ""
            raise DataError(f'{path} has no split "{name}".{nearest(name, splits)} There: {", ".join(splits) or "none"}.{form}')
        return splits[name](), {}

    return find


def check_images(rows: Sequence[Row], settings: Settings) -> str:
    """SHA-256 over the rows' labels and image bytes, in their order, once every image was decoded. DataError names a bad one."""
    column = settings.text_columns[0]

    def digest(row: Row) -> bytes:
        row[column].decode()
        return hashlib.sha256(row[column].read()).digest()

    whole = hashlib.sha256()
    with ThreadPoolExecutor() as pool:  # Pillow decodes without the GIL
        for row, own in zip(rows, pool.map(digest, rows), strict=True):
            whole.update(str(row[settings.label]).encode() + b"\0" + own)
    return whole.hexdigest()


def image_files(folder: Path, deep: bool = False) -> list[Path]:
    """The files of a folder (deep: and of those below it) that are images by their names, sorted."""
    try:
        from PIL import Image
    except ImportError as e:
        raise need("pillow", "images", "Task images") from e
    known = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found = folder.rglob("*") if deep else folder.iterdir()
    return sorted(p for p in found if p.suffix.lower() in known and not p.name.startswith(".") and p.is_file())


def file_picture(path: Path) -> Picture:
    """The Picture of one file."""
    return Picture(str(path), path.read_bytes)


def row_of(settings: Settings, picture: Picture, label: Any) -> Row:
    """A row with a picture and its class, under the names that the settings give them."""
    return {settings.text_columns[0]: picture, settings.label: label}


def folder_rows(folder: Path, settings: Settings) -> list[Row]:
    """A row for each image of a folder of class folders. DataError where there is none, or a class has no image."""
    classes = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not classes:
        raise DataError(f"{folder} has no classes: expected a folder for each class with its images, {folder.name}/cat/1.jpg say")
    rows = []
    for own in classes:
        files = image_files(own)
        if not files:
            raise DataError(f"{own} holds no image; put some there, or delete the folder")
        rows += [row_of(settings, file_picture(file), own.name) for file in files]
    return rows


def _npz(path: Path, settings: Settings) -> Mapping[str, Callable[[], list[Row]]]:
    import zipfile

    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, AttributeError, zipfile.BadZipFile) as e:
        raise DataError(f"can't read {path} as an .npz file of images: {e}") from e
    wanted = ("data", "offsets", "labels", "split")
    if missing := [name for name in wanted if name not in arrays]:
        raise DataError(f"{path} has no {', '.join(missing)}; expected the arrays {', '.join(wanted)}, and names or wnids")
    data, offsets, labels, split = (arrays[name] for name in wanted)
    counts = {"offsets": len(offsets) - 1, "labels": len(labels), "split": len(split)}
    if len(set(counts.values())) > 1 or (np.diff(offsets) < 0).any() or offsets[-1] > len(data):
        raise DataError(
            f"{path} doesn't fit together: images by its arrays {counts}, bytes {len(data)}, last offset {offsets[-1]}"
        )
    names = next((arrays[name] for name in ("wnids", "names") if name in arrays), None)
    if names is not None and len(names) <= labels.max(initial=0):
        raise DataError(f"{path} names {len(names)} classes, and its labels go up to {labels.max()}")

    def rows(code: int) -> list[Row]:
        return [
            row_of(
                settings,
                Picture(f"image {i} of {path}", partial(_slice, data, int(offsets[i]), int(offsets[i + 1]))),
                str(labels[i] if names is None else names[labels[i]]),
            )
            for i in np.flatnonzero(split == code).tolist()
        ]

    return {name: partial(rows, code) for code, name in enumerate(NPZ_SPLITS) if (split == code).any()}


def _slice(data: Any, start: int, end: int) -> bytes:
    return data[start:end].tobytes()


def _hub(settings: Settings) -> Mapping[str, Callable[[], list[Row]]]:
    whole = hub_data(settings.data[0], settings.data_config)
    import datasets

    def rows(split: str) -> list[Row]:
        part = whole[split]
        image, label = _columns(part.features, settings)
        cells = part.cast_column(image, datasets.Image(decode=False))
        feature, classes = part.features[label], part[label]
        if isinstance(feature, datasets.ClassLabel):
            classes = [feature.int2str(c) if c is not None and c >= 0 else None for c in classes]
        return [
            row_of(settings, Picture(f'row {i + 1} of {split} of "{settings.data[0]}"', partial(_cell, cells, i, image)), c)
            for i, c in enumerate(classes)
        ]

    return {name: partial(rows, name) for name in whole}


def _columns(features: Mapping[str, Any], settings: Settings) -> tuple[str, str]:
    """The image and the label column: as named, or image and label, or the only images and the finest classes there are."""
    import datasets

    images = [n for n, f in features.items() if isinstance(f, datasets.Image)]
    classes = {n: f.num_classes for n, f in features.items() if isinstance(f, datasets.ClassLabel)}
    image, label = settings.text_columns[0], settings.label
    if not settings.text and image not in images and len(images) == 1:
        image = images[0]
    if "label" not in settings.model_fields_set and label not in features and classes:
        label = max(classes, key=lambda name: classes[name])
    if image not in images:
        raise DataError(f'"{settings.data[0]}" has no image column "{image}"; its image columns: {", ".join(images) or "none"}')
    if label not in features:
        raise DataError(f'"{settings.data[0]}" has no column "{label}"; there: {", ".join(features)}. Name yours with label.')
    return image, label


def _cell(cells: Any, i: int, column: str) -> bytes:
    cell = cells[i][column]
    return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()
