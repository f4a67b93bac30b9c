"""save_adapter and load_adapter: an Adapter as one safetensors file (docs/FORMAT.md says it byte by byte).

container.py knows tensors and bytes; here is what they mean, and every check that needs no model.
"""

import os
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adapter import Adapter, BaseModel, layer_of
from .basis import Basis, StoredPair
from .checks import all_finite, faults, has_moved, writing_faults
from .config import VeraConfig
from .container import Contents, Entry, canonical, checksum, parse, read, tensors, write
from .errors import AdapterFileError, ConfigError, VeraWarning, unknown_text

FORMAT_VERSION = 1
FILE_NAME = "adapter_model.safetensors"
CHECKPOINT_NAME = "model.safetensors"  # the one name that transformers' Trainer resumes from and loads its best model from
SEVERAL = "vera_checkpoint"  # metadata key of a checkpoint of several adapters, which is no adapter file
METADATA_KEYS = (
    "format",  # "pt", which other readers of safetensors look for
    "vera_format",  # FORMAT_VERSION
    "library",  # who wrote it
    "config",
    "basis",
    "fingerprint",
    "base",
    "layer_ids",
    "modules",
    "notes",
    "checksum",
)
BASIS_KEYS = ("kind", "version", "seed", "levels", "rank", "max_in", "max_out", "stored")
BASE_KEYS = ("id", "revision", "quantised", "layers", "hashes")
BASIS_VERSION = 1
VECTOR_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Header:
    """What a file says of itself, its tensors unread and its checksum unchecked: for a card, not for use."""

    file: Path
    file_bytes: int
    version: int
    library: str
    config: VeraConfig
    basis: Mapping[str, Any]
    fingerprint: str
    base: BaseModel
    layer_ids: Mapping[str, int]
    modules: Mapping[str, tuple[str, ...]]
    notes: Mapping[str, str]
    checksum: str
    tensors: Mapping[str, Entry]


