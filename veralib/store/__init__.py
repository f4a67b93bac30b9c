"""Stores: adapters by name, a handful or a million. open_store(where) opens or makes one."""

import json
import os
from pathlib import Path
from typing import Any, Literal

from ..errors import ConfigError, StoreError, unknown_text
from .base import Store, Version
from .cache import CachedStore, CacheStatistics
from .codec import Precision
from .files import Files, LocalFiles, RemoteFiles
from .folder import ABOUT, FolderStore

__all__ = ["CacheStatistics", "CachedStore", "Store", "Version", "open_store", "open_there"]

FORMAT = 1


def open_store(
    where: str | os.PathLike[str],
    kind: Literal["folder", "packed"] | None = None,
    precision: Precision | None = None,
    keep: int | None = None,
    **options: Any,
) -> Store:
    """The store in a folder or behind an fsspec URL (s3://bucket/path, gs://, az://, hf://, memory://), made if there is none.

    kind: "folder", a file for each version, or "packed", for bulk, on a local disk only; a store that exists knows its own.
    precision: how a new store keeps d and b, "float32" unless told; keep: how many versions of a name stay. options go to
    fsspec. StoreError for a folder with something else in it, a newer format, or another kind than asked for.
    """
    text, root, files = _place(where, options)
    about = _read_about(files, text)
    if about is None and files.list(""):
        about = _read_about(files, text)  # another process may have made it between the two looks
    if about is None:
        if kind not in (None, "folder", "packed"):
            raise ConfigError(f'there is no kind of store "{kind}". Known: "folder", "packed".')
        others = [n for n in files.list("") if n != "tmp"]
        if others:
            raise StoreError(
                f"{text} holds {', '.join(sorted(others)[:3])} and no {ABOUT}: it is no store. Name an empty or a new folder."
            )
        about = {"veralib_store": FORMAT, "kind": kind or "folder", "precision": precision or "float32", "keep": keep}
        FolderStore(files, about["precision"], keep)  # refuses a wrong setting before anything is written
        if about["kind"] == "packed" and root is None:
            raise StoreError(f'a packed store appends to files, which {text} can\'t: use kind="folder" there.')
        files.write(ABOUT, json.dumps(about, indent=1).encode() + b"\n")
    for name, asked in (("kind", kind), ("precision", precision)):
        if asked is not None and asked != about[name]:
            raise StoreError(f"the store at {text} has {name} {about[name]!r}, and {asked!r} was asked for.")
    files.sweep()
    keep = about["keep"] if keep is None else keep
    if about["kind"] == "packed":
        from .packed import PackedStore

        assert root is not None
        return PackedStore(root, about["precision"], keep)
    return FolderStore(files, about["precision"], keep)


def open_there(where: str | os.PathLike[str], **options: Any) -> Store:
    """open_store() of one that exists. StoreError where there is none."""
    text, _, files = _place(where, options)
    if _read_about(files, text) is None:
        raise StoreError(f"there is no store at {text}: name the folder or URL of one that exists.")
    return open_store(where, **options)


def _place(where: str | os.PathLike[str], options: dict[str, Any]) -> tuple[str, Path | None, Files]:
    """The place as text, its folder where it is on a local disk, and its files."""
    text = os.fspath(where)
    if "://" in text and not text.startswith("file://"):
        return text, None, RemoteFiles(text, options)
    if options:
        raise ConfigError(unknown_text("setting of a store on a local disk", next(iter(options)), ("kind", "precision", "keep")))
    root = Path(text.removeprefix("file://"))
    return text, root, LocalFiles(root)


def _read_about(files: Files, where: str) -> dict[str, Any] | None:
    try:
        about = json.loads(files.read(ABOUT))
        written = about["veralib_store"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as e:
        raise StoreError(f"{where}/{ABOUT} can't be read: {e}. Restore it from a backup, or name another folder.") from e
    if not isinstance(written, int) or written > FORMAT:
        raise StoreError(
            f"the store at {where} has format {written!r}; this veralib reads up to {FORMAT}. Upgrade: pip install -U veralib."
        )
    return about
