"""The adapter file: what is saved loads as the same adapter, and everything else is refused by a sentence that helps."""

import dataclasses
import hashlib
import io
import json
import os
import pickle
import re
import resource
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from veralib import checks, container, format
from veralib.adapter import Adapter, BaseModel
from veralib.basis import SCALE_RULES, Basis, StoredPair, clear_cache, layer_id_of, level_table, peft_pair
from veralib.config import VeraConfig
from veralib.errors import AdapterFileError, VeraError, VeraWarning
from veralib.format import FILE_NAME, FORMAT_VERSION, load_adapter, read_header, save_adapter

DOC = (Path(__file__).parents[1] / "docs" / "FORMAT.md").read_text()
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


def pack(header, data, seal=True):
    """A file of these parts; seal: with the checksum that fits them."""
    if seal and "__metadata__" in header:
        header["__metadata__"]["checksum"] = plain_checksum(header, data)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


# A second reader, from docs/FORMAT.md alone: Python and its standard library, nothing of veralib's.


def canonical(value):
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def plain_checksum(header, data):
    entries = {k: v for k, v in header.items() if k != "__metadata__"}
    metadata = {k: v for k, v in header["__metadata__"].items() if k != "checksum"}
    names = sorted(entries)
    digest = hashlib.sha256(canonical([metadata, [[n, entries[n]["dtype"], entries[n]["shape"]] for n in names]]).encode())
    for name in names:
        begin, end = entries[name]["data_offsets"]
        digest.update(data[begin:end])
    return digest.hexdigest()


