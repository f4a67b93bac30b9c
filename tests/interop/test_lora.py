import dataclasses
import json
from collections import Counter
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import randomise, tiny_bert, tiny_gpt2, tiny_llama
from tests.interop.folders import TOLERANCE, VARIANTS, Variant, biased_llama, distance, logits, make, peft_logits
from veralib import VeraConfig, attach
from veralib.errors import AdapterFileError, AdapterMismatch, ConfigError
from veralib.interop.lora import reduce, to_lora, truncate
from veralib.interop.peft import read_peft, write_peft

LAYER = "model.layers.0.self_attn.q_proj"


def adapted(base, **settings):
    """(vera, its logits) of a tiny model with an adapter as if trained."""
    model = base()
    vera = attach(model, VeraConfig(**(dict(rank=6, seed=1, targets=["q_proj", "v_proj"]) | settings)))
    randomise(vera, "default", size=0.5)
    for module in vera.adapter().modules:
        torch.nn.init.normal_(vera.inside.head(module, vera.member(None)).weight)
    return vera, logits(model)


def bigcode(multi_query=True):
    from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

    torch.manual_seed(0)
    config = GPTBigCodeConfig(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64, multi_query=multi_query)
    return GPTBigCodeForCausalLM(config).eval()


def neox():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=64, max_position_embeddings=64,
        intermediate_size=48,
    )  # fmt: skip
    return GPTNeoXForCausalLM(config).eval()


EXACT = {
    "query and value": (tiny_llama, {}),
    "all linears, rank above some widths": (tiny_llama, dict(targets="all-linear", rank=40)),
    "rank above every width": (tiny_llama, dict(targets="all-linear", rank=100)),
    "ranks that differ": (tiny_llama, dict(rank={"q_proj": 3, "v_proj": 20})),
    "unique bases": (tiny_llama, dict(sharing="unique")),
    "scaled, another level table": (tiny_llama, dict(scale=2.5, levels="kaiming_normal")),
    "PEFT's basis": (tiny_llama, dict(basis="peft")),
    "BERT with its head": (tiny_bert, dict(targets=["query", "dense"], train_modules=["classifier"])),
    "Conv1D": (tiny_gpt2, dict(targets=["c_attn", "c_proj"])),
    "parts of Conv1D": (tiny_gpt2, dict(targets=["c_attn:q", "c_attn:v"])),
    "parts with a basis each": (tiny_gpt2, dict(targets=["c_attn:q", "c_attn:v"], sharing="unique")),
    "parts of different ranks": (tiny_gpt2, dict(targets=["c_attn:q", "c_attn:v"], rank={":q": 3, ":v": 9})),
    "parts of different lengths": (bigcode, dict(targets=["c_attn:q", "c_attn:v"])),
    "interleaved parts": (neox, dict(targets=["query_key_value:q", "query_key_value:v", "dense"])),
}


@pytest.mark.parametrize("name", EXACT)
def test_peft_loads_the_exact_lora_with_equal_logits(name, tmp_path):
    base, settings = EXACT[name]
    vera, expected = adapted(base, **settings)
    report = to_lora(vera.adapter(), tmp_path, model=vera.model)
    assert report.error == 0 and "exact" in str(report)
    assert distance(expected, logits(base())) > 100 * TOLERANCE
    assert distance(peft_logits(base(), tmp_path), expected) < TOLERANCE
    for layer, (m, n) in vera.adapter().base.layers.items():
        assert report.ranks[layer] <= min(m, n)


@pytest.mark.parametrize("name", ["bias vera_only", "modules_to_save", "Conv1D, seed alone"])
def test_peft_s_own_folders_become_lora(name, tmp_path):
    variant = VARIANTS[name]
    expected = make(variant, tmp_path / "vera")
    to_lora(read_peft(tmp_path / "vera", variant.base()), tmp_path / "lora")
    assert distance(peft_logits(variant.base(), tmp_path / "lora"), expected) < TOLERANCE


def test_parts_that_share_a_keep_the_rank_and_others_add_up(tmp_path):
    for sharing, rank in (("shared", 6), ("unique", 12)):
        vera, _ = adapted(tiny_gpt2, targets=["c_attn:q", "c_attn:v"], sharing=sharing)
        assert set(to_lora(vera.adapter(), tmp_path, model=vera.model).ranks.values()) == {rank}


