"""Adapters of every kind that a file can hold, and whether two are the same."""

import hashlib
import json

import torch

from veralib.adapter import Adapter, BaseModel
from veralib.basis import Basis, StoredPair, layer_id_of
from veralib.config import VeraConfig

SHAPES = {"h.0.q_proj": (6, 4), "h.0.v_proj": (3, 4), "h.1.q_proj": (6, 4), "h.10.out": (4, 6)}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def make(config, basis, shapes=SHAPES, units=None, rank=lambda unit: 2, **rest):
    """An adapter as if trained. units: unit -> outputs, by default the layers and theirs."""
    units = units or {layer: m for layer, (m, _) in shapes.items()}
    vectors = {u: (draw(rank(u), seed=i), draw(m, seed=90 + i)) for i, (u, m) in enumerate(units.items())}
    hashes = {layer: hashlib.sha256(layer.encode()).hexdigest()[:16] for layer in shapes}
    return Adapter(config, basis, BaseModel("org/modèle", "main", shapes, hashes), vectors, **rest)


def plain():
    return make(VeraConfig(rank=2, targets=["q_proj", "v_proj"]), Basis())


def parts():
    units = {"h.0.c_attn:q": 4, "h.0.c_attn:v": 4, "h.0.c_proj": 4}
    return make(VeraConfig(rank=2, seed=2**64 - 1), Basis(seed=2**64 - 1), {"h.0.c_attn": (12, 4), "h.0.c_proj": (4, 4)}, units)


def ranks():
    config = VeraConfig(rank={"q_proj$": 3, r"\.v_": 5, ".": 1}, levels="rademacher", scale=30, train="d", layers=[0, 1, 10])
    return make(config, Basis(levels="rademacher"), rank=lambda u: 3 if u.endswith("q_proj") else 5 if ".v_" in u else 1)


def unique():
    ids = {unit: layer_id_of(unit) for unit in SHAPES}
    return make(VeraConfig(rank=2, sharing="unique"), Basis(), layer_ids=ids)


def with_head():
    head = {
        "dense.weight": draw(3, 5).bfloat16(),
        "bias": draw(3).half(),
        "count": torch.tensor(7),
        "mask": torch.tensor([[True, False], [False, True]]),
        "floor": torch.tensor([float("-inf"), float("nan")], dtype=torch.float64),
        "bytes": torch.arange(3, dtype=torch.uint8),
        "none": torch.empty(0, 4, dtype=torch.int16),
        "t": draw(4, 3).T,
    }
    config = VeraConfig(rank=2, train_modules=["classifier"], dropout=0.25, b_initial=0.5)
    return make(config, Basis(), modules={"classifier": head, "pooler": {}}, notes={"metric": "0.5 ± 0.1", "\n": '"\\'})


def peft():
    config = VeraConfig(rank=2, basis="peft", seed=7)
    return make(config, Basis("peft", 7, rank=2, max_in=8, max_out=7), biases={"h.0.v_proj": draw(3)})


def peft_stored():
    pair = StoredPair(draw(2, 6), draw(6, 2))
    shapes = {layer: (m, 0) for layer, (m, _) in SHAPES.items()}  # as read from PEFT's files without the model
    return make(VeraConfig(rank=2, basis="peft", seed=7), Basis("peft", 7, rank=2, max_in=6, max_out=6, stored=pair), shapes)


SAMPLES = [plain, parts, ranks, unique, with_head, peft, peft_stored]


def flat(adapter):
    """Every tensor of an adapter, by a name of its own."""
    out = {f"{u}/{i}": t for u, pair in adapter.vectors.items() for i, t in enumerate(pair)}
    out |= {f"bias/{layer}": t for layer, t in adapter.biases.items()}
    out |= {f"module/{m}/{k}": t for m, state in adapter.modules.items() for k, t in state.items()}
    return out


def same(one, other):
    """Whether two adapters are the same, bit for bit."""
    fields = ("config", "basis", "base", "layer_ids", "notes")
    if any(getattr(one, f) != getattr(other, f) for f in fields) or one.modules.keys() != other.modules.keys():
        return False
    if list(one.config.to_dict().items()) != list(other.config.to_dict().items()):  # dicts are equal in any order; ranks aren't
        return False
    a, b = flat(one), flat(other)
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and torch.equal(bits(a[k]), bits(b[k])) for k in a
    )


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def unpack(raw):
    size = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]
