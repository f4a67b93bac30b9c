"""Which linears an adapter sits on: defaults by architecture, names, parts, expressions, heads, and every refusal."""

import warnings

import pytest
import torch
from torch import nn

from veralib.config import VeraConfig
from veralib.errors import ConfigError, VeraWarning
from veralib.targets import default_targets, find_targets

from .conftest import tiny_bert, tiny_gpt2, tiny_llama

L2 = {"num_hidden_layers": 2}
QV = ("q_proj", "v_proj")
BERT = ("query", "value")
FUSED = ("query_key_value:q", "query_key_value:v")

# Architecture: changes to its config's defaults, the targets we expect, how many units they are.
DEFAULTS = {
    "LlamaForCausalLM": (L2, QV, 4),
    "MistralForCausalLM": (L2, QV, 4),
    "MixtralForCausalLM": (L2, QV, 4),
    "Qwen2ForCausalLM": (L2, QV, 4),
    "Qwen3ForCausalLM": (L2, QV, 4),
    "Qwen3MoeForCausalLM": (L2, QV, 4),
    "Gemma2ForCausalLM": (L2, QV, 4),
    "GptOssForCausalLM": (L2, QV, 4),
    "OPTForCausalLM": (L2, QV, 4),
    "PhiForCausalLM": (L2, QV, 4),
    "Phi3ForCausalLM": (L2, ("qkv_proj:q", "qkv_proj:v"), 4),
    "GPT2LMHeadModel": ({"n_layer": 2}, ("c_attn:q", "c_attn:v"), 4),
    "GPTBigCodeForCausalLM": ({"n_layer": 2}, ("c_attn:q", "c_attn:v"), 4),
    "GPTJForCausalLM": ({"n_layer": 2}, QV, 4),
    "GPTNeoXForCausalLM": (L2, FUSED, 4),
    "BloomForCausalLM": ({"n_layer": 2}, FUSED, 4),
    "FalconForCausalLM": (L2, FUSED, 4),
    "MptForCausalLM": ({"n_layers": 2}, ("Wqkv:q", "Wqkv:v"), 4),
    "CodeGenForCausalLM": ({"n_layer": 2}, ("qkv_proj:q", "qkv_proj:v"), 4),
    "DeepseekV3ForCausalLM": (L2, ("q_b_proj", "kv_b_proj:v"), 4),
    "BertForSequenceClassification": (L2, BERT, 4),
    "RobertaForSequenceClassification": (L2, BERT, 4),
    "ElectraForSequenceClassification": (L2, BERT, 4),
    "DistilBertForSequenceClassification": ({"n_layers": 2}, ("q_lin", "v_lin"), 4),
    "DebertaForSequenceClassification": (L2, ("in_proj:q", "in_proj:v"), 4),
    "DebertaV2ForSequenceClassification": (L2, ("query_proj", "value_proj"), 4),
    "AlbertForSequenceClassification": ({}, BERT, 2),  # one block, used in every layer
    "ModernBertForSequenceClassification": (L2, ("Wqkv:q", "Wqkv:v"), 4),
    "T5ForConditionalGeneration": ({"num_layers": 2}, ("q", "v"), 12),  # encoder, decoder, cross attention
    "BartForConditionalGeneration": ({"encoder_layers": 2, "decoder_layers": 2}, QV, 12),
    "WhisperForConditionalGeneration": ({"encoder_layers": 2, "decoder_layers": 2}, QV, 12),
    "Wav2Vec2ForCTC": (L2 | {"vocab_size": 32}, QV, 4),
    "ViTForImageClassification": (L2, QV, 4),
    "DeiTForImageClassification": (L2, QV, 4),
    "Dinov2ForImageClassification": (L2, QV, 4),
    "SwinForImageClassification": ({"depths": [1, 1], "num_heads": [2, 2]}, QV, 4),
    "CLIPModel": ({"text_config": L2, "vision_config": L2}, QV, 8),
    "BlipVisionModel": (L2, ("qkv:q", "qkv:v"), 4),
    "XLMWithLMHeadModel": ({"n_layers": 2}, ("q_lin", "v_lin"), 4),
    "CTRLLMHeadModel": ({"n_layer": 2}, ("Wq", "Wv"), 4),
    "MoshiForCausalLM": (L2, ("q_proj.linear", "v_proj.linear"), 4),
}


