"""PEFT's VeRA folders, read: equal logits, whatever saved them, and many in one model."""

import dataclasses
import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import tiny_bert, tiny_gpt2, tiny_llama, tokens
from tests.interop.folders import (
    TOLERANCE,
    VARIANTS,
    Variant,
    distance,
    edit_config,
    edit_tensors,
    logits,
    make,
    ours,
    peft_logits,
)
from veralib import StateError, VeraConfig, attach, load_adapter, save_adapter
from veralib.errors import AdapterFileError, AdapterMismatch
from veralib.interop.parse import adapter_from_peft, require_shapes, with_shapes
from veralib.interop.peft import read_peft, write_peft

# PEFT's about save_projection; ours where a PEFT folder of a nameless model says nothing of its base.
pytestmark = pytest.mark.filterwarnings("ignore:Specified to not:UserWarning", "ignore:adapter .* doesn't say which model")


@pytest.mark.parametrize("name", VARIANTS)
def test_peft_folder_loads_with_equal_logits(name, tmp_path):
    variant = VARIANTS[name]
    expected = make(variant, tmp_path)
    assert distance(expected, logits(variant.base())) > 100 * TOLERANCE
    assert distance(ours(variant.base(), tmp_path), expected) < TOLERANCE


@pytest.mark.parametrize("name", VARIANTS)
def test_peft_folder_survives_a_round_trip(name, tmp_path):
    """PEFT -> Adapter -> veralib file -> Adapter -> PEFT: the same vectors, basis, biases, modules, and logits in PEFT."""
    variant = VARIANTS[name]
    expected = make(variant, tmp_path / "peft")
    first = read_peft(tmp_path / "peft", variant.base())
    save_adapter(first, tmp_path / "file.safetensors")
    write_peft(load_adapter(tmp_path / "file.safetensors"), tmp_path / "back")
    second = read_peft(tmp_path / "back", variant.base())
    assert second.basis == first.basis and second.basis.fingerprint() == first.basis.fingerprint()
    assert second.base == first.base and second.config.rank == first.config.rank
    for a, b in zip(tensors_of(first), tensors_of(second), strict=True):
        assert torch.equal(a, b)
    assert distance(peft_logits(variant.base(), tmp_path / "back"), expected) < TOLERANCE


def tensors_of(adapter):
    out = [t for unit in sorted(adapter.vectors) for t in adapter.vectors[unit]]
    out += [adapter.biases[k] for k in sorted(adapter.biases)]
    return out + [adapter.modules[m][k] for m in sorted(adapter.modules) for k in sorted(adapter.modules[m])]


def test_variants_cover_every_kind_of_folder():
    assert len(VARIANTS) == 15


def test_saved_projections_that_the_seed_gives_are_dropped(tmp_path):
    make(VARIANTS["projections saved"], tmp_path)
    adapter = read_peft(tmp_path)
    assert "base_model.vera_A" in load_file(tmp_path / "adapter_model.safetensors")
    assert adapter.basis.stored is None
    assert (adapter.basis.rank, adapter.basis.max_in, adapter.basis.max_out) == (6, 32, 32)


