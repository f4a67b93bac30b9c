"""What is saved loads as the same adapter; where saving fails, the old file stays."""

import os
import pickle
import resource
from pathlib import Path

import pytest
import torch

from tests.format.samples import SAMPLES, flat, parts, peft_stored, plain, ranks, same, unpack, with_head
from veralib.basis import clear_cache
from veralib.errors import AdapterFileError
from veralib.format import FILE_NAME, FORMAT_VERSION, load_adapter, read_header, save_adapter
from veralib.header import METADATA_KEYS


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
        assert f.metadata().keys() == set(METADATA_KEYS)
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
