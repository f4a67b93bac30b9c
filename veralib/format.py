"""save_adapter and load_adapter: an Adapter as one safetensors file (docs/FORMAT.md says it byte by byte).

container.py knows tensors and bytes, header.py the metadata; here is every check that needs no model.
"""

import os
import re
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from .adapter import Adapter
from .checks import all_finite, faults, has_moved, writing_faults
from .container import Contents, checksum, read, tensors, write
from .errors import AdapterFileError, VeraWarning, unknown_text
from .header import (
    FORMAT_VERSION,
    METADATA_KEYS,
    VECTOR_DTYPES,
    Header,
    assemble,
    broken,
    header_of,
    library_version,
    metadata_of,
)

FILE_NAME = "adapter_model.safetensors"
CHECKPOINT_NAME = "model.safetensors"  # the one name that transformers' Trainer resumes from and loads its best model from
SEVERAL = "vera_checkpoint"  # metadata key of a checkpoint of several adapters, which is no adapter file


def adapter_file(path: str | os.PathLike[str]) -> Path:
    """Where save_adapter writes: `path` if it ends in .safetensors, else adapter_model.safetensors in the folder `path`."""
    file = Path(os.fsdecode(path))
    return file / FILE_NAME if file.suffix != ".safetensors" or os.path.isdir(file) else file


