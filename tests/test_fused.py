"""Fused layouts, held to what the models compute: which output rows act as query, key, value, gate, up.

Nothing here repeats a model's split. The fused linear's output is replaced by a leaf Y, and derivatives tell its rows apart:
a query acts on its own position alone; with the values at 0 attention depends on nothing but the values; an MLP is linear
in what multiplies the activation. Cross attention, where no query is fused, is told by the values alone.
"""

import pytest
import torch
from torch import nn

from veralib.fused import part_rows, parts, parts_of
from veralib.linears import shape

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
GPT = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 64}
GQA = {"num_key_value_heads": 2}
NO_DROPOUT = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
VISION = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
VISION |= {"image_size": 16, "patch_size": 4}
BERT_IDS = {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
DBRX = {"d_model": 32, "n_heads": 4, "n_layers": 1, "vocab_size": 64, "max_seq_len": 32}
DBRX |= {
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
    "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 2, "moe_top_k": 1},
}
MLA = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6}
MLA |= {"v_head_dim": 10, "first_k_dense_replace": 1, "n_routed_experts": 4}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 6, "linear_value_head_dim": 10}
DELTA |= {
    "num_hidden_layers": 2,
    "layer_types": ["full_attention", "linear_attention"],
    "head_dim": 8,
    "num_experts": 2,
    "num_experts_per_tok": 1,
}

# What is tested: model class, changes to its config's defaults, the fused linear.
ATTENTION = {
    "gpt2": ("GPT2Model", GPT, "h.0.attn.c_attn"),
    "gpt2-cross": ("GPT2Model", GPT | {"add_cross_attention": True}, "h.0.crossattention.c_attn"),
    "openai-gpt": ("OpenAIGPTModel", GPT, "h.0.attn.c_attn"),
    "imagegpt": ("ImageGPTModel", GPT, "h.0.attn.c_attn"),
    "bigcode-multi-query": ("GPTBigCodeModel", GPT, "h.0.attn.c_attn"),
    "bigcode-multi-head": ("GPTBigCodeModel", GPT | {"multi_query": False}, "h.0.attn.c_attn"),
    "phi3": ("Phi3Model", SMALL | GQA | {"pad_token_id": 0}, "layers.0.self_attn.qkv_proj"),
    "minimax": (
        "MiniMaxModel",
        SMALL | GQA | {"layer_types": ["linear_attention"], "num_local_experts": 2, "head_dim": 8, "block_size": 4},
        "layers.0.self_attn.qkv_proj",
    ),
    "gpt-neox": ("GPTNeoXModel", SMALL | NO_DROPOUT, "layers.0.attention.query_key_value"),
    "gpt-neox-japanese": ("GPTNeoXJapaneseModel", SMALL | NO_DROPOUT, "layers.0.attention.query_key_value"),
    "bloom": (
        "BloomModel",
        {"hidden_size": 32, "n_layer": 1, "n_head": 4, "vocab_size": 64},
        "h.0.self_attention.query_key_value",
    ),
    "persimmon": ("PersimmonModel", SMALL, "layers.0.self_attn.query_key_value"),
    "falcon-7b": ("FalconModel", SMALL | {"multi_query": True}, "h.0.self_attention.query_key_value"),
    "falcon-rw": ("FalconModel", SMALL | {"multi_query": False, "alibi": True}, "h.0.self_attention.query_key_value"),
    "falcon-40b": (
        "FalconModel",
        SMALL | {"new_decoder_architecture": True, "num_kv_heads": 2},
        "h.0.self_attention.query_key_value",
    ),
    "mpt": ("MptModel", {"d_model": 32, "n_heads": 4, "n_layers": 1, "vocab_size": 64}, "blocks.0.attn.Wqkv"),
    "dbrx": ("DbrxModel", DBRX, "blocks.0.norm_attn_norm.attn.Wqkv"),
    "modernbert": ("ModernBertModel", SMALL | BERT_IDS, "layers.0.attn.Wqkv"),
    "codegen": ("CodeGenModel", GPT | {"n_embd": 64, "rotary_dim": 8}, "h.0.attn.qkv_proj"),
    "deberta": ("DebertaModel", SMALL, "encoder.layer.0.attention.self.in_proj"),
    "bark": (
        "BarkSemanticModel",
        {"hidden_size": 32, "num_layers": 1, "num_heads": 4, "input_vocab_size": 64, "output_vocab_size": 64},
        "layers.0.attn.att_proj",
    ),
    "blip": ("BlipVisionModel", VISION, "encoder.layers.0.self_attn.qkv"),
    "timesformer": (
        "TimesformerModel",
        VISION | {"num_frames": 1, "attention_type": "joint_space_time"},
        "encoder.layer.0.attention.attention.qkv",
    ),
    "deepseek-v3": ("DeepseekV3Model", SMALL | MLA, "layers.0.self_attn.kv_b_proj"),
    "minicpm3": ("MiniCPM3Model", SMALL | MLA, "layers.0.self_attn.kv_b_proj"),
    "qwen3.5": ("Qwen3_5TextModel", SMALL | GQA | DELTA, "layers.1.linear_attn.in_proj_qkv"),
    "qwen3-next": ("Qwen3NextModel", SMALL | GQA | DELTA, "layers.1.linear_attn.in_proj_qkvz"),
}

