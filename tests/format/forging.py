"""Files that were damaged, and files with a right checksum that other software wrote, or someone who wants to harm."""

import io
import json
import struct

import pytest
import torch

from tests.format.reader import canonical, pack
from tests.format.samples import unpack
from veralib import container
from veralib.errors import AdapterFileError
from veralib.format import load_adapter, save_adapter


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