def save_adapter(adapter: Adapter, path: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> Path:
    """The file written, adapter_file(path).

    dtype: of d and b in the file; bfloat16 or float16 halve it and round. The file is written beside its place, synced and
    renamed, so a failure leaves the old one. AdapterFileError: unwritable, NaN or inf in a vector, an adapter that
    contradicts itself. Warns where the adapter changes nothing.
    """
    file = adapter_file(path)
    if (file.parent / "adapter_config.json").is_file() and file.name == FILE_NAME:
        raise AdapterFileError(
            f"{file.parent} is a folder that PEFT saved, and {FILE_NAME} there holds PEFT's weights: choose another path, or "
            "write a PEFT folder with vera convert. Nothing was written."
        )
    if wrong := list(islice(writing_faults(adapter), 4)) or list(islice(faults(adapter), 4)):
        raise AdapterFileError(f"the adapter can't be saved to {file}: {_listed(wrong)}. Nothing was written.")
    if dtype not in VECTOR_DTYPES:
        raise AdapterFileError(f"dtype is {dtype}, expected one of {', '.join(map(str, VECTOR_DTYPES))}.")
    pairs = {name: vector.to(dtype) for name, vector in _named_vectors(adapter)}
    if not all_finite(pairs.values()):
        raise AdapterFileError(f"{file} wasn't written: as {dtype} a vector overflows to inf. Save it as torch.float32.")
    if not has_moved(adapter):
        warnings.warn(
            f"the vectors saved to {file} never moved from their start: train first, or, if it was trained, with a higher "
            "learning rate (VeRA's are 1e-3 to 1e-1).",
            VeraWarning,
            stacklevel=2,
        )
    rest = [(f"{layer}.bias", bias) for layer, bias in adapter.biases.items()]
    rest += [(f"module.{name}.{key}", t) for name, state in adapter.modules.items() for key, t in state.items()]
    if stored := adapter.basis.stored:
        rest += [("basis.A", stored.A), ("basis.B", stored.B)]
    named = pairs | dict(rest)
    if len(named) != len(pairs) + len(rest):
        raise AdapterFileError(f"the adapter can't be saved to {file}: two of its tensors would have one name.")
    write(str(file), metadata_of(adapter), named, check=_decode)
    return file


def load_adapter(path: str | os.PathLike[str]) -> Adapter:
    """The Adapter in a file that save_adapter wrote, d and b in float32. Of a folder, adapter_model.safetensors is read, or
    else model.safetensors, as a Trainer checkpoint calls it.

    Everything is checked first: AdapterFileError for a file that is missing, truncated, changed in any bit, not veralib's,
    of a newer format, with another A and B than this veralib grows, with NaN, or at odds with itself. Its tensors are
    views of one block of memory.
    """
    return _decode(_open(path, with_data=True))


def _decode(contents: Contents) -> Adapter:
    found = checksum(contents.metadata, contents.entries, contents.data)
    if found != contents.metadata["checksum"]:
        raise AdapterFileError(
            f"{contents.file} is damaged: its bytes have the checksum {found[:16]}…, expected "
            f"{contents.metadata['checksum'][:16]}…. Copy or download the file again."
        )
    header = header_of(contents)
    adapter = assemble(header, tensors(contents))
    if wrong := list(islice(faults(adapter), 4)):
        raise broken(contents.file, _listed(wrong))
    if (found := adapter.basis.fingerprint()) != header.fingerprint:
        raise AdapterFileError(_other_basis(header, found))
    return adapter


def read_header(path: str | os.PathLike[str]) -> Header:
    """The Header of an adapter file, or of the one in a folder. AdapterFileError. Reads a few kilobytes whatever its size."""
    return header_of(_open(path, with_data=False))


def _open(path: str | os.PathLike[str], with_data: bool) -> Contents:
    file = os.fsdecode(path)
    if os.path.isdir(file):
        checkpoint = os.path.join(file, CHECKPOINT_NAME)
        file = os.path.join(file, FILE_NAME)
        if not os.path.exists(file) and os.path.exists(checkpoint):
            file = checkpoint
    if not os.path.exists(file):
        raise _missing(Path(file))
    contents = read(file, with_data, only_with="vera_format")
    written = contents.metadata.get("vera_format")
    if written is None:
        raise AdapterFileError(_not_ours(contents))
    if re.fullmatch("[1-9][0-9]{0,8}", written) and int(written) > FORMAT_VERSION:
        raise AdapterFileError(
            f"{file} is in adapter format {written}; this {library_version()} reads formats up to {FORMAT_VERSION}. "
            "Upgrade: pip install -U veralib."
        )
    if written != str(FORMAT_VERSION):
        raise broken(file, f"its adapter format is {written!r}, expected {FORMAT_VERSION}")
    if extra := contents.metadata.keys() ^ set(METADATA_KEYS):
        raise broken(file, f"its metadata lacks, or has too much, {', '.join(sorted(extra))}")
    return contents


def _missing(file: Path) -> AdapterFileError:
    folder = file.parent
    if not folder.is_dir():
        return AdapterFileError(f"there is no folder {folder}, where {file.name} was looked for. Check the path.")
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        names = []
    text = f"In {folder} {unknown_text('file', file.name, names)}"
    if "adapter_config.json" in names:
        text += f" It looks like a folder of PEFT's: vera.load({str(folder)!r}) reads those, and vera convert converts them."
    return AdapterFileError(text)


def _not_ours(contents: Contents) -> str:
    folder = os.path.dirname(contents.file) or "."
    if any("vera_lambda" in name for name in contents.entries):
        return (
            f"{contents.file} is an adapter of Hugging Face PEFT's VeRA, not veralib's own file. Load its folder with "
            f"vera.load({folder!r}), or convert it: vera convert {folder} DST --to veralib."
        )
    if names := contents.metadata.get(SEVERAL):
        return (
            f"{contents.file} is a Trainer checkpoint of several adapters ({names}), and a file to load holds one. Attach the "
            "same adapters, resume from the checkpoint, and vera.save() each."
        )
    return (
        f"{contents.file} is a safetensors file, but no veralib adapter: its metadata has no vera_format. Give a file that "
        "save_adapter wrote; for a folder that PEFT saved use vera.load or vera convert."
    )


def _listed(wrong: list[str]) -> str:
    return "; ".join(wrong[:3]) + ("; and more" if len(wrong) > 3 else "")


def _other_basis(header: Header, found: str) -> str:
    if header.basis["kind"] == "peft":
        step = "PEFT's pair depends on torch's generator: load and save it where it was trained, with its A and B stored."
    else:
        step = "The file was written by another generator of A and B: use the veralib that wrote it, and report this."
    return (
        f"{header.file} was trained with another A and B: its basis fingerprint is {header.fingerprint[:16]}…, and seed "
        f"{header.basis['seed']} gives {found[:16]}… here (the file is from {header.library}). {step}"
    )


def _named_vectors(adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    for unit, (d, b) in adapter.vectors.items():
        yield f"{unit}.d", d
        yield f"{unit}.b", b
