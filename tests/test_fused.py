"""Fused layouts, held to what the models compute: which output rows act as query, key, value, gate, up.

Nothing here repeats a model's split. The fused linear's output is replaced by a leaf Y, and derivatives tell its rows apart:
a query acts on its own position alone; with the values at 0, attention's output no longer depends on queries and keys, only
on the values; an MLP is linear in `up` and not in `gate`.
"""

import pytest
import torch
from torch import nn

from veralib.fused import part_rows, parts, parts_of

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
NO_DROPOUT = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
MLA = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6}
MLA |= {"v_head_dim": 10, "first_k_dense_replace": 1, "n_routed_experts": 4}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 6, "linear_value_head_dim": 10}
DELTA |= {"layer_types": ["linear_attention"], "num_key_value_heads": 2, "head_dim": 8}
VISION = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
IMAGE = {"image_size": 16, "patch_size": 4}

# model, config changes, the fused linear's name, its parts
ATTENTION = {
    "gpt2": ("GPT2Model", {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 64}, "h.0.attn.c_attn"),
    "gpt2-cross": ("GPT2Model", {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 64, "add_cross_attention": True}, "h.0.attn.c_attn"),
    "openai-gpt": ("OpenAIGPTModel", {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 64}, "h.0.attn.c_attn"),
    "imagegpt": ("ImageGPTModel", {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 64}, "h.0.attn.c_attn"),
    "bigcode-mqa": ("GPTBigCodeModel", {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 64}, "h.0.attn.c_attn"),
    "bigcode-mha": ("GPTBigCodeModel", {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 64, "multi_query": False}, "h.0.attn.c_attn"),
    "phi3": ("Phi3Model", SMALL | {"num_key_value_heads": 2, "pad_token_id": 0}, "layers.0.self_attn.qkv_proj"),
    "gpt-neox": ("GPTNeoXModel", SMALL | NO_DROPOUT, "layers.0.attention.query_key_value"),
    "gpt-neox-japanese": ("GPTNeoXJapaneseModel", SMALL | NO_DROPOUT | {"intermediate_multiple_size": 2}, "layers.0.attention.query_key_value"),
    "bloom": ("BloomModel", {"hidden_size": 32, "n_layer": 1, "n_head": 4, "vocab_size": 64}, "h.0.self_attention.query_key_value"),
    "persimmon": ("PersimmonModel", SMALL, "layers.0.self_attn.query_key_value"),
    "falcon-7b": ("FalconModel", SMALL | {"multi_query": True}, "h.0.self_attention.query_key_value"),
    "falcon-rw": ("FalconModel", SMALL | {"multi_query": False, "alibi": True}, "h.0.self_attention.query_key_value"),
    "falcon-40b": ("FalconModel", SMALL | {"new_decoder_architecture": True, "num_kv_heads": 2}, "h.0.self_attention.query_key_value"),
    "mpt": ("MptModel", {"d_model": 32, "n_heads": 4, "n_layers": 1, "vocab_size": 64}, "blocks.0.attn.Wqkv"),
    "dbrx": ("DbrxModel", {"d_model": 32, "n_heads": 4, "n_layers": 1, "vocab_size": 64, "max_seq_len": 32,
                           "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
                           "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 2, "moe_top_k": 1}}, "blocks.0.norm_attn_norm.attn.Wqkv"),
    "modernbert": ("ModernBertModel", SMALL | {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}, "layers.0.attn.Wqkv"),
    "codegen": ("CodeGenModel", {"n_embd": 64, "n_layer": 1, "n_head": 4, "rotary_dim": 8, "vocab_size": 64}, "h.0.attn.qkv_proj"),
    "deberta": ("DebertaModel", SMALL | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}, "encoder.layer.0.attention.self.in_proj"),
    "bark": ("BarkSemanticModel", {"hidden_size": 32, "num_layers": 1, "num_heads": 4, "input_vocab_size": 64, "output_vocab_size": 64}, "layers.0.attn.att_proj"),
    "timesformer": ("TimesformerModel", VISION | IMAGE | {"num_frames": 1, "attention_type": "joint_space_time"}, "encoder.layer.0.attention.attention.qkv"),
    "blip": ("BlipVisionModel", VISION | IMAGE, "encoder.layers.0.self_attn.qkv"),
    "mgp-str": ("MgpstrModel", {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": [16, 16]}, "encoder.blocks.0.attn.qkv"),
}  # fmt: skip