def test_rows_of_parts_come_from_the_base_s_config_or_are_refused(tmp_path):
    vera, expected = adapted(tiny_gpt2, targets=["c_attn:q", "c_attn:v"])
    with pytest.raises(AdapterMismatch, match=r"doesn't know its base model's id.*model="):
        to_lora(vera.adapter(), tmp_path)
    vera.model.config.save_pretrained(tmp_path / "base")
    vera.model.config._name_or_path = str(tmp_path / "base")
    to_lora(vera.adapter(), tmp_path / "lora")
    assert distance(peft_logits(tiny_gpt2(), tmp_path / "lora"), expected) < TOLERANCE
    to_lora(vera.adapter(), tmp_path / "lora", model=vera.model.config)
    with pytest.raises(AdapterMismatch, match=r'odd:q" has 32 outputs.*parts are \(none\)'):
        to_lora(renamed(vera.adapter()), tmp_path, model=vera.model)


def renamed(adapter):
    """The same adapter on layers whose name says nothing of parts."""

    def other(name):
        return name.replace("c_attn", "odd")

    layers = {other(k): v for k, v in adapter.base.layers.items()}
    base = dataclasses.replace(adapter.base, layers=layers)
    return dataclasses.replace(adapter, base=base, vectors={other(k): v for k, v in adapter.vectors.items()})


def test_lora_alpha_is_the_rank_layer_by_layer(tmp_path):
    vera, _ = adapted(tiny_llama, targets="all-linear", rank=40)
    report = to_lora(vera.adapter(), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == Counter(report.ranks.values()).most_common(1)[0][0]
    assert config["rank_pattern"] == config["alpha_pattern"] and len(set(report.ranks.values())) > 1
    for layer, r in report.ranks.items():
        assert config["rank_pattern"].get(layer, config["r"]) == r


def test_same_rank_pads_with_zeros_and_changes_nothing(tmp_path):
    vera, expected = adapted(tiny_llama, targets="all-linear", rank=40)
    to_lora(vera.adapter(), tmp_path, same_rank=True)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {}
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {t.shape[0] for k, t in tensors.items() if "lora_A" in k} == {config["r"]} == {config["lora_alpha"]}
    assert distance(peft_logits(tiny_llama(), tmp_path), expected) < TOLERANCE


# Cutting the rank


@pytest.mark.parametrize(("m", "n", "r"), [(9, 7, 4), (9, 7, 7), (9, 7, 30), (7, 9, 30), (9, 7, 8), (7, 9, 8)])
def test_truncate_is_the_best_approximation(m, n, r):
    torch.manual_seed(0)
    C, A = torch.randn(m, r), torch.randn(r, n)
    W = C.double() @ A.double()
    U, S, Vh = torch.linalg.svd(W)
    for k in (1, 3, min(m, n, r)):
        B, A_k, cut, whole = truncate(C, A, rank=k)
        assert B.shape == (m, k) and A_k.shape == (k, n)
        assert torch.allclose(B @ A_k, (U[:, :k] * S[:k]) @ Vh[:k], atol=1e-10)
        assert cut == pytest.approx(float(((W - B @ A_k) ** 2).sum()), abs=1e-9)
        assert whole == pytest.approx(float((W**2).sum()))
    B, A_k, *_ = truncate(C, A, rank=1000)
    assert B.shape[1] == min(m, n, r)


@pytest.mark.parametrize(("m", "n", "r"), [(9, 7, 4), (9, 7, 30), (7, 9, 30), (9, 7, 8), (7, 9, 8), (7, 7, 9)])
def test_reduce_is_exact_and_no_wider_than_the_matrix(m, n, r):
    torch.manual_seed(0)
    C, A = torch.randn(m, r), torch.randn(r, n)
    C_k, A_k = reduce(C, A)
    assert C_k.shape == (m, min(m, n, r)) and A_k.shape == (min(m, n, r), n)
    assert torch.allclose((C_k.double() @ A_k.double()), C.double() @ A.double(), atol=1e-9)


def test_energy_gives_the_least_rank_that_keeps_the_share(tmp_path):
    vera, _ = adapted(tiny_llama, rank=12)
    adapter = vera.adapter()
    for energy in (0.3, 0.9, 0.999):
        report = to_lora(adapter, tmp_path, energy=energy)
        for unit in adapter.vectors:
            squares = torch.linalg.svdvals(adapter.delta(unit, torch.float64)) ** 2
            share = squares.cumsum(0) / squares.sum()
            k = report.ranks[unit]
            assert share[k - 1] >= energy - 1e-9 and (k == 1 or share[k - 2] < energy)
            assert report.errors[unit] == pytest.approx(float((1 - share[k - 1]).clamp(min=0)) ** 0.5, abs=1e-6)


def test_reported_error_is_that_of_the_written_tensors(tmp_path):
    vera, _ = adapted(tiny_llama, rank=12)
    adapter = vera.adapter()
    report = to_lora(adapter, tmp_path, rank=3)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    lost = total = 0.0
    for unit in adapter.vectors:
        W = adapter.delta(unit, torch.float64)
        B, A = (tensors[f"base_model.model.{unit}.lora_{x}.weight"].double() for x in "BA")
        cut = float(((W - B @ A) ** 2).sum())
        assert report.errors[unit] == pytest.approx((cut / float((W**2).sum())) ** 0.5, rel=1e-5)
        lost, total = lost + cut, total + float((W**2).sum())
    assert report.error == pytest.approx((lost / total) ** 0.5, rel=1e-5) and report.error > 0.1
    assert "relative error" in str(report) and report.bytes == (tmp_path / "adapter_model.safetensors").stat().st_size


@pytest.mark.parametrize("how", [2, 5, 0.5, 0.95])
def test_cut_lora_is_no_worse_than_peft_s_own(how, tmp_path):
    """Against peft.convert_to_lora: its error, layer by layer, and the ranks it takes for a share of the energy."""
    variant = Variant(tiny_llama, dict(target_modules=["q_proj", "down_proj"]))
    make(variant, tmp_path / "vera", r=10)
    adapter = read_peft(tmp_path / "vera", tiny_llama())
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "vera")
    _, their_tensors = peft.convert_to_lora(theirs, how)
    report = to_lora(adapter, tmp_path / "lora", **({"rank": how} if isinstance(how, int) else {"energy": how}))
    our_tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert len(adapter.vectors) == 4
    for unit in adapter.vectors:
        W = adapter.delta(unit, torch.float64)

        def error(tensors, W=W, unit=unit):
            B, A = (tensors[f"base_model.model.{unit}.lora_{x}.weight"].double() for x in "BA")
            assert A.shape[0] == report.ranks[unit]
            return float((W - B @ A).norm() / W.norm())

        assert error(our_tensors) <= error(their_tensors) + 1e-6


