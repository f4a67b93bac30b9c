"""An adapter file's metadata: written of an adapter; read, and made an adapter again. container.py knows the bytes."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adapter import Adapter, BaseModel, layer_of
from .basis import Basis, StoredPair
from .config import VeraConfig
from .container import Contents, Entry, canonical, parse
from .errors import AdapterFileError, ConfigError

FORMAT_VERSION = 1
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


@lru_cache(maxsize=1)
def library_version() -> str:
    """ "veralib 0.1.0", as written to files."""
    try:
        return f"veralib {version('veralib')}"
    except PackageNotFoundError:
        return "veralib"


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
        raise broken(file, f"its metadata is wrong: {e}") from e


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
            raise broken(
                header.file,
                f'nothing is known of its tensor "{name}": known are <unit>.d, <unit>.b, <layer>.bias, basis.A, basis.B and '
                "module.<name>.<key>, of the layers and modules in its metadata",
            )
    if len(owned) != sum(map(len, header.modules.values())):
        raise broken(header.file, "its modules name a tensor twice")
    if absent := owned - found.keys():
        raise broken(header.file, f'it has no tensor "{min(absent)}"')
    if alone := [unit for unit, both in vectors.items() if len(both) != 2]:
        raise broken(header.file, f'"{alone[0]}" has {next(iter(vectors[alone[0]]))} but not the other vector')
    if len(pair) != (2 if header.basis["stored"] is True else 0):
        raise broken(header.file, f"its basis says stored={header.basis['stored']}, and it has {sorted(pair)} of A and B")
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
        raise broken(header.file, f'"{name}" is {vector.dtype}, expected {", ".join(map(str, VECTOR_DTYPES))}')
    return vector.float()


def _basis(header: Header, pair: dict[str, Tensor]) -> Basis:
    written = header.basis
    rank, max_in, max_out = sizes = [written[key] for key in ("rank", "max_in", "max_out")]
    if any(type(v) is not int or not 0 <= v < 2**32 for v in sizes) or not isinstance(written["seed"], str):
        raise broken(header.file, f"its basis is {written}")
    stored = None
    if pair:
        if any(t.dtype != torch.float32 or t.dim() != 2 for t in pair.values()):
            raise broken(header.file, "basis.A and basis.B aren't float32 matrices")
        stored = StoredPair(pair["A"], pair["B"])
    try:
        seed = int(written["seed"]) if written["seed"].isascii() and written["seed"].isdigit() else -1
        return _same(Basis(written["kind"], seed, written["levels"], 0, rank, max_in, max_out, stored))
    except (ConfigError, TypeError, ValueError) as e:
        raise broken(header.file, f"its basis is wrong: {e}") from e


@lru_cache(maxsize=64)
def _same(basis: Basis) -> Basis:
    """One object for equal bases: looking A and B up by it then needs no comparison."""
    return basis


def broken(file: Path | str, what: str) -> AdapterFileError:
    """The error for a file that contradicts itself; what: how."""
    return AdapterFileError(
        f"{file} can't be used: {what}. It is damaged, or other software wrote it: copy it again, or save it anew with veralib."
    )
