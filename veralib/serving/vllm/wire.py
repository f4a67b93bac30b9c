"""An adapter on its way from the process that read it to the workers: in a LoRARequest's lora_path, which vLLM carries anyway.

So a worker reads no disk and needs no sight of the store, on another machine least of all. A request's own path is short: it
names the version, and is part of vLLM's key for prefix-cache blocks.
"""

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...adapter import Adapter, layer_of
from ...basis import Basis, StoredPair

DATA, STORE = "vera-data:", "vera-store:"


@dataclass(frozen=True)
class Unit:
    """One adapted linear, or a part of one. inputs is 0 where the adapter doesn't say."""

    name: str
    outputs: int
    """Of the layer, all parts together."""
    inputs: int
    d: Tensor
    """(r,), float32, s_A·s_B and the config's scale in it."""
    b: Tensor
    """(m,), float32."""


@dataclass(frozen=True)
class Vectors:
    """What a worker needs of an adapter."""

    basis: Basis
    units: tuple[Unit, ...]


def vectors_of(adapter: Adapter) -> Vectors:
    """The vectors of an adapter, the scales multiplied into d."""
    units = []
    for name, (d, b) in adapter.vectors.items():
        m, n = adapter.base.layers[layer_of(name)]
        units.append(Unit(name, m, n, d.float() * adapter.scale_of(name), b.float()))
    return Vectors(adapter.basis, tuple(units))


def pack(vectors: Vectors) -> str:
    """A path that holds the adapter itself."""
    basis = vectors.basis
    kind = {k: getattr(basis, k) for k in ("kind", "levels", "rank", "max_in", "max_out")} | {"seed": str(basis.seed)}
    head = json.dumps({"basis": kind, "units": [[u.name, u.outputs, u.inputs, len(u.d), len(u.b)] for u in vectors.units]})
    tensors = [t for u in vectors.units for t in (u.d, u.b)]
    if basis.stored is not None:
        tensors += [basis.stored.A.reshape(-1), basis.stored.B.reshape(-1)]
    body = torch.cat(tensors).numpy().astype("<f4", copy=False).tobytes()
    return DATA + base64.b64encode(len(head).to_bytes(8, "little") + head.encode() + body).decode()


def unpack(path: str) -> Vectors:
    """The adapter in a path that pack made."""
    raw = base64.b64decode(path.removeprefix(DATA))
    end = 8 + int.from_bytes(raw[:8], "little")
    head = json.loads(raw[8:end])
    flat = torch.from_numpy(np.frombuffer(raw, "<f4", offset=end).astype(np.float32))
    lengths = [n for _, _, _, r, m in head["units"] for n in (r, m)]
    taken = sum(lengths)
    tensors = flat[:taken].split(lengths)
    units = [Unit(name, m, n, tensors[2 * i], tensors[2 * i + 1]) for i, (name, m, n, _, _) in enumerate(head["units"])]
    return Vectors(_basis(head["basis"], flat[taken:]), tuple(units))


def _basis(kind: Mapping[str, Any], rest: Tensor) -> Basis:
    fields = {**kind, "seed": int(kind["seed"])}
    if not len(rest):
        return Basis(**fields)
    r, n, m = fields["rank"], fields["max_in"], fields["max_out"]
    return Basis(**fields, stored=StoredPair(rest[: r * n].view(r, n), rest[r * n :].view(m, r)))


def request_id(engine_name: str) -> int:
    """A number for a version's name, the same in every process: vLLM wants one, above 0 and below 2⁶³."""
    return int.from_bytes(hashlib.sha256(engine_name.encode()).digest()[:8], "little") >> 2 or 1
