"""Adapters that aren't saved, or with a warning: at their start, not finite, at odds with themselves."""

import dataclasses
import os
import struct
import warnings

import pytest
import torch

from tests.format.reader import pack
from tests.format.samples import (
    SAMPLES,
    SHAPES,
    draw,
    make,
    parts,
    peft,
    peft_stored,
    plain,
    same,
    unique,
    unpack,
)
from veralib.adapter import BaseModel
from veralib.basis import Basis, StoredPair
from veralib.config import VeraConfig
from veralib.errors import AdapterFileError, VeraWarning
from veralib.format import load_adapter, save_adapter


def zeroed(adapter, which):
    for pair in adapter.vectors.values():
        pair[which].zero_()
    return adapter


def at_start(**fields):
    adapter = make(VeraConfig(rank=2, **fields), Basis())
    for d, b in adapter.vectors.values():
        d.fill_(adapter.config.d_start), b.fill_(adapter.config.b_start)
    return adapter


@pytest.mark.parametrize(
    "adapter", [zeroed(plain(), 1), at_start(), at_start(train="d"), at_start(train="b"), at_start(b_initial=0.5)],
    ids=["b all zero", "start", "start d", "start b", "start b 0.5"],
)  # fmt: skip
def test_saving_vectors_that_never_moved_warns(adapter, tmp_path):
    with pytest.warns(VeraWarning, match="never moved from their start: train first"):
        save_adapter(adapter, tmp_path)
    assert same(load_adapter(tmp_path), adapter)


