"""A live PeftModel taken over, and PEFT's own config."""

import warnings

import peft
import pytest
import torch

from tests.conftest import tiny_bert, tiny_gpt2, tiny_llama, tokens
from tests.interop.folders import TOLERANCE, VARIANTS, biased_llama, distance, logits, ours, trained
from veralib import VeraConfig, attach
from veralib.errors import AdapterMismatch, ConfigError, StateError, VeraWarning
from veralib.interop.peft import config_from_peft, from_peft

# PEFT's about save_projection; ours where a PEFT folder of a nameless model says nothing of its base.
pytestmark = pytest.mark.filterwarnings("ignore:Specified to not:UserWarning", "ignore:adapter .* doesn't say which model")


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


def test_attach_takes_from_the_model_what_peft_would():
    import peft

    from tests.conftest import tiny_bert, tiny_gpt2

    vera = attach(tiny_bert(), peft.VeraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS"))
    assert vera.member(None).heads == ("classifier",)
    units = [u.unit for u in attach(tiny_gpt2(), peft.VeraConfig(r=4)).member(None).layout.units]
    assert units == [n for n, _ in tiny_gpt2().named_modules() if n.endswith("c_attn")]