MLP = {
    "phi3": ("Phi3Model", SMALL | GQA | {"pad_token_id": 0}, "layers.0.mlp.gate_up_proj", "up"),
    "glm": ("GlmModel", SMALL | GQA | {"head_dim": 8, "pad_token_id": 0}, "layers.0.mlp.gate_up_proj", "up"),
    "glm4": ("Glm4Model", SMALL | GQA | {"head_dim": 8, "pad_token_id": 0}, "layers.0.mlp.gate_up_proj", "up"),
    "modernbert": ("ModernBertModel", SMALL | BERT_IDS, "layers.0.mlp.Wi", "gate"),
}


def build(architecture: str, changes: dict) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    cls = getattr(transformers, architecture)
    model = cls(cls.config_class(**changes)).eval()
    for p in model.parameters():
        p.requires_grad_(False)
        if p.dim() > 1:
            p.normal_(std=0.3)
    return model


def run(model: nn.Module) -> torch.Tensor:
    """The last hidden state, (positions, width)."""
    torch.manual_seed(1)
    inputs = {"input_ids": torch.randint(3, 60, (1, 12))}
    if model.main_input_name == "pixel_values":
        inputs = {"pixel_values": torch.randn(1, 3, 16, 16)}
        if type(model).__name__.startswith("Timesformer"):
            inputs["pixel_values"] = inputs["pixel_values"][None]
    if getattr(model.config, "add_cross_attention", False):
        inputs["encoder_hidden_states"] = torch.randn(1, 9, model.config.hidden_size)
    out = model(**inputs)
    hidden = out.logits if "logits" in out else out[0]
    return hidden.reshape(-1, hidden.shape[-1])


def derivative(model: nn.Module, name: str, zero: torch.Tensor | slice | None) -> torch.Tensor:
    """|∂ (the last position's output) / ∂ Y|, (positions, m), Y random but for its `zero` columns."""
    leaves = []

    def replace(module, args, out):
        torch.manual_seed(2)
        Y = torch.randn(out.shape)
        if zero is not None:
            Y[..., zero] = 0
        leaves.append(Y.requires_grad_())
        return Y

    handle = model.get_submodule(name).register_forward_hook(replace)
    try:
        last = run(model)[-1]
    finally:
        handle.remove()
    assert len(leaves) == 1
    (last * torch.randn(last.shape)).sum().backward()
    return leaves[0].grad.abs().reshape(-1, leaves[0].shape[-1])


@pytest.mark.parametrize("case", ATTENTION)
def test_parts_act_as_their_names_say(case):
    architecture, changes, name = ATTENTION[case]
    model = build(architecture, changes)
    found = parts_of(model, name)
    assert "v" in found and "k" in found

    m = shape(model.get_submodule(name))[0]
    rows = torch.cat([torch.arange(m)[r] for r in found.values()])
    assert sorted(rows.tolist()) == list(range(m))  # each row in one part
    assert [part_rows(r) for r in found.values()] == [len(torch.arange(m)[r]) for r in found.values()]

    without_values = derivative(model, name, found["v"]).sum(0)
    assert (without_values[found["v"]] > 0).all()
    for part in found.keys() - {"v", "z"}:
        assert (without_values[found[part]] == 0).all(), part

    earlier = derivative(model, name, None)[:-4].sum(0)  # delta nets convolve the last 4 positions
    assert (earlier[found["k"]] > 0).all() and (earlier[found["v"]] > 0).all()
    for part in found.keys() & {"q", "z"}:
        assert (earlier[found[part]] == 0).all(), part
        assert (derivative(model, name, None)[-1][found[part]] > 0).all(), part


@pytest.mark.parametrize("case", MLP)
def test_gate_goes_through_the_activation(case):
    architecture, changes, name, multiplier = MLP[case]
    model = build(architecture, changes)
    found = parts_of(model, name)
    (other,) = found.keys() - {multiplier}
    mlp, x = model.get_submodule(name.rpartition(".")[0]), torch.randn(5, 32)

    def doubled(part: str) -> torch.Tensor:
        def double(module, args, out):
            out = out.clone()
            out[..., found[part]] *= 2
            return out

        handle = model.get_submodule(name).register_forward_hook(double)
        try:
            return mlp(x)
        finally:
            handle.remove()

    plain = mlp(x)
    torch.testing.assert_close(doubled(multiplier), 2 * plain)
    assert (doubled(other) - 2 * plain).abs().max() > 0.1 * plain.abs().max()