@pytest.mark.parametrize("sample", SAMPLES)
def test_saving_vectors_that_moved_is_silent(sample, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapter(sample(), tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", [0, 1])
def test_nan_and_inf_are_refused_at_save_and_at_load_naming_the_unit(value, which, tmp_path):
    good = save_adapter(plain(), tmp_path / "good.safetensors")
    adapter = plain()
    adapter.vectors["h.0.v_proj"][which][1] = value
    with pytest.raises(AdapterFileError, match=r'vectors of "h\.0\.v_proj" hold NaN or inf: its training diverged'):
        save_adapter(adapter, tmp_path / "bad.safetensors")
    assert os.listdir(tmp_path) == ["good.safetensors"]
    header, data = unpack(good.read_bytes())
    begin = header[f"h.0.v_proj.{'db'[which]}"]["data_offsets"][0]
    good.write_bytes(pack(header, data[: begin + 4] + struct.pack("<f", value) + data[begin + 8 :]))
    with pytest.raises(AdapterFileError, match=r'vectors of "h\.0\.v_proj" hold NaN or inf'):
        load_adapter(good)


def changed(sample=plain, **fields):
    return lambda: dataclasses.replace(sample(), **fields)


def rebased(sample=plain, **fields):
    return lambda: dataclasses.replace(sample(), base=dataclasses.replace(sample().base, **fields))


Q = "h.0.q_proj"
CONTRADICTIONS = {
    "float64 vectors": (lambda: changed(vectors=plain().vectors | {Q: (draw(2).double(), draw(6))})(), r"d in torch\.float64"),
    "rank": (changed(config=VeraConfig(rank=3)), r'"h\.0\.q_proj" has d of length 2, its config says rank 3'),
    "rank pattern": (
        changed(config=VeraConfig(rank={"v_proj": 2})),
        r'"h\.0\.q_proj" has d of length 2, its config says rank None',
    ),
    "seed": (changed(config=VeraConfig(rank=2, seed=1)), "seed 1, .* its basis says"),
    "length of b": (
        lambda: changed(vectors=plain().vectors | {Q: (draw(2), draw(5))})(),
        "b of length 5, its base has 6 outputs",
    ),
    "two dimensions": (lambda: changed(vectors=plain().vectors | {Q: (draw(2, 1), draw(6))})(), r"d of shape \(2, 1\)"),
    "unknown layer": (
        lambda: changed(vectors=plain().vectors | {"h.0.q_pro": (draw(2), draw(6))})(),
        r'"h\.0\.q_pro" is in no layer.*"h\.0\.q_proj"',
    ),
    "layer without vectors": (
        rebased(layers=SHAPES | {"h.3": (1, 1)}),
        r'"h\.3" is among its base\'s layers, and has no vectors',
    ),
    "no vectors": (lambda: changed(vectors={}, base=BaseModel())(), "it has no vectors"),
    "unknown inputs": (
        rebased(layers={k: (m, 0) for k, (m, _) in SHAPES.items()}),
        "isn't known: load the adapter into its base model",
    ),
    "parts too long": (
        lambda: changed(parts, vectors=parts().vectors | {"h.0.c_attn:k": (draw(2), draw(5))})(),
        "13 of 12 outputs",
    ),
    "empty part": (lambda: changed(parts, vectors=parts().vectors | {"h.0.c_attn:k": (draw(2), draw(0))})(), "b of length 0"),
    "layer ids of shared": (changed(layer_ids={Q: 5}), "1 layer ids for 4 units, with sharing='shared'"),
    "layer id missing": (changed(unique, layer_ids={Q: 5}), "1 layer ids for 4 units, with sharing='unique'"),
    "layer id zero": (changed(unique, layer_ids=dict.fromkeys(SHAPES, 0)), "a layer id is outside"),
    "hash of a stranger": (rebased(hashes={"h.9": "00"}), r'weight hash of "h\.9"'),
    "bias length": (changed(biases={Q: draw(5)}), r"bias of .* shape \(5,\)"),
    "bias whole numbers": (changed(biases={Q: torch.arange(6)}), "bias of .* is torch.int64"),
    "bias NaN": (changed(biases={Q: torch.full((6,), float("nan"))}), "biases hold NaN"),
    "complex module": (changed(modules={"m": {"k": torch.zeros(2, dtype=torch.complex64)}}), r'"m\.k" is torch\.complex64'),
    "sparse module": (changed(modules={"m": {"k": torch.zeros(2, 2).to_sparse()}}), r"torch\.sparse_coo"),
    "notes no text": (changed(notes={"a": 1}), "must be text"),
    "half a surrogate": (changed(notes={"a": "\ud800"}), "surrogates not allowed"),
    "size of a native basis": (changed(basis=Basis(rank=2)), "which only PEFT's has"),
    "narrow pair": (
        changed(peft, basis=Basis("peft", 7, rank=2, max_in=5, max_out=7)),
        r"\(2, 5, 7\), its vectors and layers need \(2, 6, 6\)",
    ),
    "huge pair": (changed(peft, basis=Basis("peft", 7, rank=2, max_in=2**31, max_out=7)), "more than 1073741824 entries"),
    "shape of the pair": (
        lambda: changed(peft_stored, basis=dataclasses.replace(peft_stored().basis, max_in=7))(),
        "A and B have shapes",
    ),
    "NaN in the pair": (
        lambda: changed(
            peft_stored, basis=dataclasses.replace(peft_stored().basis, stored=StoredPair(draw(2, 6) * float("nan"), draw(6, 2)))
        )(),
        "A or B holds NaN",
    ),
    "one name twice": (lambda: changed(modules={"a": {"b.c": draw(1)}, "a.b": {"c": draw(1)}})(), "one name"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_an_adapter_that_contradicts_itself_is_not_saved(name, tmp_path):
    adapter, message = CONTRADICTIONS[name]
    save_adapter(plain(), tmp_path)
    with pytest.raises(AdapterFileError, match=message):
        save_adapter(adapter(), tmp_path)
    assert same(load_adapter(tmp_path), plain())


def test_several_faults_are_listed_together(tmp_path):
    adapter = dataclasses.replace(plain(), config=VeraConfig(rank=3, seed=1), layer_ids={Q: 5})
    with pytest.raises(AdapterFileError, match=r'"h\.0\.q_proj" has d .*"h\.0\.v_proj" has d .*; and more\. Nothing was written'):
        save_adapter(adapter, tmp_path)
