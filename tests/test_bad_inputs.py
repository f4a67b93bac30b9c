"""Bad input: a clear error of veralib's own, nothing half done. `python -m tests.test_bad_inputs` prints what a user sees."""

import json
import os
import struct
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import veralib
from tests.conftest import randomise, tiny_bert, tiny_llama, tokens
from veralib import VeraConfig, VeraError, attach, load_adapter, save_adapter

CASES: dict = {}


def case(title: str, error: type[Exception], *words: str):
    """Collects a function that must raise `error`, whose message holds every word."""

    def add(function):
        CASES[title] = (function, error, words)
        return function

    return add


def saved(folder: Path) -> Path:
    """A good adapter file for tiny_llama()."""
    model = tiny_llama()
    model.config._name_or_path = "tiny-llama"
    vera = attach(model, VeraConfig(rank=8, targets=["q_proj", "v_proj"]))
    randomise(vera, "default")
    return vera.save(folder / "good.safetensors")


def rewritten(file: Path, change) -> Path:
    """The file with its header's metadata changed, the checksum left as it was."""
    raw = file.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    change(header["__metadata__"])
    text = json.dumps(header, separators=(",", ":")).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])
    return file


@case("truncated file", veralib.AdapterFileError, "good.safetensors")
def _(folder):
    file = saved(folder)
    file.write_bytes(file.read_bytes()[:-100])
    load_adapter(file)


@case("empty file", veralib.AdapterFileError, "empty")
def _(folder):
    (folder / "empty.safetensors").touch()
    load_adapter(folder / "empty.safetensors")


@case("file that is no safetensors file", veralib.AdapterFileError, "notes.safetensors")
def _(folder):
    (folder / "notes.safetensors").write_text("just some text, long enough to look like a header perhaps")
    load_adapter(folder / "notes.safetensors")


@case("one flipped bit", veralib.AdapterFileError, "damaged")
def _(folder):
    file = saved(folder)
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes(raw)
    load_adapter(file)


@case("newer format version", veralib.AdapterFileError, "99", "Upgrade")
def _(folder):
    load_adapter(rewritten(saved(folder), lambda m: m.update(vera_format="99")))


@case("missing file", veralib.AdapterFileError, "godo.safetensors", "good.safetensors")
def _(folder):
    load_adapter(saved(folder).with_name("godo.safetensors"))


@case("adapter for a base with other layer names", veralib.AdapterMismatch, "layers", "query")
def _(folder):
    attach(tiny_bert()).load(saved(folder), name="alice")


@case("adapter for a base with other shapes", veralib.AdapterMismatch, "32", "64", "q_proj")
def _(folder):
    attach(tiny_llama(hidden_size=64)).load(saved(folder), name="alice")


@case(
    "adapter for other weights (another revision, a twin)",
    veralib.AdapterMismatch,
    "other weights",
    "allow_other_base",
)
def _(folder):
    attach(tiny_llama(seed=1)).load(saved(folder), name="alice")


@case("NaN in a vector, on save", VeraError, "NaN")
def _(folder):
    adapter = load_adapter(saved(folder))
    unit = next(iter(adapter.vectors))
    d, b = adapter.vectors[unit]
    save_adapter(replace(adapter, vectors={**adapter.vectors, unit: (d, b * float("nan"))}), folder / "bad.safetensors")


@case("PEFT's field name", veralib.ConfigError, "target_modules", "targets")
def _(folder):
    VeraConfig(rank=8, target_modules=["q_proj"])


@case("several faults in one config", veralib.ConfigError, "rank is 0", "kaiming_uniform", "dropout")
def _(folder):
    VeraConfig(rank=0, levels="kaiming", dropout=1.5)


@case("unknown target", veralib.ConfigError, "q_porj", "q_proj")
def _(folder):
    attach(tiny_llama(), VeraConfig(targets=["q_porj"]))


@case("regular expression that matches nothing", veralib.ConfigError, "nothing.*here")
def _(folder):
    attach(tiny_llama(), VeraConfig(targets="nothing.*here"))


@case("unknown module to train", veralib.UnknownName, "train_modules", "head", '"classifier"')
def _(folder):
    attach(tiny_bert(), VeraConfig(rank=8, targets=["query"], train_modules=["head"]))


@case("unknown adapter", veralib.UnknownName, "alcie", "alice")
def _(folder):
    vera = attach(tiny_llama())
    vera.load(saved(folder), name="alice")
    vera.use("alcie")


@case("rows() with the wrong number of names", veralib.StateError, "3 rows", "2")
def _(folder):
    model = tiny_llama()
    vera = attach(model)
    vera.load(saved(folder), name="alice")
    with vera.rows(["alice", None]):
        model(input_ids=tokens(3))


@case("merge while merged", veralib.StateError, "unmerge", "switch_merged")
def _(folder):
    vera = attach(tiny_llama())
    vera.load(saved(folder), name="alice")
    vera.merge("alice")
    vera.merge("alice")


@case("training while merged", veralib.StateError, "unmerge")
def _(folder):
    model = tiny_llama()
    vera = attach(model, VeraConfig(rank=8))
    randomise(vera, "default")
    vera.merge()
    model.train()(input_ids=tokens())


@case("attach on an attached model", veralib.StateError, "attached already")
def _(folder):
    model = tiny_llama()
    attach(model)
    attach(model)


@case("attach on a PeftModel", veralib.StateError, "from_peft")
def _(folder):
    from peft import LoraConfig, get_peft_model

    attach(get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])))