def vision_attention(architecture: str, **changes):
    """One attention layer of a vision tower whose forward packs images, and a call that runs it on 6 patches."""
    import importlib

    folder, cls, config = architecture.split(":")
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    configs = importlib.import_module(f"transformers.models.{folder}.configuration_{folder}")
    settings = getattr(configs, config)(**changes)
    settings._attn_implementation = "eager"
    torch.manual_seed(0)
    return getattr(module, cls)(settings).requires_grad_(False), settings


PACKED = {
    "qwen2.5-vl": ("qwen2_5_vl:Qwen2_5_VLVisionAttention:Qwen2_5_VLVisionConfig", {"hidden_size": 32, "num_heads": 4}),
    "glm4v": ("glm4v:Glm4vVisionAttention:Glm4vVisionConfig", {"hidden_size": 32, "num_heads": 4}),
    "exaone4.5": (
        "exaone4_5:Exaone4_5_VisionAttention:Exaone4_5_VisionConfig",
        {"hidden_size": 32, "num_heads": 4, "num_key_value_heads": 2},
    ),
}


@pytest.mark.parametrize("case", PACKED)
def test_packed_vision_attention_has_its_values_where_parts_says(case):
    attention, config = vision_attention(PACKED[case][0], **PACKED[case][1])
    found = parts("visual.blocks.0.attn.qkv", attention.qkv, config)
    Y = torch.randn(6, attention.qkv.out_features)
    Y[:, found["v"]] = 0
    attention.qkv.register_forward_hook(lambda module, args, out: Y.requires_grad_())
    position = (torch.ones(6, 8), torch.zeros(6, 8))
    out = attention(torch.randn(6, 32), cu_seqlens=torch.tensor([0, 6]), position_embeddings=position)
    (out * torch.randn(out.shape)).sum().backward()
    size = Y.grad.abs().sum(0)
    assert (size[found["v"]] > 0).all()
    assert (size[found["q"]] == 0).all() and (size[found["k"]] == 0).all()
    assert {part: part_rows(rows) for part, rows in found.items()} == {
        "q": 32, "k": 16 if "exaone" in case else 32, "v": 16 if "exaone" in case else 32,
    }  # fmt: skip


def test_parts_of_a_tower_come_from_its_own_config():
    from transformers import Exaone4_5_Config

    config = Exaone4_5_Config(
        text_config={"model_type": "exaone4", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 1},
        vision_config={"hidden_size": 32, "num_heads": 4, "num_key_value_heads": 2},
    )
    qkv = nn.Linear(32, 64, device="meta")
    expected = {"q": slice(0, 32), "k": slice(32, 48), "v": slice(48, 64)}
    assert parts("model.visual.blocks.0.attn.qkv", qkv, config) == expected
    assert parts("model.visual.blocks.0.attn.qkv", qkv, config.vision_config) == expected


def test_granite_speech_encoder_has_keys_then_values():
    from transformers.models.granite_speech.configuration_granite_speech import GraniteSpeechEncoderConfig
    from transformers.models.granite_speech.modeling_granite_speech import GraniteSpeechConformerAttention

    config = GraniteSpeechEncoderConfig(hidden_dim=32, num_heads=4, dim_head=8, context_size=6)
    attention = GraniteSpeechConformerAttention(config).eval().requires_grad_(False)
    found = parts("encoder.layers.0.attn.to_kv", attention.to_kv, config)
    Y = torch.randn(1, 6, 64)
    Y[..., found["v"]] = 0
    attention.to_kv.register_forward_hook(lambda module, args, out: Y.requires_grad_())
    distances = torch.arange(6)[:, None] - torch.arange(6) + config.max_pos_emb
    attention(torch.randn(1, 6, 32), attention_dists=distances).sum().backward()
    size = Y.grad.abs().sum((0, 1))
    assert (size[found["k"]] == 0).all() and (size[found["v"]] > 0).all()


def test_phi4_multimodals_audio_encoder_has_up_first():
    from transformers.models.phi4_multimodal.configuration_phi4_multimodal import Phi4MultimodalAudioConfig
    from transformers.models.phi4_multimodal.modeling_phi4_multimodal import Phi4MultimodalAudioMLP

    config = Phi4MultimodalAudioConfig(hidden_size=32, intermediate_size=48)
    mlp = Phi4MultimodalAudioMLP(config).eval().requires_grad_(False)
    up = parts("encoders.0.feed_forward_in.gate_up_proj", mlp.gate_up_proj, config)["up"]
    x = torch.randn(5, 32)
    plain = mlp(x) - mlp.down_proj.bias
    mlp.gate_up_proj.weight[up] *= 2
    mlp.gate_up_proj.bias[up] *= 2
    torch.testing.assert_close(mlp(x) - mlp.down_proj.bias, 2 * plain)


def test_what_isnt_fused_or_isnt_known_has_no_parts():
    assert parts("model.layers.0.self_attn.q_proj", nn.Linear(8, 8)) == {}
    assert parts("transformer.encoder.layers.0.self_attention.query_key_value", nn.Linear(8, 24)) == {}  # ChatGLM's, its own code
    assert parts("mixer.in_proj", nn.Linear(8, 24)) == {}  # Mamba's
