"""Loading what isn't an adapter, isn't there, or lies oddly."""

import json
import os
import struct

import pytest

from tests.format.forging import bytes_of
from tests.format.reader import canonical, pack
from tests.format.samples import make, parts, plain, same, unpack, with_head
from veralib import container
from veralib.basis import Basis
from veralib.config import VeraConfig
from veralib.errors import AdapterFileError, VeraError
from veralib.format import FILE_NAME, load_adapter, save_adapter


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