def save_adapter(adapter: Adapter, path: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> Path:
    """The file written: `path` if it ends in .safetensors, else adapter_model.safetensors in the folder `path`.

    dtype: of d and b in the file; bfloat16 or float16 halve it and round. The file is written beside its place, synced and
    renamed, so a failure leaves the old one. AdapterFileError: unwritable, NaN or inf in a vector, an adapter that
    contradicts itself. Warns where the adapter changes nothing.
    """
    file = Path(os.fsdecode(path))
    if file.suffix != ".safetensors" or os.path.isdir(file):
        file = file / FILE_NAME
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
        raise _broken(contents.file, _listed(wrong))
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
        raise _broken(file, f"its adapter format is {written!r}, expected {FORMAT_VERSION}")
    if extra := contents.metadata.keys() ^ set(METADATA_KEYS):
        raise _broken(file, f"its metadata lacks, or has too much, {', '.join(sorted(extra))}")
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


def _broken(file: Path | str, what: str) -> AdapterFileError:
    return AdapterFileError(
        f"{file} can't be used: {what}. It is damaged, or other software wrote it: copy it again, or save it anew with veralib."
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


@lru_cache(maxsize=1)
def library_version() -> str:
    """ "veralib 0.1.0", as written to files."""
    try:
        return f"veralib {version('veralib')}"
    except PackageNotFoundError:
        return "veralib"


def _named_vectors(adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    for unit, (d, b) in adapter.vectors.items():
        yield f"{unit}.d", d
        yield f"{unit}.b", b


def metadata_of(adapter: Adapter) -> dict[str, str]:
    """All metadata of an adapter's file but the checksum, as text."""
    basis, base = adapter.basis, adapter.base
    values = {
        "config": adapter.config.to_dict(),
        "basis": {
            "kind": basis.kind,
            "version": BASIS_VERSION,
            "seed": str(basis.seed),
            "levels": basis.levels,
            "rank": basis.rank,
            "max_in": basis.max_in,
            "max_out": basis.max_out,
            "stored": basis.stored is not None,
        },
        "base": {
            "id": base.id,
            "revision": base.revision,
            "quantised": base.quantised,
            "layers": {name: list(shape) for name, shape in base.layers.items()},
            "hashes": dict(base.hashes),
        },
        "layer_ids": dict(adapter.layer_ids),
        "modules": {name: list(state) for name, state in adapter.modules.items()},
        "notes": dict(adapter.notes),
    }
    plain = {
        "format": "pt",
        "vera_format": str(FORMAT_VERSION),
        "library": library_version(),
        "fingerprint": basis.fingerprint(),
    }
    return plain | {key: canonical(value) for key, value in values.items()}


def header_of(contents: Contents) -> Header:
    """The metadata, parsed, with the types that FORMAT.md promises."""
    texts, file = contents.metadata, contents.file
    try:
        config = VeraConfig.from_dict(_mapping(parse(texts["config"])))
        basis, base = _mapping(parse(texts["basis"])), _mapping(parse(texts["base"]))
        if basis.keys() != set(BASIS_KEYS) or base.keys() != set(BASE_KEYS):
            raise ValueError("basis or base lacks or adds a field")
        if basis["version"] != BASIS_VERSION:
            raise ValueError(f"the basis has version {basis['version']!r}, known is {BASIS_VERSION}")
        if any(not isinstance(base[key], str) for key in ("id", "revision", "quantised")):
            raise ValueError("base's id, revision and quantised aren't text")
        layers = {name: _shape(shape) for name, shape in _mapping(base["layers"]).items()}
        hashes = _mapping(base["hashes"], str)
        modules = {name: tuple(keys) for name, keys in _mapping(parse(texts["modules"]), list).items()}
        if any(type(key) is not str for keys in modules.values() for key in keys):
            raise ValueError("a key of modules isn't text")
        return Header(
            file=Path(file),
            file_bytes=contents.file_bytes,
            version=FORMAT_VERSION,
            library=texts["library"],
            config=config,
            basis=basis,
            fingerprint=texts["fingerprint"],
            base=BaseModel(base["id"], base["revision"], layers, hashes, base["quantised"]),
            layer_ids=_mapping(parse(texts["layer_ids"]), int),
            modules=modules,
            notes=_mapping(parse(texts["notes"]), str),
            checksum=texts["checksum"],
            tensors=contents.entries,
        )
    except (ValueError, TypeError) as e:  # ConfigError is a ValueError
        raise _broken(file, f"its metadata is wrong: {e}") from e


def _mapping(value: Any, kind: type | None = None) -> dict[str, Any]:
    if not isinstance(value, dict) or (kind and any(type(v) is not kind for v in value.values())):
        raise ValueError(f"found {str(value)[:40]!r}, expected an object{f' of {kind.__name__}' if kind else ''}")
    return value


def _shape(value: Any) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2 or any(type(v) is not int for v in value):
        raise ValueError(f"a layer's shape is {value!r}, expected [outputs, inputs]")
    return value[0], value[1]


def assemble(header: Header, found: dict[str, Tensor]) -> Adapter:
    """The Adapter of a header and its tensors, each put where its name says; one without a place is refused."""
    layers = header.base.layers
    owned = {f"module.{module}.{key}" for module, keys in header.modules.items() for key in keys}
    vectors: dict[str, dict[str, Tensor]] = {}
    biases, pair = {}, {}
    for name, tensor in found.items():
        stem, _, leaf = name.rpartition(".")
        if name in owned:
            continue
        elif leaf in ("d", "b") and layer_of(stem) in layers:
            vectors.setdefault(stem, {})[leaf] = tensor if tensor.dtype is torch.float32 else _wide(header, name, tensor)
        elif leaf == "bias" and stem in layers:
            biases[stem] = tensor
        elif name in ("basis.A", "basis.B"):
            pair[leaf] = tensor
        else:
            raise _broken(
                header.file,
                f'nothing is known of its tensor "{name}": known are <unit>.d, <unit>.b, <layer>.bias, basis.A, basis.B and '
                "module.<name>.<key>, of the layers and modules in its metadata",
            )
    if len(owned) != sum(map(len, header.modules.values())):
        raise _broken(header.file, "its modules name a tensor twice")
    if absent := owned - found.keys():
        raise _broken(header.file, f'it has no tensor "{min(absent)}"')
    if alone := [unit for unit, both in vectors.items() if len(both) != 2]:
        raise _broken(header.file, f'"{alone[0]}" has {next(iter(vectors[alone[0]]))} but not the other vector')
    if len(pair) != (2 if header.basis["stored"] is True else 0):
        raise _broken(header.file, f"its basis says stored={header.basis['stored']}, and it has {sorted(pair)} of A and B")
    return Adapter(
        config=header.config,
        basis=_basis(header, pair),
        base=header.base,
        vectors={unit: (both["d"], both["b"]) for unit, both in vectors.items()},
        layer_ids=header.layer_ids,
        biases=biases,
        modules={m: {key: found[f"module.{m}.{key}"] for key in keys} for m, keys in header.modules.items()},
        notes=header.notes,
    )


def _wide(header: Header, name: str, vector: Tensor) -> Tensor:
    if vector.dtype not in VECTOR_DTYPES:
        raise _broken(header.file, f'"{name}" is {vector.dtype}, expected {", ".join(map(str, VECTOR_DTYPES))}')
    return vector.float()


def _basis(header: Header, pair: dict[str, Tensor]) -> Basis:
    written = header.basis
    rank, max_in, max_out = sizes = [written[key] for key in ("rank", "max_in", "max_out")]
    if any(type(v) is not int or not 0 <= v < 2**32 for v in sizes) or not isinstance(written["seed"], str):
        raise _broken(header.file, f"its basis is {written}")
    stored = None
    if pair:
        if any(t.dtype != torch.float32 or t.dim() != 2 for t in pair.values()):
            raise _broken(header.file, "basis.A and basis.B aren't float32 matrices")
        stored = StoredPair(pair["A"], pair["B"])
    try:
        seed = int(written["seed"]) if written["seed"].isascii() and written["seed"].isdigit() else -1
        return _same(Basis(written["kind"], seed, written["levels"], 0, rank, max_in, max_out, stored))
    except (ConfigError, TypeError, ValueError) as e:
        raise _broken(header.file, f"its basis is wrong: {e}") from e


@lru_cache(maxsize=64)
def _same(basis: Basis) -> Basis:
    """One object for equal bases: looking A and B up by it then needs no comparison."""
    return basis
