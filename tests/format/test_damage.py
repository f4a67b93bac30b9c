"""Every damaged or forged file is refused by a sentence that helps."""

import struct

import pytest

from tests.format.forging import (
    base_meta,
    basis_meta,
    bytes_of,
    config_meta,
    deep,
    edited,
    entry,
    expect,
    meta,
    other_model,
    peft_file,
    rename,
    retype,
    swap,
    torch_bytes,
    twice,
)
from tests.format.reader import canonical
from tests.format.samples import SAMPLES, SHAPES, peft, peft_stored, plain, ranks, same, unique, with_head
from veralib.config import VeraConfig
from veralib.errors import AdapterFileError
from veralib.format import FILE_NAME, load_adapter, save_adapter

DAMAGE = {
    "empty": (lambda raw: b"", r"is empty\. Copy or download"),
    "five bytes": (lambda raw: raw[:5], "is truncated: it has 5 bytes"),
    "cut in the header": (lambda raw: raw[:300], "is truncated: it has 300 bytes, and its header alone takes"),
    "cut in the data": (lambda raw: raw[:-9], "is truncated: it holds 99 of 108 bytes of data"),
    "bytes at the end": (lambda raw: raw + b"\0", "1 bytes follow the last tensor"),
    "text": (lambda raw: b"hello, world " * 9, "is no safetensors file: its first 8 bytes"),
    "torch.save": (torch_bytes, "is no safetensors file"),
    "Git LFS pointer": (lambda raw: b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer.*git lfs pull"),
    "no JSON": (lambda raw: struct.pack("<Q", 9) + b"{nonsense" + raw, "is damaged, or no safetensors file"),
    "no object": (lambda raw: struct.pack("<Q", 2) + b"[]", "no JSON object"),
    "no UTF-8": (lambda raw: struct.pack("<Q", 4) + b'{"\xff"', "is damaged, or no safetensors file"),
    "key twice": (twice, r'has the key "h\.0\.q_proj\.d" twice'),
    "nested too deeply": (deep, "nested too deeply"),
    "a number of 5000 digits": (lambda raw: struct.pack("<Q", 5006) + b'{"a":' + b"1" * 5000 + b"}", "is damaged"),
    "NaN in JSON": (edited(meta("x", float("nan"))), "holds NaN, which is no JSON number"),
    "half a surrogate": (edited(meta("x", "\ud800")), "is damaged"),
    "metadata no text": (edited(meta("x", 1)), "__metadata__ isn't text"),
    "metadata a list": (edited(lambda h, m, d: h.update(__metadata__=[])), "__metadata__ isn't text"),
    "gap": (
        edited(entry("h.10.out.d", data_offsets=[101, 109])),
        r'"h\.10\.out\.d" begins at byte 101 of the data, expected 100',
    ),
    "overlap": (edited(entry("h.0.q_proj.d", data_offsets=[20, 28])), "begins at byte"),
    "offsets turned": (edited(entry("h.0.q_proj.d", data_offsets=[32, 24])), "data_offsets that fit both"),
    "offsets below 0": (edited(entry("h.0.q_proj.d", data_offsets=[-8, 0])), "data_offsets that fit both"),
    "three offsets": (edited(entry("h.0.q_proj.d", data_offsets=[0, 8, 8])), "data_offsets that fit both"),
    "unknown dtype": (edited(entry("h.0.q_proj.d", dtype="F31")), r"expected dtype \(one of F64"),
    "dtype a list": (edited(entry("h.0.q_proj.d", dtype=[])), r"expected dtype \(one of F64"),
    "shape true": (edited(entry("h.0.q_proj.d", shape=[2, True])), "expected dtype"),
    "shape 2.0": (edited(entry("h.0.q_proj.d", shape=[2.0])), "expected dtype"),
    "shape of another size": (edited(entry("h.0.q_proj.d", shape=[3])), "expected dtype"),
    "shape of minus by minus": (edited(entry("h.0.q_proj.d", shape=[-2, -1])), "expected dtype"),
    "shape beyond reason": (edited(entry("h.0.q_proj.d", shape=[2**60, 0], data_offsets=[24, 24])), "expected dtype"),
    "nine dimensions": (edited(entry("h.0.q_proj.d", shape=[2] + [1] * 8)), "expected dtype"),
    "a field too many": (edited(entry("h.0.q_proj.d", more=1)), "expected dtype"),
    "an entry of text": (edited(lambda h, m, d: h.update({"h.0.q_proj.d": "F32"})), "expected dtype"),
    "another model": (other_model, "no veralib adapter: its metadata has no vera_format"),
    "PEFT's file": (peft_file, r"Hugging Face PEFT's VeRA.*vera\.load\(.*vera convert .* --to veralib"),
    "newer format": (
        edited(meta("vera_format", "2")),
        r"in adapter format 2; this veralib.* reads formats up to 1\. Upgrade: pip install -U",
    ),
    "format 0": (edited(meta("vera_format", "0")), "its adapter format is '0', expected 1"),
    "format of 5000 digits": (edited(meta("vera_format", "9" * 5000)), "its adapter format is"),
    "key missing": (edited(lambda h, m, d: m.pop("notes") and None), "lacks, or has too much, notes"),
    "key too many": (edited(meta("author", "x")), "lacks, or has too much, author"),
    "another scale": (
        edited(meta("config", canonical(VeraConfig(rank=2, scale=2.0).to_dict()))),
        "is damaged: its bytes have the checksum",
    ),
    "another note": (edited(meta("notes", '{"a":"b"}')), "is damaged: its bytes have the checksum"),
    "another library": (edited(meta("library", "x")), "is damaged: its bytes have the checksum"),
    "tensors swapped": (
        edited(lambda h, m, d: swap(h, "h.0.q_proj.d", "h.0.v_proj.d")),
        "is damaged: its bytes have the checksum",
    ),
    "tensor renamed": (
        edited(lambda h, m, d: h.update({"h.0.q_proj.e": h.pop("h.0.q_proj.d")})),
        "is damaged: its bytes have the checksum",
    ),
    "checksum": (edited(meta("checksum", "0" * 64)), "expected 0000000000000000…"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_refused(name, tmp_path):
    spoil, message = DAMAGE[name]
    raw = bytes_of(plain, tmp_path)
    spoiled = spoil(raw)
    assert spoiled != raw
    expect(spoiled, message, tmp_path)


# Files with a right checksum that contradict themselves: other software wrote them, or someone who wants to harm.
FORGED = {
    "fingerprint": (plain, meta("fingerprint", "0" * 64), "was trained with another A and B: .* seed 0 gives a63777327be69dde…"),
    "fingerprint of peft": (
        peft,
        meta("fingerprint", "0" * 64),
        "depends on torch's generator: load and save it where it was trained",
    ),
    "another seed": (plain, basis_meta(seed="1"), "seed 0, .* its basis says"),
    "a seed of letters": (plain, basis_meta(seed="x"), "seed is -1"),
    "a seed as number": (plain, basis_meta(seed=0), "its basis is"),
    "a seed of 5000 digits": (plain, basis_meta(seed="1" * 5000), "basis is wrong"),
    "another levels": (plain, basis_meta(levels="x"), "no basis of kind 'philox-u8' with levels 'x'"),
    "levels a list": (plain, basis_meta(levels=[]), "basis is wrong"),
    "another kind": (plain, basis_meta(kind="philox-u4"), "no basis of kind 'philox-u4'"),
    "a newer basis": (plain, basis_meta(version=2), "the basis has version 2, known is 1"),
    "a field of basis": (plain, basis_meta(extra=1), "lacks or adds a field"),
    "rank true": (peft, basis_meta(rank=True), "its basis is"),
    "rank below 0": (peft, basis_meta(rank=-1), "its basis is"),
    "a huge pair": (peft, basis_meta(max_in=2**31), "more than 1073741824 entries"),
    "stored, and nowhere": (peft, basis_meta(stored=True), r"says stored=True, and it has \[\] of A and B"),
    "not stored, and there": (peft_stored, basis_meta(stored=False), r"says stored=False, and it has \['A', 'B'\]"),
    "stored is 1": (peft_stored, basis_meta(stored=1), "says stored=1"),
    "A as float16": (peft_stored, retype("basis.A", "F16"), "aren't float32 matrices"),
    "a field of base": (plain, base_meta(extra=1), "lacks or adds a field"),
    "id a number": (plain, base_meta(id=1), "aren't text"),
    "layers a list": (plain, base_meta(layers=[]), "expected an object"),
    "a shape of one": (plain, base_meta(layers={"h.0.q_proj": [1]}), r"expected \[outputs, inputs\]"),
    "a shape of true": (plain, base_meta(layers={"h.0.q_proj": [True, 4]}), r"expected \[outputs, inputs\]"),
    "hashes of numbers": (plain, base_meta(hashes={"h.0.q_proj": 1}), "expected an object of str"),
    "other outputs": (plain, base_meta(layers=SHAPES | {"h.0.q_proj": [7, 4]}), "b of length 6, its base has 7 outputs"),
    "no inputs": (plain, base_meta(layers=SHAPES | {"h.0.q_proj": [6, 0]}), "isn't known"),
    "inputs below 0": (peft_stored, base_meta(layers=SHAPES | {"h.0.q_proj": [6, -1]}), "6 outputs and -1 inputs"),
    "another rank": (plain, config_meta(rank=3), "d of length 2, its config says rank 3"),
    "a field of config": (plain, config_meta(magnitude=True), 'there is no field "magnitude"'),
    "a wrong config": (plain, config_meta(rank=-1, dropout=2), "rank is -1.*dropout is 2"),
    "a pattern without end": (ranks, config_meta(rank={"(" * 5000 + ")" * 5000: 1}), "is no regular expression"),
    "config a list": (plain, meta("config", "[]"), "expected an object"),
    "config no JSON": (plain, meta("config", "{"), "metadata is wrong"),
    "config twice": (plain, meta("config", '{"rank":2,"rank":2}'), 'the key "rank" twice'),
    "notes of numbers": (plain, meta("notes", '{"a":1}'), "expected an object of str"),
    "modules of text": (plain, meta("modules", '{"a":"b"}'), "expected an object of list"),
    "modules of numbers": (plain, meta("modules", '{"a":[1]}'), "a key of modules isn't text"),
    "a module's tensor missing": (plain, meta("modules", '{"a":["k"]}'), r'has no tensor "module\.a\.k"'),
    "a module's tensor in two places": (plain, meta("modules", '{"a":["b.c"],"a.b":["c"]}'), "name a tensor twice"),
    "a module's tensor too many": (with_head, meta("modules", "{}"), r'nothing is known of its tensor "module\.classifier\.'),
    "layer ids": (plain, meta("layer_ids", '{"h.0.q_proj":1}'), "1 layer ids for 4 units"),
    "layer ids too large": (unique, meta("layer_ids", canonical(dict.fromkeys(SHAPES, 2**32))), "a layer id is outside"),
    "layer ids of 1.0": (unique, meta("layer_ids", canonical(dict.fromkeys(SHAPES, 1.0))), "expected an object of int"),
    "a later role": (
        plain,
        rename("h.0.q_proj.d", "h.0.q_proj.magnitude"),
        r'nothing is known of its tensor "h\.0\.q_proj\.magnitude"',
    ),
    "d of another layer": (plain, rename("h.0.q_proj.d", "h.7.q_proj.d"), r'nothing is known of its tensor "h\.7\.q_proj\.d"'),
    "b missing": (
        plain,
        rename("h.0.q_proj.b", "h.0.q_proj:x.b"),
        r'"h\.0\.q_proj:x" has b but not the other|"h\.0\.q_proj" has d but not the other',
    ),
    "d in whole numbers": (plain, retype("h.0.q_proj.d", "I32"), r'"h\.0\.q_proj\.d" is torch\.int32'),
    "d in bf16 of twice the length": (plain, retype("h.0.q_proj.d", "BF16"), "d of length 4, its config says rank 2"),
    "d as a matrix": (plain, entry("h.0.q_proj.d", shape=[2, 1]), r"d of shape \(2, 1\)"),
    "a bias of whole numbers": (peft, retype("h.0.v_proj.bias", "I32"), "bias of"),
    "BOOL of 2": (with_head, retype("module.classifier.bytes", "BOOL"), "bytes besides 0 and 1"),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_file_at_odds_with_itself_is_refused_though_its_checksum_is_right(name, tmp_path):
    sample, change, message = FORGED[name]
    raw = bytes_of(sample, tmp_path)
    forged = edited(change, seal=True)(raw)
    assert forged != raw
    expect(forged, message, tmp_path)


def test_resealing_an_untouched_file_changes_nothing(tmp_path):
    """Guards the table above: it is the change that is refused, not the way the test writes the file."""
    for sample in SAMPLES:
        (tmp_path / FILE_NAME).write_bytes(edited(lambda h, m, d: None, seal=True)(bytes_of(sample, tmp_path)))
        assert same(load_adapter(tmp_path), sample())


def test_every_flipped_bit_of_a_file_is_refused_or_means_nothing(tmp_path):
    adapter = plain()
    file = save_adapter(adapter, tmp_path)
    raw = bytearray(file.read_bytes())
    loaded = 0
    with open(file, "r+b", buffering=0) as f:
        for at in range(len(raw)):
            for bit in range(8):
                f.seek(at)
                f.write(bytes([raw[at] ^ 1 << bit]))
                try:
                    assert same(load_adapter(file), adapter), f"byte {at}, bit {bit}"
                    loaded += 1
                except AdapterFileError:
                    pass
            f.seek(at)
            f.write(raw[at : at + 1])
    assert same(load_adapter(file), adapter)
    assert loaded < 64  # hex digits of an escape, white space after the header