@case("unwritable path", veralib.AdapterFileError, "can't write", "choose another path")
def _(folder):
    (folder / "a_file").write_text("")
    save_adapter(load_adapter(saved(folder)), folder / "a_file" / "x.safetensors")


@case("a PEFT folder of another method", veralib.AdapterFileError, "LORA")
def _(folder):
    from peft import LoraConfig, get_peft_model

    get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(folder / "lora")
    attach(tiny_llama()).load(folder / "lora", name="alice")


@case("MultiheadAttention's out_proj as target", veralib.ConfigError, "MultiheadAttention")
def _(folder):
    attach(nn.Sequential(nn.MultiheadAttention(16, 2)), VeraConfig(rank=4, targets=["out_proj"]))


@case("merging a tied weight", veralib.StateError, "tied")
def _(folder):
    model = tiny_llama(tie_word_embeddings=True)
    vera = attach(model, VeraConfig(rank=4, targets=["lm_head"]))
    randomise(vera, "default")
    vera.merge()


@case("training file without the named column", veralib.DataError, "label", "text, kind")
def _(folder):
    train(folder, "text,kind\nhello,a\nthere,b\n")


@case("empty training file", veralib.DataError, "empty")
def _(folder):
    train(folder, "")


@case("a handle after detach", veralib.StateError, "detached", "attach(model)")
def _(folder):
    vera = attach(tiny_llama(), VeraConfig(rank=4, targets=["q_proj"]))
    vera.detach()
    vera.add(VeraConfig(rank=4, targets=["q_proj"]), name="late")


@case("rows() with something that is no name", veralib.ConfigError, "7")
def _(folder):
    attach(tiny_llama(), VeraConfig(rank=4, targets=["q_proj"])).rows([7])


@case("tokens() with fractions", veralib.ConfigError, "torch.float32", "whole numbers")
def _(folder):
    attach(tiny_llama(), VeraConfig(rank=4, targets=["q_proj"])).tokens(torch.zeros(4, 7), names=["default"])


@case("an Adapter with NaN", veralib.ConfigError, "NaN")
def _(folder):
    adapter = load_adapter(saved(folder))
    next(iter(adapter.vectors.values()))[0][0] = float("nan")
    attach(tiny_llama()).load(adapter, name="alice")


@case("attach to a name", veralib.ConfigError, "str", "load it first")
def _(folder):
    attach("gpt2", VeraConfig(rank=4))


@case("load nothing", veralib.ConfigError, "None", "hub id")
def _(folder):
    attach(tiny_llama()).load(None, name="alice")


@case("labels that training has never seen", veralib.DataError, "never seen", '"c"')
def _(folder):
    (folder / "dev.csv").write_text("text,label\nbye,c\n")
    train(folder, "text,label\nhello,a\nbye,b\n", validation=folder / "dev.csv")


@case("a full disk", veralib.AdapterFileError, "No space left")
def _(folder):
    adapter, sync = load_adapter(saved(folder)), os.fsync

    def full(_):
        raise OSError(28, "No space left on device")

    os.fsync = full
    try:
        save_adapter(adapter, folder / "good.safetensors")
    finally:
        os.fsync = sync


@case("unknown method", VeraError, "lroa", "lora")
def _(folder):
    train(folder, "text,label\nhello,a\n", method="lroa")


def train(folder: Path, text: str, **settings):
    from veralib.training import Settings
    from veralib.training import train as run

    (folder / "train.csv").write_text(text)
    tiny_bert().save_pretrained(folder / "model")
    run(Settings(**({"model": folder / "model", "data": folder / "train.csv", "output": folder / "out"} | settings)))


@pytest.mark.parametrize("title", CASES)
def test_bad_input_is_answered_in_words(title, tmp_path):
    function, error, words = CASES[title]
    with pytest.raises(error) as caught:
        function(tmp_path)
    assert isinstance(caught.value, VeraError)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_a_failed_load_leaves_the_model_as_it_was(tmp_path):
    good, model = saved(tmp_path), tiny_llama(seed=1)
    vera = attach(model)
    names, keys = vera.names, list(model.state_dict())
    for file in (good, tmp_path / "missing.safetensors"):
        with pytest.raises(VeraError):
            vera.load(file, name="alice")
    assert vera.names == names and list(model.state_dict()) == keys
    vera.load(good, name="alice", allow_other_base=True)
    assert vera.names == ("alice",)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    good = saved(tmp_path)
    before = good.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    adapter = load_adapter(good)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(veralib.AdapterFileError, match="No space left"):
        save_adapter(adapter, good)
    assert good.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["good.safetensors"]


def test_saving_vectors_that_never_moved_warns(tmp_path):
    vera = attach(tiny_llama(), VeraConfig(rank=4, targets=["q_proj"]))
    with pytest.warns(veralib.VeraWarning, match="never moved"):
        vera.save(tmp_path / "still.safetensors")


if __name__ == "__main__":
    import tempfile

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print("| bad input | what the user sees |\n|---|---|")
    for title, (function, _, _) in CASES.items():
        with tempfile.TemporaryDirectory() as scratch:
            try:
                function(Path(scratch))
                text = "NO ERROR"
            except Exception as e:
                text = f"{type(e).__name__}: {e}".replace(scratch, "…").replace("\n", " ").replace("|", "\\|")
        print(f"| {title} | {text} |")