def on_meta(architecture: str, **changes) -> nn.Module:
    import transformers

    cls = getattr(transformers, architecture)
    with torch.device("meta"):
        return cls(cls.config_class(**changes))


@pytest.mark.parametrize("architecture", DEFAULTS)
def test_default_targets(architecture):
    changes, expected, units = DEFAULTS[architecture]
    model = on_meta(architecture, **changes)
    assert default_targets(model) == expected
    found = find_targets(model, VeraConfig())
    assert len(found) == units
    assert {t.unit.removeprefix(t.layer) for t in found} == {e[e.index(":") :] if ":" in e else "" for e in expected}


def test_the_table_covers_25_architectures():
    assert len(DEFAULTS) >= 25


def test_gpt2_large_at_rank_1024_has_165888_parameters():
    # Paper's GPT-2 large, q and v: 36 layers × 2 × (1280 + 1024).
    model = on_meta("GPT2LMHeadModel", n_embd=1280, n_layer=36, n_head=20)
    found = find_targets(model, VeraConfig(rank=1024))
    assert sum(t.m + t.rank for t in found) == 165_888


def test_llama_7b_all_linear_at_rank_1024_has_1589248_parameters():
    found = find_targets(on_meta("LlamaForCausalLM"), VeraConfig(rank=1024, targets="all-linear"))
    assert sum(t.m + t.rank for t in found) == 1_589_248
    assert len(found) == 32 * 7


def units(model: nn.Module, targets=None, **settings) -> list[str]:
    return [t.unit for t in find_targets(model, VeraConfig(targets=targets, **settings))]


def test_targets_of_gpt2_are_parts_with_their_rows():
    q, v, *_ = find_targets(tiny_gpt2(), VeraConfig(rank={"attn": 7}))
    assert (q.unit, q.layer, q.part, q.rows, q.m, q.n, q.rank) == (
        "transformer.h.0.attn.c_attn:q", "transformer.h.0.attn.c_attn", "q", slice(0, 32), 32, 32, 7,
    )  # fmt: skip
    assert (v.part, v.rows, v.m) == ("v", slice(64, 96), 32)


def test_targets_come_in_the_models_order_whatever_the_order_of_names():
    model = tiny_llama()
    assert units(model, ["v_proj", "q_proj"]) == units(model, ["q_proj", "v_proj"])
    assert units(model, ["v_proj", "q_proj"])[:2] == ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"]


def test_an_ending_matches_whole_components():
    model = tiny_llama()
    assert units(model, ["self_attn.q_proj"]) == units(model, ["q_proj"])
    assert units(model, ["model.layers.1.mlp.up_proj"]) == ["model.layers.1.mlp.up_proj"]
    with pytest.raises(ConfigError, match=r'"proj" matches no module.*"q_proj"'):
        units(model, ["proj"])


def test_a_string_is_one_expression_for_the_whole_name():
    model = tiny_llama()
    assert units(model, r".*layers\.1.*\.(q|k)_proj") == [f"model.layers.1.self_attn.{p}_proj" for p in "qk"]
    with pytest.raises(ConfigError, match=r'matches no linear.*targets=\["q_proj"\]'):
        units(model, "q_proj")
    with pytest.raises(ConfigError, match='Did you mean "all-linear"'):
        units(model, "all_linear")
    with pytest.raises(ConfigError, match="no regular expression"):
        units(model, "(q_proj")


def test_an_expression_may_ask_for_parts():
    assert units(tiny_gpt2(), r".*\.0\.attn\.c_attn:[qk]") == ["transformer.h.0.attn.c_attn:q", "transformer.h.0.attn.c_attn:k"]
    assert units(tiny_gpt2(), r".*\.0\.attn\.c_attn") == ["transformer.h.0.attn.c_attn"]


