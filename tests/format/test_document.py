"""docs/FORMAT.md says what the code does."""

import dataclasses
import hashlib
import json
import re

import numpy as np
import pytest
import torch

from tests.format.reader import (
    DOC,
    plain_byte,
    plain_delta,
    plain_fingerprint,
    plain_levels,
)
from tests.format.samples import (
    parts,
    peft,
    plain,
    ranks,
    unique,
    with_head,
)
from veralib import checks, container
from veralib.adapter import Adapter, BaseModel
from veralib.basis import SCALE_RULES, Basis, level_table, peft_pair
from veralib.config import VeraConfig
from veralib.format import FORMAT_VERSION, load_adapter, read_header, save_adapter
from veralib.header import BASE_KEYS, BASIS_KEYS, METADATA_KEYS


@pytest.mark.parametrize("sample", [plain, parts, ranks, unique, with_head])
def test_a_reader_written_from_the_document_agrees(sample, tmp_path):
    adapter = sample()
    raw = save_adapter(adapter, tmp_path).read_bytes()
    for unit in adapter.vectors:
        assert np.allclose(plain_delta(raw, unit), adapter.delta(unit).numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("levels", list(SCALE_RULES))
@pytest.mark.parametrize("seed", [0, 1099511627783, 2**64 - 1])
def test_the_documents_fingerprint_and_levels_are_the_codes(levels, seed):
    assert plain_fingerprint({"seed": str(seed), "levels": levels}) == Basis(seed=seed, levels=levels).fingerprint()
    assert plain_levels(levels) == level_table(levels).tolist()


def test_the_documents_magnitudes_in_numbers_are_those_in_hex():
    block = re.search(r"and as numbers:\n\n```text\n(.*?)```", DOC, re.S)[1]
    numbers = [np.float32(w) for line in block.splitlines() for w in line.split()[1:]]
    assert len(numbers) == 128 and numbers == plain_levels("kaiming_normal")[128:]


def first_column(after, header):
    """The code in the first column of the table with this header, after this text of the document."""
    start = DOC.index(f"| {header} |", DOC.index(after))
    rows = DOC[start:].split("\n\n")[0].splitlines()[2:]
    return [re.findall("`(.+?)`", row.split("|")[1]) for row in rows]


def test_the_documents_tables_name_what_the_code_knows():
    assert [k for (k,) in first_column("## Metadata", "key")] == list(METADATA_KEYS)
    assert [k for (k,) in first_column("## Metadata", "field of `config`")] == [f.name for f in dataclasses.fields(VeraConfig)]
    assert [k for (k,) in first_column("## Metadata", "field of `basis`")] == list(BASIS_KEYS)
    assert [k for (k,) in first_column("## Metadata", "field of `base`")] == list(BASE_KEYS)
    assert {d for row in first_column("## Container", "dtype") for d in row} == set(container.DTYPES)
    assert [k for (k,) in first_column("### Kind `philox-u8`", "levels")] == [
        "kaiming_uniform",
        "kaiming_normal",
        "uniform",
        "rademacher",
    ]
    rules = dict(re.findall(r"\| `(\w+)` \| `(.+?)` \|", DOC[DOC.index("### Scale") :].split("\n\n(")[0]))
    assert rules == SCALE_RULES
    limits = dict(
        re.findall(r"\| (header|dimensions of a tensor|length of a dimension|entries of a `peft` pair[^|]*?) \| (\S+)", DOC)
    )
    assert list(limits.values()) == [f"{container.MAX_HEADER:,}", str(container.MAX_DIMENSIONS), "2⁴⁰", "2³⁰"]
    assert (container.MAX_DIMENSION, checks.MAX_PAIR) == (2**40, 2**30)
    assert f"format {FORMAT_VERSION}\n" in DOC.splitlines(keepends=True)[0]


def test_the_documents_example_is_the_file_that_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("veralib.header.library_version", lambda: "veralib 0.1.0")
    example = DOC[DOC.index("## A worked example") :]
    first, fingerprint, data, delta = re.findall(r"```text\n(.*?)\n```", example, re.S)
    header, checked = re.findall(r"```json\n(.*?)\n```", example, re.S)
    base = BaseModel("org/model", "main", {"h.0.q_proj": (3, 4)}, {"h.0.q_proj": "0123456789abcdef"})
    vectors = {"h.0.q_proj": (torch.tensor([0.1, -0.25]), torch.tensor([1.0, 0.5, -2.0]))}
    adapter = Adapter(VeraConfig(rank=2, targets=["q_proj"]), Basis(), base, vectors)
    raw = save_adapter(adapter, tmp_path).read_bytes()
    assert f"a file of {len(raw)} bytes" in example and f"`{raw[:8].hex(' ')}`" in example
    assert raw[8:-20].decode().rstrip() == header and raw[-20:].hex(" ") == data
    assert hashlib.sha256(checked.encode() + raw[-20:]).hexdigest() == json.loads(header)["__metadata__"]["checksum"]
    assert Basis().fingerprint() == fingerprint
    assert bytes(plain_byte(0, 0, 0, j) for j in range(16)).hex(" ") == first
    assert [plain_byte(0, 1, 0, j) for j in range(2)] == [0xE1, 0x15]
    assert np.allclose([[float(x) for x in row.split()] for row in delta.splitlines()], adapter.delta("h.0.q_proj"), atol=6e-5)


def test_canonical_json_escapes_as_the_document_says():
    text = '"\\/\n\r\t\b\f\x00\x1f ~\x7fé€😀'
    assert container.canonical({"b": [1, -2], "a": text, "B": None}) == (
        r'{"B":null,"a":"\"\\/\n\r\t\b\f\u0000\u001f ~\u007f\u00e9\u20ac\ud83d\ude00","b":[1,-2]}'
    )


def test_the_pair_that_pefts_seed_gives_is_not_in_the_file(tmp_path):
    adapter = peft()
    save_adapter(adapter, tmp_path)
    assert not any(name.startswith("basis.") for name in read_header(tmp_path).tensors)
    A, B = peft_pair(adapter.basis)
    loaded = load_adapter(tmp_path)
    assert torch.equal(loaded.basis.A(2, 8), A) and torch.equal(loaded.basis.B(7, 2), B)
