import dataclasses
import json
import pickle
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import randomise, tiny_bert, tiny_gpt2, tiny_llama, tokens
from tests.interop.folders import TOLERANCE, VARIANTS, Variant, biased_llama, distance, logits, make, peft_logits, trained
from veralib import VeraConfig, attach, load_adapter, save_adapter
from veralib.errors import AdapterFileError, AdapterMismatch, ConfigError, StateError, VeraWarning
from veralib.interop.parse import adapter_from_peft, require_shapes, with_shapes
from veralib.interop.peft import config_from_peft, from_peft, read_peft, write_peft

# PEFT's about save_projection; ours where a PEFT folder of a nameless model says nothing of its base.
pytestmark = pytest.mark.filterwarnings("ignore:Specified to not:UserWarning", "ignore:adapter .* doesn't say which model")


def ours(base, adapter) -> torch.Tensor:
    vera = attach(base)
    vera.load(adapter, name="a")
    vera.use("a")
    return logits(base)


# Reading


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


def edit_config(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(folder, change):
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


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


# Writing native adapters

NATIVE = {
    "Llama, query and value": (tiny_llama, dict(targets=["q_proj", "v_proj"])),
    "Llama, all linears, scaled": (tiny_llama, dict(targets="all-linear", scale=3.0)),
    "Llama, rank above every width": (tiny_llama, dict(targets=["k_proj", "down_proj"], rank=70)),
    "Llama, a seed beyond torch's": (tiny_llama, dict(targets=["q_proj"], seed=2**64 - 1, levels="kaiming_normal")),
    "BERT with its head": (tiny_bert, dict(targets=["query", "dense"], train_modules=["classifier"], levels="uniform")),
    "GPT-2, whole Conv1D": (tiny_gpt2, dict(targets=["c_attn", "c_proj"], levels="rademacher", layers=[1])),
    "PEFT's own basis": (tiny_llama, dict(targets=["q_proj", "down_proj"], basis="peft", seed=5)),
}


@pytest.mark.parametrize("name", NATIVE)
def test_peft_loads_what_we_write_with_equal_logits(name, tmp_path):
    base, settings = NATIVE[name]
    model = base()
    plain = logits(model)
    vera = attach(model, VeraConfig(**(dict(rank=8, seed=3) | settings)))
    randomise(vera, "default", size=0.5)
    for module in vera.adapter().modules:
        torch.nn.init.normal_(vera.inside.head(module, vera.member(None)).weight)
    expected = logits(model)
    write_peft(vera.adapter(), tmp_path)
    assert distance(expected, plain) > 100 * TOLERANCE
    assert distance(peft_logits(base(), tmp_path), expected) < TOLERANCE
    # And back: what PEFT saves of it is the same adapter.
    assert distance(ours(base(), read_peft(tmp_path, base())), expected) < TOLERANCE


def test_peft_basis_goes_to_peft_as_a_seed_alone(tmp_path):
    vera = attach(tiny_llama(), VeraConfig(rank=8, seed=5, targets=["q_proj", "down_proj"], basis="peft"))
    randomise(vera, "default")
    adapter = vera.adapter()
    write_peft(adapter, tmp_path / "seed")
    write_peft(adapter, tmp_path / "stored", save_projection=True)
    assert not any("vera_A" in k for k in load_file(tmp_path / "seed" / "adapter_model.safetensors"))
    stored = load_file(tmp_path / "stored" / "adapter_model.safetensors")
    assert torch.equal(stored["base_model.vera_A"], adapter.basis.A(8, 48))
    assert distance(peft_logits(tiny_llama(), tmp_path / "seed"), peft_logits(tiny_llama(), tmp_path / "stored")) == 0


def test_second_adapter_of_a_peftmodel_is_written_with_its_part_of_the_pair(tmp_path):
    """PEFT gives it the first one's larger pair and saves all of it, so PEFT itself can't load that folder."""
    model = peft.get_peft_model(tiny_llama(), peft.VeraConfig(r=4, target_modules=["down_proj"]))
    model.add_adapter("small", peft.VeraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    model.set_adapter("small")
    trained(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft_logits(tiny_llama(), tmp_path / "small")
    adapter = read_peft(tmp_path / "small", tiny_llama())
    assert adapter.basis.stored is None and adapter.basis.max_in == 48
    assert distance(ours(tiny_llama(), adapter), expected) < TOLERANCE
    write_peft(adapter, tmp_path / "written")
    assert distance(peft_logits(tiny_llama(), tmp_path / "written"), expected) < TOLERANCE
    with pytest.raises(ConfigError, match="can't grow"):
        write_peft(adapter, tmp_path / "written", save_projection=False)


def test_keys_of_native_adapters_tell_their_pairs_apart(tmp_path):
    """Else PEFT, which has one pair for all adapters of a model, would overwrite one with the other in silence."""
    keys = []
    for i, (seed, levels) in enumerate([(0, "kaiming_uniform"), (1, "kaiming_uniform"), (0, "rademacher"), (0, "rademacher")]):
        vera = attach(tiny_llama(), VeraConfig(rank=4, seed=seed, levels=levels, targets=["q_proj"]))
        write_peft(vera.adapter(), tmp_path / str(i))
        keys.append(json.loads((tmp_path / str(i) / "adapter_config.json").read_text())["projection_prng_key"])
    assert len(set(keys)) == 3 and keys[2] == keys[3]


@pytest.mark.parametrize(
    ("base", "settings", "says"),
    [
        (tiny_gpt2, dict(targets=["c_attn:q", "c_attn:v"]), r'parts of fused linears \("transformer.h.0.attn.c_attn:q" and'),
        (tiny_llama, dict(targets=["q_proj", "v_proj"], rank={"q_proj": 4, "v_proj": 8}), r"different ranks \(4, 8\)"),
        (tiny_llama, dict(targets=["q_proj"], sharing="unique"), "sharing='unique'"),
    ],
)
def test_what_peft_has_no_place_for_is_refused_with_lora_offered(base, settings, says, tmp_path):
    vera = attach(base(), VeraConfig(**(dict(rank=4) | settings)))
    with pytest.raises(AdapterFileError, match=f"{says}.*to_lora.*--to lora"):
        write_peft(vera.adapter(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_failed_write_leaves_the_old_folder(tmp_path, monkeypatch):
    vera = attach(tiny_llama(), VeraConfig(rank=4, targets=["q_proj"]))
    write_peft(vera.adapter(), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    randomise(vera, "default")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(AdapterFileError, match="No space left"):
        write_peft(vera.adapter(), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


# Taking over a live PeftModel


@pytest.mark.parametrize("name", [n for n, v in VARIANTS.items() if not v.saving and "bias" not in n])
def test_from_peft_keeps_the_logits(name):
    variant = VARIANTS[name]
    model = trained(peft.get_peft_model(variant.base(), peft.VeraConfig(r=6, **variant.config)))
    expected = logits(model)
    vera = from_peft(model)
    assert distance(logits(vera.model), expected) < TOLERANCE
    assert vera.active == "default" and vera.names == ("default",)
    vera.use(None)
    assert distance(logits(vera.model), logits(variant.base())) == 0
    vera.detach()
    base = variant.base().state_dict()
    assert vera.model.state_dict().keys() == base.keys()
    assert all(torch.equal(v, base[k]) for k, v in vera.model.state_dict().items())


def test_from_peft_takes_every_adapter_and_trains_the_active_one():
    model = peft.get_peft_model(tiny_llama(), peft.VeraConfig(r=4, target_modules=["q_proj"]), adapter_name="one")
    model.add_adapter("two", peft.VeraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"]))
    expected = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        trained(model, seed=len(expected))
        expected[name] = logits(model)
    vera = from_peft(model)
    assert vera.names == ("one", "two") and vera.active == "two"
    for name in ("one", "two"):
        vera.use(name)
        assert distance(logits(vera.model), expected[name]) < TOLERANCE
    assert vera.member("two").trainable and not vera.member("one").trainable
    vera.use("two")
    vera.model(tokens(), labels=tokens()).loss.backward()
    grads = [p.grad for p in vera.model.parameters() if p.requires_grad]
    assert grads and all(g is not None and g.abs().sum() > 0 for g in grads)


def test_from_peft_with_trained_biases_warns_that_the_base_s_are_gone():
    model = trained(peft.get_peft_model(biased_llama(), peft.VeraConfig(r=4, target_modules=["q_proj"], bias="vera_only")))
    expected = logits(model)
    with pytest.warns(VeraWarning, match="biases of the base model in place"):
        vera = from_peft(model)
    assert distance(logits(vera.model), expected) < TOLERANCE
    assert len(vera.adapter().biases) == 2
    assert distance(ours(biased_llama(), vera.adapter()), expected) < TOLERANCE


def test_from_peft_knows_the_base_by_its_weights():
    """Unlike a folder, so nothing is left to warn of, and the adapter isn't loaded into another base later."""
    model = trained(peft.get_peft_model(tiny_llama(), peft.VeraConfig(r=4, target_modules=["q_proj"])))
    with warnings.catch_warnings():
        warnings.simplefilter("error", VeraWarning)
        adapter = from_peft(model).adapter()
    assert len(adapter.base.hashes) == 2
    with pytest.raises(AdapterMismatch, match="other weights"):
        attach(tiny_llama(seed=1)).load(adapter)


def test_from_peft_with_adapters_switched_off_stays_on_the_base():
    model = trained(peft.get_peft_model(tiny_llama(), peft.VeraConfig(r=4, target_modules=["q_proj"])))
    model.base_model.disable_adapter_layers()
    vera = from_peft(model)
    assert vera.active is None and distance(logits(vera.model), logits(tiny_llama())) == 0


def test_from_peft_refuses_what_it_cant_take_over():
    vera_config = peft.VeraConfig(r=4, target_modules=["q_proj"])
    with pytest.raises(ConfigError, match="LlamaForCausalLM"):
        from_peft(tiny_llama())
    with pytest.raises(ConfigError, match='"default" is a LORA adapter'):
        from_peft(peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=4, target_modules=["q_proj"])))
    merged = peft.get_peft_model(tiny_llama(), vera_config)
    merged.merge_adapter()
    with pytest.raises(StateError, match="unmerge_adapter"):
        from_peft(merged)
    two = peft.get_peft_model(tiny_llama(), vera_config)
    two.add_adapter("other", vera_config)
    two.base_model.set_adapter(["default", "other"])
    with pytest.raises(StateError, match="adds up 2 adapters"):
        from_peft(two)
    assert isinstance(two, peft.PeftModel) and any("vera_lambda" in n for n, _ in two.named_parameters())


# PEFT's config


def test_attach_with_peft_s_config_is_peft_s_vera():
    config = peft.VeraConfig(r=6, target_modules=["q_proj", "down_proj"], projection_prng_key=9, layers_to_transform=[1])
    theirs = trained(peft.get_peft_model(tiny_llama(), config))
    model = tiny_llama()
    vera = attach(model, config)
    assert [u.unit for u in vera.member(None).layout.units] == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.down_proj",
    ]
    state = {n: p for n, p in theirs.named_parameters() if "lambda" in n}
    with torch.no_grad():
        for unit in vera.member(None).layout.units:
            for vector, which in zip(vera.member(None).vectors(unit.unit), "db", strict=True):
                vector.copy_(state[f"base_model.model.{unit.unit}.vera_lambda_{which}.default"])
    assert distance(logits(model), logits(theirs)) < TOLERANCE


def test_peft_config_is_translated_field_by_field():
    config = peft.VeraConfig(
        r=3, target_modules=["v", "q"], projection_prng_key=4, vera_dropout=0.2, d_initial=0.3, layers_to_transform=2,
        modules_to_save=["head"],
    )  # fmt: skip
    assert config_from_peft(config) == VeraConfig(
        rank=3, targets=("q", "v"), seed=4, dropout=0.2, d_initial=0.3, layers=(2,), train_modules=("head",), basis="peft"
    )
    assert config_from_peft(peft.VeraConfig()).targets is None
    assert config_from_peft(peft.VeraConfig(), tiny_gpt2()).targets == ("c_attn",)
    assert config_from_peft(peft.VeraConfig(task_type="SEQ_CLS"), tiny_bert()).train_modules == ("classifier",)
    with pytest.warns(VeraWarning, match="layers_pattern"):
        config_from_peft(peft.VeraConfig(target_modules=["q"], layers_to_transform=[0], layers_pattern="h"))
    with pytest.raises(ConfigError, match=r"bias='vera_only'.*init_weights=False"):
        config_from_peft(peft.VeraConfig(bias="vera_only", init_weights=False))
    with pytest.raises(ConfigError, match="LORA"):
        config_from_peft(peft.LoraConfig())


# Bad folders


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


def test_seed_decides_where_no_projection_is_saved(tmp_path):
    expected = make(VARIANTS["projections not saved"], tmp_path)
    edit_config(tmp_path, projection_prng_key=1)
    assert distance(ours(tiny_llama(), tmp_path), expected) > 100 * TOLERANCE


def test_adapter_from_peft_names_where_it_read():
    with pytest.raises(AdapterFileError, match=r"^here: r is None"):
        adapter_from_peft({"peft_type": "VERA"}, {}, "here")


def test_attach_takes_from_the_model_what_peft_would():
    import peft

    from tests.conftest import tiny_bert, tiny_gpt2

    vera = attach(tiny_bert(), peft.VeraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS"))
    assert vera.member(None).heads == ("classifier",)
    units = [u.unit for u in attach(tiny_gpt2(), peft.VeraConfig(r=4)).member(None).layout.units]
    assert units == [n for n, _ in tiny_gpt2().named_modules() if n.endswith("c_attn")]


def test_saving_over_a_folder_of_pefts_is_refused(tmp_path):
    import peft

    from tests.conftest import tiny_bert

    peft.get_peft_model(tiny_bert(), peft.VeraConfig(r=4, target_modules=["query"])).save_pretrained(tmp_path)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    vera = attach(tiny_bert(), VeraConfig(rank=4, targets=["query"]))
    randomise(vera, "default")
    with pytest.raises(AdapterFileError, match="PEFT saved"):
        vera.save(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before
