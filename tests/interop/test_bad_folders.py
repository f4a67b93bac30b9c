"""PEFT's folders that are damaged, dangerous or of another method."""

import pickle

import peft
import pytest
import torch

from tests.conftest import tiny_llama
from tests.interop.folders import TOLERANCE, VARIANTS, Variant, biased_llama, distance, edit_config, edit_tensors, make, ours
from veralib import attach
from veralib.errors import AdapterFileError, ConfigError
from veralib.interop.peft import read_peft
from veralib.store import open_store

# PEFT's about save_projection; ours where a PEFT folder of a nameless model says nothing of its base.
pytestmark = pytest.mark.filterwarnings("ignore:Specified to not:UserWarning", "ignore:adapter .* doesn't say which model")


def test_bias_all_is_refused_naming_the_tensors(tmp_path):
    make(Variant(biased_llama, dict(target_modules=["q_proj"], bias="all")), tmp_path)
    with pytest.raises(AdapterFileError, match=r"bias='all'.*model.layers.0.self_attn.k_proj.bias, .*merge_and_unload"):
        read_peft(tmp_path)


def test_bias_all_of_a_model_without_other_biases_loses_nothing(tmp_path):
    expected = make(Variant(tiny_llama, dict(target_modules=["q_proj"], bias="all")), tmp_path)
    assert distance(ours(tiny_llama(), tmp_path), expected) < TOLERANCE


@pytest.mark.parametrize("method", ["LORA", "PVERA"])
def test_another_method_s_folder_is_refused_by_name(method, tmp_path):
    config = {"LORA": peft.LoraConfig, "PVERA": peft.PveraConfig}[method](r=4, target_modules=["q_proj"])
    peft.get_peft_model(tiny_llama(), config).save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match=f"method {method} .*veralib reads VERA alone"):
        read_peft(tmp_path)
    for file in tmp_path.glob("adapter_model*"):
        file.unlink()
    with pytest.raises(AdapterFileError, match=f"method {method}"):  # whatever else is wrong, or large
        attach(tiny_llama()).load(tmp_path)


def drop(*endings):
    return lambda tensors: {k: v for k, v in tensors.items() if not k.endswith(endings)}


def put(ending, value):
    return lambda tensors: {k: (value(v) if k.endswith(ending) else v) for k, v in tensors.items()}


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), "holds no adapter_config.json"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "can't be read"),
        (lambda f: (f / "adapter_config.json").write_bytes(b"\xff\xfe\x00"), "can't be read"),
        (lambda f: (f / "adapter_config.json").write_text("[]"), "JSON list"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "neither adapter_model.safetensors nor"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\x00" * 9), "can't be read"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b""), "can't be read"),
        (lambda f: edit_config(f, peft_type=None), "method None"),
        (lambda f: edit_config(f, r=0), "r is 0"),
        (lambda f: edit_config(f, r=5), r"vera_lambda_d \(6,\) .* expected \(5,\)"),
        (lambda f: edit_config(f, projection_prng_key=None), "projection_prng_key is None"),
        (lambda f: edit_config(f, vera_dropout=2), "dropout is 2"),
        (lambda f: edit_tensors(f, drop("vera_lambda_d", "vera_lambda_b")), "no layer is adapted"),
        (lambda f: edit_tensors(f, drop("q_proj.vera_lambda_b")), "lacks its vera_lambda_b"),
        (lambda f: edit_tensors(f, drop("vera_B")), "vera_A alone"),
        (lambda f: edit_tensors(f, put("vera_A", lambda v: v[:5])), r"vera_A has shape \(5, 32\)"),
        (lambda f: edit_tensors(f, put("vera_B", lambda v: v[:31].clone())), r"vera_B \(31, 6\)"),
        (lambda f: edit_tensors(f, put("vera_lambda_b", lambda v: v * float("nan"))), "NaN or infinite"),
        (lambda f: edit_tensors(f, lambda t: t | {"model.layers.0.self_attn.q_proj": torch.ones(32)}), "no part of PEFT's VeRA"),
        (lambda f: edit_tensors(f, lambda t: t | {"x.lora_A": torch.ones(2)}), "no part of PEFT's VeRA: x.lora_A"),
    ],
)  # fmt: skip
def test_damaged_folder_is_an_error_of_ours(damage, says, tmp_path):
    make(VARIANTS["projections saved"], tmp_path)
    damage(tmp_path)
    with pytest.raises(AdapterFileError, match=says):
        read_peft(tmp_path)


def test_pickled_folder_runs_no_code(tmp_path):
    make(VARIANTS["pickled weights"], tmp_path)

    class Bad:
        def __reduce__(self):
            return (open, (str(tmp_path / "touched"), "w"))

    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Bad(), protocol=2))
    with pytest.raises(AdapterFileError, match="can't be read"):
        read_peft(tmp_path)
    assert not (tmp_path / "touched").exists()


def test_folder_without_projections_says_what_it_lacks_where_a_store_would_keep_it(tmp_path):
    make(VARIANTS["projections not saved"], tmp_path / "vera")
    with pytest.raises(ConfigError, match=r"rank 6, 0 inputs and .*vera\.load"):
        open_store(tmp_path / "store").put("ann", read_peft(tmp_path / "vera"))