def test_adapter_that_never_moved_becomes_a_lora_of_rank_one(tmp_path):
    vera = attach(tiny_llama(), VeraConfig(rank=6, targets=["q_proj"]))
    report = to_lora(vera.adapter(), tmp_path, energy=0.9)
    assert set(report.ranks.values()) == {1} and report.error == 0
    assert distance(peft_logits(tiny_llama(), tmp_path), logits(tiny_llama())) == 0


def test_modules_and_biases_go_along(tmp_path):
    vera, _ = adapted(tiny_bert, targets=["query"], train_modules=["classifier"])
    to_lora(vera.adapter(), tmp_path / "a", rank=2)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["classifier"]
    make(Variant(biased_llama, dict(target_modules=["q_proj"], bias="vera_only")), tmp_path / "vera")
    to_lora(read_peft(tmp_path / "vera", biased_llama()), tmp_path / "b", rank=2)
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["bias"] == "lora_only"
    assert f"base_model.model.{LAYER}.base_layer.bias" in load_file(tmp_path / "b" / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(rank=2, energy=0.5), "one of them"),
        (dict(rank=0), "rank is 0"),
        (dict(rank=1.5), "rank is 1.5"),
        (dict(energy=0.0), "energy is 0.0"),
        (dict(energy=1.1), "energy is 1.1"),
    ],
)
def test_wrong_rank_or_energy_is_refused(settings, says, tmp_path):
    vera, _ = adapted(tiny_llama)
    with pytest.raises(ConfigError, match=says):
        to_lora(vera.adapter(), tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_peft_folder_read_without_its_model_is_refused(tmp_path):
    make(VARIANTS["projections saved"], tmp_path)
    with pytest.raises(AdapterMismatch, match="how many inputs"):
        to_lora(read_peft(tmp_path), tmp_path / "lora")


def test_lora_folder_isn_t_read_back_as_vera(tmp_path):
    vera, _ = adapted(tiny_llama)
    to_lora(vera.adapter(), tmp_path)
    with pytest.raises(AdapterFileError, match="method LORA"):
        read_peft(tmp_path)


@pytest.mark.parametrize("write", [to_lora, write_peft])
def test_no_folder_of_pefts_is_written_over_a_veralib_adapter(tmp_path, write):
    vera, _ = adapted(tiny_llama, basis="peft")
    file = vera.save(tmp_path / "adapter_model.safetensors")
    before = Path(file).read_bytes()
    with pytest.raises(AdapterFileError, match="is a veralib adapter, which this would overwrite"):
        write(vera.adapter(), tmp_path)
    assert Path(file).read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["adapter_model.safetensors"]
