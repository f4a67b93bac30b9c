"""What we write for PEFT: it loads with equal logits, or is refused with a way out."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import randomise, tiny_bert, tiny_gpt2, tiny_llama
from tests.interop.folders import TOLERANCE, distance, logits, ours, peft_logits, trained
from veralib import VeraConfig, attach
from veralib.errors import AdapterFileError, ConfigError
from veralib.interop.peft import read_peft, write_peft

# PEFT's about save_projection; ours where a PEFT folder of a nameless model says nothing of its base.
pytestmark = pytest.mark.filterwarnings("ignore:Specified to not:UserWarning", "ignore:adapter .* doesn't say which model")


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
