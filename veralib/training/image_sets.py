"""Sets of images as their authors publish them: CIFAR-100's binary version, Food-101, Oxford Flowers-102, and bare class folders.

CIFAR-100: train.bin, test.bin and fine_label_names.txt; a record is a coarse label, a fine label and 3 × 32 × 32 bytes (red,
green, blue). Its Python version is pickled, and a pickle runs what it holds: it isn't read. Food-101: images/CLASS/NAME.jpg, and
lists of CLASS/NAME in meta/train.txt and meta/test.txt. Flowers-102: jpg/image_00001.jpg …, imagelabels.mat, and setid.mat with
trnid, valid and tstid. RESISC45: a folder for each class and no splits: all of it is "train".
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import DataError, need
from .data import Row
from .images import Picture, file_picture, folder_rows, image_files, row_of
from .settings import Settings

Splits = Mapping[str, Callable[[], list[Row]]]
CIFAR_RECORD = 2 + 3 * 32 * 32
FLOWER_SPLITS = {"train": "trnid", "validation": "valid", "test": "tstid"}


def original_splits(path: Path, settings: Settings) -> Splits | None:
    """Each split's rows of a folder in its authors' form, or None where it has none of these."""
    if (path / "train.bin").is_file():
        return {name: partial(_cifar, path, name, settings) for name in ("train", "test") if (path / f"{name}.bin").is_file()}
    if (path / "meta" / "train.txt").is_file() and (path / "images").is_dir():
        return {name: partial(_food, path, name, settings) for name in ("train", "test")}
    if (path / "setid.mat").is_file():
        return {name: partial(_flowers, path, name, settings) for name in FLOWER_SPLITS}
    if any(p.name in ("train", "data_batch_1") and p.is_file() for p in path.iterdir()):
        raise DataError(f"{path} looks like CIFAR's Python version, a pickle, which runs what it holds: get the binary version")
    folders = [p for p in sorted(path.iterdir()) if p.is_dir() and not p.name.startswith(".")]
    if folders and not any(p.name == settings.split for p in folders) and all(image_files(p) for p in folders):
        return {"train": partial(folder_rows, path, settings)}
    return None


def _cifar(path: Path, split: str, settings: Settings) -> list[Row]:
    import numpy as np

    data = (path / f"{split}.bin").read_bytes()
    if not data or len(data) % CIFAR_RECORD:
        raise DataError(
            f"{path / split}.bin has {len(data)} bytes, expected a multiple of {CIFAR_RECORD}: it isn't CIFAR-100's, or cut"
        )
    names = _lines(path / "fine_label_names.txt")
    records = np.frombuffer(data, np.uint8).reshape(-1, CIFAR_RECORD)
    if int(records[:, 1].max()) >= len(names):
        raise DataError(f"{path / split}.bin has fine label {records[:, 1].max()}, and fine_label_names.txt {len(names)} names")
    return [
        row_of(settings, Picture(f"image {i} of {path / split}.bin", partial(_portable, record)), names[record[1]])
        for i, record in enumerate(records)
    ]


def _portable(record: Any) -> bytes:
    """A record's pixels as a PPM file."""
    return b"P6 32 32 255\n" + record[2:].reshape(3, 32, 32).transpose(1, 2, 0).tobytes()


def _food(path: Path, split: str, settings: Settings) -> list[Row]:
    return [
        row_of(settings, file_picture(_there(path / "images" / f"{name}.jpg")), name.partition("/")[0])
        for name in _lines(path / "meta" / f"{split}.txt")
    ]


def _flowers(path: Path, split: str, settings: Settings) -> list[Row]:
    try:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError
    except ImportError as e:
        raise need("scipy", "cli", "Flowers-102's .mat files") from e
    try:
        labels = loadmat(path / "imagelabels.mat")["labels"].reshape(-1)
        numbers = loadmat(path / "setid.mat")[FLOWER_SPLITS[split]].reshape(-1)
        classes = [int(labels[i - 1]) for i in numbers]
    except (OSError, ValueError, KeyError, IndexError, NotImplementedError, MatReadError) as e:
        raise DataError(f"{path} can't be read as Flowers-102 (imagelabels.mat, setid.mat, jpg): {e}") from e
    files = [_there(path / "jpg" / f"image_{i:05d}.jpg") for i in numbers]
    return [row_of(settings, file_picture(file), str(label)) for file, label in zip(files, classes, strict=True)]


def _there(file: Path) -> Path:
    if not file.is_file():
        raise DataError(f"{file} is missing, which the set's lists name")
    return file


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").split()
    except OSError as e:
        raise DataError(f"can't read {file}: {e.strerror}") from e