def test_projections_that_no_seed_gives_are_stored_and_travel(tmp_path):
    """As from another platform, or from a bf16 base, where PEFT rounds A and B and saves the rounded ones."""
    variant = VARIANTS["layers of several shapes"]
    variant = Variant(variant.base, dict(target_modules=["q_proj", "down_proj"]))
    make(variant, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.vera_A"] = tensors["base_model.vera_A"].bfloat16().float()
    save_file(tensors, file)
    expected = peft_logits(variant.base(), tmp_path)
    adapter = read_peft(tmp_path, variant.base())
    assert torch.equal(adapter.basis.stored.A, tensors["base_model.vera_A"])
    save_adapter(adapter, tmp_path / "file.safetensors")
    again = load_adapter(tmp_path / "file.safetensors")
    assert distance(ours(variant.base(), again), expected) < TOLERANCE
    write_peft(again, tmp_path / "back")
    assert distance(peft_logits(variant.base(), tmp_path / "back"), expected) < TOLERANCE


def test_bf16_base_is_as_close_to_float32_as_peft_is(tmp_path):
    def bf16():
        return tiny_llama().bfloat16()

    theirs = make(Variant(bf16, dict(target_modules=["q_proj", "down_proj"])), tmp_path).float()
    exact = peft_logits(bf16().float(), tmp_path)
    assert distance(ours(bf16(), tmp_path).float(), exact) < 1.5 * distance(theirs, exact)
    assert distance(ours(bf16().float(), tmp_path), exact) < TOLERANCE


def test_base_id_and_revision_are_carried_over(tmp_path):
    make(VARIANTS["projections not saved"], tmp_path / "in")
    edit_config(tmp_path / "in", base_model_name_or_path="user/base", revision="abc")
    adapter = read_peft(tmp_path / "in")
    assert (adapter.base.id, adapter.base.revision) == ("user/base", "abc")
    write_peft(adapter, tmp_path / "out")
    fields = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (fields["base_model_name_or_path"], fields["revision"]) == ("user/base", "abc")


@pytest.mark.parametrize(
    "prefix", ["", "module.base_model.model.", "base_model.model.base_model.model.", "base_model.model._orig_mod."]
)
def test_keys_are_read_whatever_wraps_the_model(prefix, tmp_path):
    expected = make(VARIANTS["projections not saved"], tmp_path)
    edit_tensors(tmp_path, lambda t: {prefix + k.removeprefix("base_model.model."): v for k, v in t.items()})
    assert distance(ours(tiny_llama(), tmp_path), expected) < TOLERANCE


def test_resized_embeddings_that_peft_adds_are_modules(tmp_path):
    make(VARIANTS["projections not saved"], tmp_path)
    table = torch.randn(64, 32)
    edit_tensors(tmp_path, lambda t: t | {"base_model.model.model.embed_tokens.weight": table})
    adapter = read_peft(tmp_path)
    assert torch.equal(adapter.modules["model.embed_tokens"]["weight"], table)


def test_layers_pattern_becomes_the_layers_names(tmp_path):
    """Which index PEFT's pattern picks isn't ours to guess: the file says which layers it picked."""
    make(VARIANTS["layers_pattern"], tmp_path / "a")
    config = read_peft(tmp_path / "a").config
    assert (config.targets, config.layers) == (("model.layers.1.self_attn.k_proj",), None)
    make(VARIANTS["layers_to_transform"], tmp_path / "b")
    config = read_peft(tmp_path / "b").config
    assert (config.targets, config.layers) == (("k_proj", "up_proj"), (1,))


def test_task_and_orientation_survive_a_round_trip(tmp_path):
    make(VARIANTS["classification head"], tmp_path / "in")
    write_peft(read_peft(tmp_path / "in", tiny_bert()), tmp_path / "out")
    loaded = peft.PeftModel.from_pretrained(tiny_bert(), tmp_path / "out")
    assert isinstance(loaded, peft.PeftModelForSequenceClassification)
    make(VARIANTS["Conv1D"], tmp_path / "conv")
    adapter = read_peft(tmp_path / "conv", tiny_gpt2())
    for name, notes in (("noted", adapter.notes), ("guessed", {})):
        write_peft(dataclasses.replace(adapter, notes=notes), tmp_path / name)
        assert json.loads((tmp_path / name / "adapter_config.json").read_text())["fan_in_fan_out"] is True


# Shapes that the files don't say


def test_shapes_stay_open_without_a_model_and_come_from_it(tmp_path):
    make(VARIANTS["layers of several shapes"], tmp_path)
    open_ = read_peft(tmp_path)
    assert {n for _, n in open_.base.layers.values()} == {0} and open_.basis.max_in == 0
    closed = read_peft(tmp_path, tiny_llama())
    assert closed.base.layers["model.layers.0.mlp.down_proj"] == (32, 48) and closed.basis.max_in == 48
    with pytest.raises(AdapterMismatch, match=r"how many inputs .* read_peft\(folder, model=model\)"):
        require_shapes(open_, "this")


def test_model_with_other_layers_is_refused(tmp_path):
    make(VARIANTS["layers of several shapes"], tmp_path)
    with pytest.raises(AdapterMismatch, match=r'down_proj" has 32 outputs in the adapter, 64 in the model.*and \d more'):
        read_peft(tmp_path, tiny_llama(hidden_size=64))
    with pytest.raises(AdapterMismatch, match=r'no linear "model.layers.0.mlp.down_proj".*Known'):
        read_peft(tmp_path, tiny_gpt2())


def test_layer_wider_than_the_stored_pair_is_refused(tmp_path):
    make(VARIANTS["projections saved"], tmp_path)
    adapter = read_peft(tmp_path)
    shapes = {layer: (m, 33) for layer, (m, _) in adapter.base.layers.items()}
    with pytest.raises(AdapterMismatch, match="33 inputs, PEFT's A has 32 columns"):
        with_shapes(adapter, shapes)


# Many from PEFT in one model, which PEFT can't do


def test_peft_adapters_of_other_seeds_ranks_and_targets_share_one_model(tmp_path):
    kinds = {
        "a": (dict(target_modules=["q_proj", "v_proj"], projection_prng_key=1), 4),
        "b": (dict(target_modules=["q_proj", "down_proj"], projection_prng_key=2, save_projection=False), 9),
        "c": (dict(target_modules="all-linear", projection_prng_key=3), 2),
    }
    expected = {
        name: make(Variant(tiny_llama, config), tmp_path / name, r=r, seed=i)
        for i, (name, (config, r)) in enumerate(kinds.items())
    }
    model = tiny_llama()
    plain = logits(model)
    vera = attach(model)
    for name in kinds:
        vera.load(tmp_path / name, name=name)
    for name in kinds:
        vera.use(name)
        assert distance(logits(model), expected[name]) < TOLERANCE
    vera.use(None)
    with vera.rows(["c", None, "a", "b"]), torch.no_grad():
        mixed = model(tokens()).logits
    for row, want in enumerate([expected["c"], plain, expected["a"], expected["b"]]):
        assert distance(mixed[row], want[row]) < TOLERANCE


def test_seed_decides_where_no_projection_is_saved(tmp_path):
    expected = make(VARIANTS["projections not saved"], tmp_path)
    edit_config(tmp_path, projection_prng_key=1)
    assert distance(ours(tiny_llama(), tmp_path), expected) > 100 * TOLERANCE


def test_adapter_from_peft_names_where_it_read():
    with pytest.raises(AdapterFileError, match=r"^here: r is None"):
        adapter_from_peft({"peft_type": "VERA"}, {}, "here")


def test_pefts_own_layers_after_attach_are_refused_when_training_begins():
    """What SFTTrainer(peft_config=…) does: the adapter would be frozen without a word."""
    model = tiny_llama()
    vera = attach(model, VeraConfig(rank=4, targets=["q_proj"]))
    model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    vera.detach()
    attach(model, VeraConfig(rank=4, targets=["q_proj"]))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["v_proj"])).train()
    with pytest.raises(StateError, match="PEFT has put layers of its own into this model"):
        wrapped(input_ids=tokens(), labels=tokens())