def plain_philox(counter, seed):
    c, k = list(counter), [seed % 2**32, seed >> 32]
    for _ in range(10):
        p, q = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [q >> 32 ^ c[1] ^ k[0], q % 2**32, p >> 32 ^ c[3] ^ k[1], p % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def plain_byte(seed, matrix, i, j, layer_id=0):
    return plain_philox((j // 16, i, matrix, layer_id), seed)[j % 16 // 4] >> 8 * (j % 4) & 255


def plain_levels(levels):
    if levels == "kaiming_normal":
        block = re.search(r"in hex, from index 0:\n\n```text\n(.*?)```", DOC, re.S)[1]
        words = [w for line in block.splitlines() for w in line.split()[1:]]
        up = [struct.unpack("<f", struct.pack("<I", int(w, 16) << 16))[0] for w in words]
        return [-m for m in reversed(up)] + up
    rule = {
        "kaiming_uniform": lambda v: (2 * v - 255) / 256,
        "uniform": lambda v: v / 256,
        "rademacher": lambda v: 1 if v > 127 else -1,
    }
    return [rule[levels](v) for v in range(256)]


def plain_fingerprint(basis):
    seed, rules = int(basis["seed"]), dict(re.findall(r"\| `(\w+)` \| `(.+?)` \|", DOC[DOC.index("### Scale") :]))
    digest = hashlib.sha256(bytes(plain_byte(seed, 0, i, j) for i in range(16) for j in range(64)))
    digest.update(bytes(plain_byte(seed, 1, i, j) for i in range(64) for j in range(16)))
    digest.update(struct.pack("<256f", *plain_levels(basis["levels"])))
    digest.update(rules[basis["levels"]].encode())
    return digest.hexdigest()


def plain_delta(raw, unit):
    """s Λ_b B Λ_d A of one unit of a file on the native basis, as lists; its checksum and fingerprint checked."""
    header, data = unpack(raw)
    metadata = {
        k: v if k in ("checksum", "fingerprint", "format", "library") else json.loads(v)
        for k, v in header["__metadata__"].items()
    }
    assert metadata["checksum"] == plain_checksum(header, data)
    assert metadata["fingerprint"] == plain_fingerprint(metadata["basis"])

    def vector(name):
        assert header[name]["dtype"] == "F32"
        begin, end = header[name]["data_offsets"]
        return struct.unpack(f"<{(end - begin) // 4}f", data[begin:end])

    d, b = vector(f"{unit}.d"), vector(f"{unit}.b")
    n, layer_id = metadata["base"]["layers"][unit.partition(":")[0]][1], metadata["layer_ids"].get(unit, 0)
    seed, levels = int(metadata["basis"]["seed"]), plain_levels(metadata["basis"]["levels"])
    rule = {"6/sqrt(n*r)": 6 / (n * len(d)) ** 0.5, "2/sqrt(n*r)": 2 / (n * len(d)) ** 0.5, "0.01": 0.01}
    s = metadata["config"]["scale"] * rule[SCALE_RULES[metadata["basis"]["levels"]]]
    A = [[levels[plain_byte(seed, 0, k, j, layer_id)] for j in range(n)] for k in range(len(d))]
    B = [[levels[plain_byte(seed, 1, i, k, layer_id)] for k in range(len(d))] for i in range(len(b))]
    return [[sum(b[i] * B[i][k] * s * d[k] * A[k][j] for k in range(len(d))) for j in range(n)] for i in range(len(b))]


# What is saved


@pytest.mark.parametrize("sample", SAMPLES)
def test_what_is_saved_loads_as_the_same_adapter(sample, tmp_path):
    adapter = sample()
    file = save_adapter(adapter, tmp_path / "a.safetensors")
    clear_cache()
    loaded = load_adapter(file)
    assert same(loaded, adapter)
    assert all(v.dtype == torch.float32 for pair in loaded.vectors.values() for v in pair)
    again = save_adapter(loaded, tmp_path / "b.safetensors")
    assert again.read_bytes() == file.read_bytes()
    assert all(torch.equal(loaded.delta(u), adapter.delta(u)) for u in adapter.vectors if sample is not peft_stored)


def test_same_tells_adapters_apart():
    one, other = plain(), plain()
    assert same(one, other)
    other.vectors["h.0.q_proj"][1][2] += 1
    assert not same(one, other) and not same(one, ranks())


@pytest.mark.parametrize("sample", SAMPLES)
def test_the_safetensors_library_reads_the_same_tensors(sample, tmp_path):
    from safetensors import safe_open

    adapter = sample()
    with safe_open(save_adapter(adapter, tmp_path), "pt") as f:
        found = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
        assert f.metadata().keys() == set(format.METADATA_KEYS)
    extra = {"basis.A", "basis.B"} if adapter.basis.stored else set()
    assert len(found) == len(flat(adapter)) + len(extra) and extra <= found.keys()
    assert all(torch.equal(found[f"{u}.d"], d) and torch.equal(found[f"{u}.b"], b) for u, (d, b) in adapter.vectors.items())


def test_a_file_that_the_safetensors_library_wrote_anew_still_loads(tmp_path):
    """Another order of header and tensors doesn't touch the checksum."""
    from safetensors.torch import load, save

    adapter = with_head()
    raw = save_adapter(adapter, tmp_path).read_bytes()
    other = save(load(raw), metadata=unpack(raw)[0]["__metadata__"])
    assert other != raw
    (tmp_path / FILE_NAME).write_bytes(other)
    assert same(load_adapter(tmp_path), adapter)


@pytest.mark.parametrize("path", ["deep/er/a.safetensors", "deep/folder", "folder.v2"])
@pytest.mark.parametrize("kind", [Path, str, os.fsencode])
def test_a_path_is_a_safetensors_file_or_a_folder(path, kind, tmp_path):
    file = save_adapter(plain(), kind(tmp_path / path))
    assert file == tmp_path / path if path.endswith(".safetensors") else file == tmp_path / path / FILE_NAME
    assert same(load_adapter(kind(tmp_path / path)), plain()) and same(load_adapter(file), plain())


def test_a_folder_named_like_a_file_is_a_folder(tmp_path):
    (tmp_path / "a.safetensors").mkdir()
    assert save_adapter(plain(), tmp_path / "a.safetensors") == tmp_path / "a.safetensors" / FILE_NAME


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_halves_the_vectors_and_loads_as_float32(dtype, tmp_path):
    adapter = with_head()
    file = save_adapter(adapter, tmp_path, dtype=dtype)
    entries = read_header(file).tensors
    assert all(e.end - e.begin == 2 * e.shape[0] for name, e in entries.items() if not name.startswith("module."))
    loaded = load_adapter(file)
    for unit, pair in adapter.vectors.items():
        assert all(torch.equal(a, b.to(dtype).float()) for a, b in zip(loaded.vectors[unit], pair, strict=True))
    assert torch.equal(loaded.modules["classifier"]["t"], adapter.modules["classifier"]["t"])


def test_half_precision_that_overflows_is_refused_and_an_unknown_dtype_too(tmp_path):
    adapter = plain()
    adapter.vectors["h.0.q_proj"][0][0] = 1e6
    with pytest.raises(AdapterFileError, match=r"float16 a vector overflows.*Save it as torch\.float32"):
        save_adapter(adapter, tmp_path, dtype=torch.float16)
    with pytest.raises(AdapterFileError, match=r"dtype is torch\.int8, expected one of torch\.float32"):
        save_adapter(adapter, tmp_path, dtype=torch.int8)
    assert os.listdir(tmp_path) == []


def test_a_sum_that_overflows_is_not_taken_for_inf(tmp_path):
    adapter = plain()
    for d, b in adapter.vectors.values():
        d.fill_(3e38), b.fill_(3e38)
    save_adapter(adapter, tmp_path)
    assert same(load_adapter(tmp_path), adapter)


def test_vectors_that_track_gradients_can_be_saved(tmp_path):
    adapter = plain()
    for pair in adapter.vectors.values():
        [v.requires_grad_() for v in pair]
    save_adapter(adapter, tmp_path)
    loaded = load_adapter(tmp_path)
    assert same(loaded, adapter) and not any(v.requires_grad for pair in loaded.vectors.values() for v in pair)


def test_a_loaded_adapter_is_one_block_of_memory_and_pickles_small(tmp_path):
    save_adapter(with_head(), tmp_path)
    adapter = load_adapter(tmp_path)
    assert len({t.untyped_storage().data_ptr() for t in flat(adapter).values() if t.numel()}) == 1
    text = pickle.dumps(adapter)
    assert same(pickle.loads(text), with_head())
    assert len(text) < len(pickle.dumps(with_head())) + 2000


def test_read_header_says_the_same_without_the_data(tmp_path):
    adapter = with_head()
    file = save_adapter(adapter, tmp_path)
    header = read_header(tmp_path)
    assert (header.config, header.base, header.notes) == (adapter.config, adapter.base, adapter.notes)
    assert (header.version, header.file, header.file_bytes) == (FORMAT_VERSION, file, file.stat().st_size)
    assert header.fingerprint == adapter.basis.fingerprint() and header.library.startswith("veralib")
    assert header.modules == {"classifier": tuple(adapter.modules["classifier"]), "pooler": ()}
    assert header.tensors["module.classifier.dense.weight"][:2] == ("BF16", (3, 5))
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1  # it reads no data, so it can't see this
    file.write_bytes(raw)
    assert read_header(file) == header
    with pytest.raises(AdapterFileError, match="damaged"):
        load_adapter(file)


# docs/FORMAT.md


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
    assert [k for (k,) in first_column("## Metadata", "key")] == list(format.METADATA_KEYS)
    assert [k for (k,) in first_column("## Metadata", "field of `config`")] == [f.name for f in dataclasses.fields(VeraConfig)]
    assert [k for (k,) in first_column("## Metadata", "field of `basis`")] == list(format.BASIS_KEYS)
    assert [k for (k,) in first_column("## Metadata", "field of `base`")] == list(format.BASE_KEYS)
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
    monkeypatch.setattr(format, "library_version", lambda: "veralib 0.1.0")
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


# Saving: what is refused, and what stays


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    file = save_adapter(plain(), tmp_path / "a.safetensors")
    before = file.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # the kernel refuses bytes after these, as a full disk does
    try:
        with pytest.raises(AdapterFileError, match=r"can't write .*a\.safetensors: File too large\. The old file is as it was"):
            save_adapter(with_head(), file)
        with pytest.raises(AdapterFileError, match=r"Nothing was written; make room"):
            save_adapter(with_head(), tmp_path / "b.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == ["a.safetensors"] and file.read_bytes() == before


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failure_at_the_last_moment_leaves_the_old_file_and_nothing_else(call, tmp_path, monkeypatch):
    file = save_adapter(plain(), tmp_path / "a.safetensors")
    before = file.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(AdapterFileError, match="No space left on device"):
        save_adapter(parts(), file)
    assert os.listdir(tmp_path) == ["a.safetensors"] and file.read_bytes() == before


def test_ctrl_c_while_writing_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    file = save_adapter(plain(), tmp_path / "a.safetensors")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save_adapter(parts(), file)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["a.safetensors"] and same(load_adapter(file), plain())


def test_a_path_that_cant_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for path in ("file/a.safetensors", "file", "a\0.safetensors", "x" * 300 + ".safetensors"):
        with pytest.raises(AdapterFileError, match=r"can't write .*choose another path"):
            save_adapter(plain(), tmp_path / path)
    assert os.listdir(tmp_path) == ["file"]


def test_the_file_has_the_rights_that_the_umask_gives(tmp_path):
    old = os.umask(0o027)
    try:
        file = save_adapter(plain(), tmp_path)
    finally:
        os.umask(old)
    assert file.stat().st_mode & 0o777 == 0o640


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


# Loading: files that aren't, or not quite


def expect(raw, message, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(raw)
    with pytest.raises(AdapterFileError, match=message) as caught:
        load_adapter(tmp_path / "x.safetensors")
    assert str(tmp_path / "x.safetensors") in str(caught.value)


def bytes_of(sample, tmp_path):
    return save_adapter(sample(), tmp_path / "good.safetensors").read_bytes()


def edited(change, seal=False):
    """The bytes after a change to the header (metadata parsed one level down under "meta") and the data."""

    def edit(raw):
        header, data = unpack(raw)
        data = change(header, header.get("__metadata__"), data) or data
        return pack(header, data, seal)

    return edit


def swap(header, one, other):
    header[one], header[other] = header[other], header[one]


def twice(raw):
    size = int.from_bytes(raw[:8], "little")
    text = raw[8 : 8 + size].rstrip()[:-1] + b',"h.0.q_proj.d":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    return struct.pack("<Q", len(text)) + text + raw[8 + size :]


def torch_bytes(_):
    out = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, out)
    return out.getvalue()


def other_model(_):
    from safetensors.torch import save

    return save({"weight": torch.zeros(2)}, metadata={"format": "pt"})


def peft_file(_):
    from safetensors.torch import save

    return save({"base_model.model.q_proj.vera_lambda_d": torch.zeros(2)}, metadata={"format": "pt"})


def deep(_):
    text = b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    return struct.pack("<Q", len(text)) + text


def meta(key, value):
    def change(header, metadata, data):
        metadata[key] = value

    return change


def entry(name, **fields):
    def change(header, metadata, data):
        header[name].update(fields)

    return change


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


def basis_meta(**fields):
    def change(header, metadata, data):
        metadata["basis"] = canonical(json.loads(metadata["basis"]) | fields)

    return change


def base_meta(**fields):
    def change(header, metadata, data):
        metadata["base"] = canonical(json.loads(metadata["base"]) | fields)

    return change


def config_meta(**fields):
    def change(header, metadata, data):
        metadata["config"] = canonical(json.loads(metadata["config"]) | fields)

    return change


def rename(old, new):
    def change(header, metadata, data):
        header[new] = header.pop(old)

    return change


def retype(name, dtype):
    """The tensor's bytes as another dtype; its neighbours stay where they are."""

    def change(header, metadata, data):
        size = container.SIZES[dtype]
        begin, end = header[name]["data_offsets"]
        header[name] |= {"dtype": dtype, "shape": [(end - begin) // size]}

    return change


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


def test_a_tensor_at_an_odd_address_loads(tmp_path):
    """Only veralib's own writer aligns."""
    adapter = with_head()
    header, data = unpack(bytes_of(with_head, tmp_path))
    metadata, at, shuffled = header.pop("__metadata__"), 0, {"__metadata__": None}
    chunks = []
    for name in sorted(header, key=lambda n: (container.SIZES[header[n]["dtype"]], n)):
        begin, end = header[name]["data_offsets"]
        shuffled[name] = header[name] | {"data_offsets": [at, at + end - begin]}
        chunks.append(data[begin:end])
        at += end - begin
    assert any(e["data_offsets"][0] % container.SIZES[e["dtype"]] for k, e in shuffled.items() if k != "__metadata__")
    shuffled["__metadata__"] = metadata
    (tmp_path / FILE_NAME).write_bytes(pack(shuffled, b"".join(chunks), seal=False))
    assert same(load_adapter(tmp_path), adapter)


def test_the_data_of_a_file_that_is_no_adapter_is_not_read(tmp_path):
    """64 GiB of nothing: a base model given by mistake."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [2**36], "data_offsets": [0, 2**36]}}).encode()
    with open(tmp_path / "x.safetensors", "wb") as f:
        f.write(struct.pack("<Q", len(header)) + header)
        f.truncate(8 + len(header) + 2**36)
    with pytest.raises(AdapterFileError, match="no veralib adapter"):
        load_adapter(tmp_path / "x.safetensors")


def test_a_folder_that_trainer_wrote_is_read_by_its_own_name(tmp_path):
    save_adapter(plain(), tmp_path / "model.safetensors")
    assert same(load_adapter(tmp_path), plain())
    save_adapter(parts(), tmp_path)
    assert same(load_adapter(tmp_path), parts())


def test_a_missing_file_is_answered_with_the_nearest_name(tmp_path):
    save_adapter(plain(), tmp_path / "mrpc.safetensors")
    with pytest.raises(AdapterFileError, match=r'there is no file "mprc\.safetensors"\. Did you mean "mrpc\.safetensors"\?'):
        load_adapter(tmp_path / "mprc.safetensors")
    with pytest.raises(AdapterFileError, match=r'no file "adapter_model\.safetensors".*Known: "mrpc\.safetensors"'):
        load_adapter(tmp_path)
    with pytest.raises(AdapterFileError, match=r"there is no folder .*nowhere"):
        load_adapter(tmp_path / "nowhere" / "x.safetensors")
    for path in ("a\0b", ""):
        with pytest.raises(AdapterFileError, match="there is no file"):
            load_adapter(path)


def test_a_folder_of_pefts_without_safetensors_names_the_way_to_read_it(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterFileError, match=r"looks like a folder of PEFT's: vera\.load\(.* and vera convert"):
        load_adapter(tmp_path)


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(AdapterFileError, match="no regular file"):
        load_adapter(tmp_path / "pipe.safetensors")


def test_every_error_is_a_veralib_error():
    assert issubclass(AdapterFileError, VeraError)


def test_a_regular_expression_in_a_file_is_never_run(tmp_path):
    """(a+)+$ takes 2**n steps on n letters a."""
    layer = "a" * 40 + "b"
    adapter = make(VeraConfig(rank={"(a+)+$": 1, ".": 2}), Basis(), {"x": (2, 4)})
    header, data = unpack(save_adapter(adapter, tmp_path).read_bytes())
    metadata = header.pop("__metadata__")
    base = json.loads(metadata["base"]) | {"layers": {layer: [2, 4]}, "hashes": {}}
    header = {k.replace("x", layer, 1): v for k, v in header.items()}
    (tmp_path / FILE_NAME).write_bytes(pack(header | {"__metadata__": metadata | {"base": canonical(base)}}, data))
    assert list(load_adapter(tmp_path).vectors) == [layer]


def test_the_pair_that_pefts_seed_gives_is_not_in_the_file(tmp_path):
    adapter = peft()
    save_adapter(adapter, tmp_path)
    assert not any(name.startswith("basis.") for name in read_header(tmp_path).tensors)
    A, B = peft_pair(adapter.basis)
    loaded = load_adapter(tmp_path)
    assert torch.equal(loaded.basis.A(2, 8), A) and torch.equal(loaded.basis.B(7, 2), B)