def test_layers_keeps_these_blocks():
    model = tiny_llama()
    assert units(model, layers=[1]) == ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]
    with pytest.raises(ConfigError, match=r"block 5.*from 0 to 1"):
        units(model, layers=[1, 5])


def test_rank_by_pattern():
    found = find_targets(tiny_llama(), VeraConfig(rank={r"layers\.0": 3, ".": 5}))
    assert [t.rank for t in found] == [3, 3, 5, 5]
    with pytest.raises(ConfigError, match=r'no pattern that matches "model.layers.1'):
        find_targets(tiny_llama(), VeraConfig(rank={r"layers\.0": 3}))


def test_all_linear_leaves_the_head_out():
    llama = units(tiny_llama(), "all-linear")
    assert len(llama) == 14 and "lm_head" not in llama and llama == units(tiny_llama(), ["all-linear"])
    bert = units(tiny_bert(), "all-linear")
    assert "bert.pooler.dense" in bert and "classifier" not in bert
    assert not [u for u in units(on_meta("RobertaForMaskedLM", **L2), "all-linear") if u.startswith("lm_head")]
    assert not [u for u in units(on_meta("BertForQuestionAnswering", **L2), "all-linear") if u.startswith("qa")]
    assert not [u for u in units(on_meta("WhisperForConditionalGeneration"), "all-linear") if "proj_out" in u]


def test_all_linear_keeps_a_tower_beside_the_base_model_and_a_pooling_head_inside_it():
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = on_meta("SiglipForImageClassification", vision_config=small)
    found = units(model, "all-linear")
    assert "vision_model.head.mlp.fc1" in found and "classifier" not in found

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.base_model = nn.ModuleList([nn.Linear(4, 4)])
            self.tower = nn.Sequential(nn.ModuleList([nn.Linear(4, 4)]))
            self.probe = nn.Linear(4, 4)

    assert units(Two(), "all-linear") == ["base_model.0", "tower.0.0"]


def test_a_linear_tied_to_an_embedding_is_a_head():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.hidden, self.out = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False)
            self.out.weight = self.embed.weight

    assert units(Tied(), "all-linear") == ["hidden"]


def test_the_head_may_be_named():
    assert units(tiny_llama(), ["lm_head"]) == ["lm_head"]


def test_train_modules_are_no_targets():
    model = tiny_bert()
    assert "bert.pooler.dense" not in units(model, "all-linear", train_modules=["pooler"])
    assert units(model, ["query"], train_modules=["layer.0"]) == ["bert.encoder.layer.1.attention.self.query"]
    with pytest.raises(ConfigError, match="within train_modules"):
        units(model, ["pooler.dense"], train_modules=["pooler"])


def test_one_module_under_two_parents_counts_once_and_answers_to_both_names():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.ModuleDict({"q_proj": nn.Linear(4, 4)})
            self.second = nn.ModuleDict({"query": self.first["q_proj"]})

    assert units(Shared(), "all-linear") == ["first.q_proj"]
    assert units(Shared(), ["second.query", "q_proj"]) == ["first.q_proj"]


def test_albert_block_used_in_every_layer_is_one_target():
    assert units(on_meta("AlbertForSequenceClassification", num_hidden_layers=12), ["query"]) == [
        "albert.encoder.albert_layer_groups.0.albert_layers.0.attention.query"
    ]


@pytest.mark.parametrize(
    ("architecture", "parameters"),
    [
        ("MixtralForCausalLM", "mlp.experts.gate_up_proj"),
        ("Qwen3MoeForCausalLM", "mlp.experts.gate_up_proj"),
        ("GptOssForCausalLM", "mlp.experts.gate_up_proj"),
        ("XLNetLMHeadModel", "rel_attn.q"),
    ],
)
def test_all_linear_says_which_stacked_parameters_it_skips(architecture, parameters):
    model = on_meta(architecture, **({"n_layer": 2} if "XLNet" in architecture else L2))
    with pytest.warns(VeraWarning, match=rf"3-D parameters.*\*\.{parameters} \(2 of them") as caught:
        units(model, "all-linear")
    assert len(caught) == 1


def test_all_linear_is_silent_where_nothing_is_skipped():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        units(tiny_llama(), "all-linear")
        units(on_meta("ViTForImageClassification", **L2), "all-linear")
        units(on_meta("Wav2Vec2ForCTC", **L2), "all-linear")


def test_routers_that_subclass_linear_are_no_targets():
    model = on_meta("Llama4ForCausalLM", num_hidden_layers=2, num_local_experts=2, pad_token_id=0)
    with pytest.warns(VeraWarning):
        assert not [u for u in units(model, "all-linear") if "router" in u]
    with pytest.raises(ConfigError, match="Llama4Router, whose forward is more"):
        units(model, ["router"])


def test_multihead_attentions_out_proj_is_refused_by_name_and_skipped_by_all_linear():
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    assert units(layer, "all-linear") == ["linear1", "linear2"]
    with pytest.raises(ConfigError, match="never calls it"):
        units(layer, ["out_proj"])


def test_unknown_targets_list_the_known_and_the_nearest():
    with pytest.raises(ConfigError, match=r'"q_porj" matches no module. Did you mean "q_proj"\?.*"down_proj"'):
        units(tiny_llama(), ["q_porj"])


def test_all_wrong_targets_are_reported_at_once():
    with pytest.raises(ConfigError) as caught:
        units(tiny_llama(), ["q_porj", "q_proj", "mlp", "o_proj:q"])
    assert all(text in str(caught.value) for text in ('"q_porj" matches no module', "a LlamaMLP", "asks for a part"))


def test_a_target_that_is_no_linear_names_what_it_is_and_the_linears_inside():
    with pytest.raises(ConfigError, match=r'"model.layers.0.mlp", a LlamaMLP.*"up_proj"'):
        units(tiny_llama(), ["mlp"])
    with pytest.raises(ConfigError, match=r'"model.embed_tokens", a Embedding; veralib adapts'):
        units(tiny_llama(), ["embed_tokens"])


def test_an_unknown_part_lists_the_modules_parts():
    with pytest.raises(ConfigError, match=r'no part "query".*Known: "q", "k", "v"'):
        units(tiny_gpt2(), ["c_attn:query"])
    with pytest.raises(ConfigError, match=r'asks for a part, but "model.layers.0.self_attn.q_proj" has no parts'):
        units(tiny_llama(), ["q_proj:q"])


def test_a_fused_linear_is_adapted_whole_or_in_parts_not_both():
    with pytest.raises(ConfigError, match="both whole and in parts"):
        units(tiny_gpt2(), ["c_attn", "c_attn:q"])
    assert len(units(tiny_gpt2(), ["c_attn"])) == 2


def test_the_same_place_named_twice_counts_once():
    assert units(tiny_gpt2(), ["c_attn:q", "attn.c_attn:q"]) == [f"transformer.h.{i}.attn.c_attn:q" for i in range(2)]


def test_cross_attention_takes_its_query_from_q_attn():
    model = tiny_gpt2(add_cross_attention=True)
    assert default_targets(model) == ("c_attn:q", "c_attn:v", "q_attn")
    first = [u.removeprefix("transformer.h.0.") for u in units(model) if ".h.0." in u]
    assert first == ["attn.c_attn:q", "attn.c_attn:v", "crossattention.c_attn:v", "crossattention.q_attn"]


def test_no_default_for_an_unknown_architecture_lists_its_linears():
    with pytest.raises(ConfigError, match=r"are known for Sequential. Name the targets: targets='all-linear', or some of \"0\""):
        default_targets(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ConfigError, match=r'"in_proj", "x_proj"'):
        default_targets(on_meta("MambaForCausalLM", **L2))


def test_a_model_without_linears_is_refused():
    with pytest.raises(ConfigError, match="leave no linear of Conv2d to adapt"):
        units(nn.Conv2d(3, 4, 1), "all-linear")


def test_find_targets_works_inside_a_meta_context():
    with torch.device("meta"):
        found = find_targets(on_meta("BloomForCausalLM", n_layer=1), VeraConfig())
    assert found[0].rows.device.type == "cpu"
