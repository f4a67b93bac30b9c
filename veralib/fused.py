"""Fused linears: which rows of W0 are the query, the key, the value; or the gate and the up projection.

A layout belongs to the last component of a module's name and, where models disagree, to config.model_type. Each is
copied from the split in transformers' modeling file and held to it by tests/test_targets.py. Parts are called q, k, v
(gate, up; input, gate for ModernBERT's MLP) whatever the model calls them.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .linears import shape

Rows = slice | Tensor
"""A part's rows of W0: a slice where they are contiguous, else int64 indices in ascending order."""
Parts = dict[str, Rows]


def parts(name: str, module: nn.Module, model_config: Any = None) -> Parts:
    """{part: its rows of W0} of a fused linear, in the model's order; {} where it isn't fused or its layout unknown.

    name: the module's name; model_config: of the model it sits in, or of the whole one (nested ones are searched).
    Where there is a model, parts_of knows which config counts.
    """
    rule = _RULES.get(name.rpartition(".")[2])
    if rule is None:
        return {}
    m, n = shape(module)
    for config in _configs(model_config, name, n):
        if found := rule(name, m, n, config):
            return found
    return {}


def parts_of(model: nn.Module, name: str) -> Parts:
    """parts() of the linear `name`, by the config of the innermost module around it that has one."""
    chain: list[Any] = [model]
    for component in name.split("."):
        chain.append(getattr(chain[-1], component))
    configs = (getattr(module, "config", None) for module in reversed(chain[:-1]))
    config = next((c for c in configs if hasattr(c, "model_type")), None)
    return parts(name, chain[-1], config)


def part_rows(rows: Rows) -> int:
    """How many rows a part has."""
    return rows.numel() if isinstance(rows, Tensor) else rows.stop - rows.start


# Linears of one parent that read the same x, by the last component of their names.
_READ_ONE_X = (
    ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("query_proj", "key_proj", "value_proj"), ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"), ("wq", "wk", "wv"), ("to_q", "to_k", "to_v"), ("q_a_proj", "kv_a_proj_with_mqa"),
    ("gate_proj", "up_proj"), ("gate", "up"), ("w1", "w3"), ("wi_0", "wi_1"),
)  # fmt: skip


def sharers(layers: Collection[str]) -> dict[str, int]:
    """{layer: how many of `layers` read the x that it reads, itself counted}, for the cost model.

    By names, not by what earlier forwards saw: a recomputed layer and a resumed run must take the plan that they took before,
    or checkpointing fails and bits differ. Unknown names and cross-attention are guessed wrong, which costs speed alone.
    """
    out = {}
    for layer in layers:
        parent, dot, last = layer.rpartition(".")
        group = next((names for names in _READ_ONE_X if last in names), (last,))
        out[layer] = sum(f"{parent}{dot}{name}" in layers for name in group)
    return out


def _configs(config: Any, name: str, n: int) -> list[Any]:
    """The config and all configs below it (text, vision …), the likeliest for this linear first: by width, by name."""
    found = [("", config)]
    for _, outer in found:  # grows while it is walked
        for key in getattr(outer, "sub_configs", None) or ():
            sub = getattr(outer, key, None)
            if sub is not None and not isinstance(sub, dict):
                found.append((key, sub))

    def unlikely(entry: tuple[str, Any]) -> tuple[bool, bool]:
        width = _get(entry[1], "hidden_size", "d_model", "n_embd", "embed_dim")
        return bool(width) and width != n, entry[0][:3] not in name  # "vision_config", "visual.blocks.0.attn.qkv"

    return [c for _, c in sorted(found, key=unlikely)]


def _get(config: Any, *names: str) -> int:
    """The first of these settings that is a whole number above 0, else 0."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return 0


def _heads(config: Any) -> int:
    return _get(config, "num_attention_heads", "n_heads", "n_head", "num_heads")


def _contiguous(**sizes: int) -> Parts:
    out: Parts = {}
    start = 0
    for part, size in sizes.items():
        out[part] = slice(start, start + size)
        start += size
    return out


def _interleaved(groups: int, **sizes: int) -> Parts:
    """`groups` blocks of rows, each holding `sizes` rows of every part in turn."""
    block = sum(sizes.values())
    starts = torch.arange(groups, device="cpu")[:, None] * block  # the caller may build on meta
    return {
        part: (starts + torch.arange(rows.start, rows.stop, device="cpu")).reshape(-1)  # type: ignore[union-attr]
        for part, rows in _contiguous(**sizes).items()
    }


def _thirds(m: int) -> Parts:
    return _contiguous(q=m // 3, k=m // 3, v=m // 3) if m % 3 == 0 else {}


def _halves(first: str, second: str) -> Callable[..., Parts]:
    def rule(name: str, m: int, n: int, config: Any) -> Parts:
        return _contiguous(**{first: m // 2, second: m // 2}) if m % 2 == 0 else {}

    return rule


def _per_head(m: int, config: Any) -> Parts:
    """(heads, 3, head size): GPT-NeoX, BLOOM, Persimmon, old Falcon, multi-head BigCode, DeBERTa, MiniMax."""
    heads = _heads(config)
    size = m // (3 * heads) if heads else 0
    return _interleaved(heads, q=size, k=size, v=size) if size and 3 * heads * size == m else {}


def _grouped(m: int, n: int, config: Any) -> Parts:
    """q | k | v in blocks, fewer key and value heads where the config says so: Phi-3, MPT, DBRX, ModernBERT, ViTs."""
    heads = _heads(config)
    kv = _get(config, "num_key_value_heads", "n_kv_heads") or _get(getattr(config, "attn_config", None), "kv_n_heads")
    if heads and kv and kv != heads:
        size = m // (heads + 2 * kv)
        return _contiguous(q=heads * size, k=kv * size, v=kv * size) if (heads + 2 * kv) * size == m else {}
    return _thirds(m)


def _qkv(name: str, m: int, n: int, config: Any) -> Parts:
    return _grouped(m, n, config)


def _qkv_proj(name: str, m: int, n: int, config: Any) -> Parts:
    kind = getattr(config, "model_type", "")
    if kind == "codegen":
        # Four blocks (the TPU cores it was trained on), in each the query, the VALUE, the key.
        size = m // 12
        return _interleaved(4, q=size, v=size, k=size) if 12 * size == m else {}
    if kind.startswith("minimax"):
        return _per_head(m, config)
    return _grouped(m, n, config)


def _c_attn(name: str, m: int, n: int, config: Any) -> Parts:
    if getattr(config, "model_type", "") == "gpt_bigcode" and m != 2 * n:
        if not config.multi_query:
            return _per_head(m, config)
        size = n // _heads(config)
        return _contiguous(q=n, k=size, v=size) if n + 2 * size == m else {}
    if m == 2 * n:  # cross attention: the query has a linear of its own, q_attn
        return _contiguous(k=n, v=n)
    return _thirds(m)


def _query_key_value(name: str, m: int, n: int, config: Any) -> Parts:
    kind = getattr(config, "model_type", "")
    if kind in ("gpt_neox", "gpt_neox_japanese", "bloom", "persimmon"):
        return _per_head(m, config)
    if kind != "falcon":
        return {}
    heads = _heads(config)
    if config.new_decoder_architecture:
        kv = config.num_kv_heads
        size = m // (heads + 2 * kv)
        return _interleaved(kv, q=heads // kv * size, k=size, v=size)
    if config.multi_query:
        size = m // (heads + 2)
        return _contiguous(q=heads * size, k=size, v=size)
    return _per_head(m, config)


def _in_proj(name: str, m: int, n: int, config: Any) -> Parts:
    return _per_head(m, config) if getattr(config, "model_type", "") == "deberta" else {}


def _kv_b_proj(name: str, m: int, n: int, config: Any) -> Parts:
    """Multi-head latent attention: per head the key's part without position, then the value."""
    k, v = _get(config, "qk_nope_head_dim"), _get(config, "v_head_dim")
    return _interleaved(m // (k + v), k=k, v=v) if k and v and m % (k + v) == 0 else {}


def _in_proj_qkv(name: str, m: int, n: int, config: Any) -> Parts:
    """Gated delta net: q | k | v."""
    k = _get(config, "linear_num_key_heads") * _get(config, "linear_key_head_dim")
    v = _get(config, "linear_num_value_heads") * _get(config, "linear_value_head_dim")
    return _contiguous(q=k, k=k, v=v) if k and v and 2 * k + v == m else {}


def _in_proj_qkvz(name: str, m: int, n: int, config: Any) -> Parts:
    """Gated delta net as in Qwen3-Next: per key head q, k, then its value heads, then their gates z."""
    groups, k = _get(config, "linear_num_key_heads"), _get(config, "linear_key_head_dim")
    v = _get(config, "linear_num_value_heads") * _get(config, "linear_value_head_dim") // max(1, groups)
    return _interleaved(groups, q=k, k=k, v=v, z=v) if groups and groups * 2 * (k + v) == m else {}


def _gate_up_proj(name: str, m: int, n: int, config: Any) -> Parts:
    # Phi-4-multimodal's audio encoder alone has the two the other way round.
    swapped = getattr(config, "model_type", "") == "phi4_multimodal_audio"
    return _halves("up", "gate")(name, m, n, config) if swapped else _halves("gate", "up")(name, m, n, config)


def _always_thirds(name: str, m: int, n: int, config: Any) -> Parts:
    return _thirds(m)


_RULES: Mapping[str, Callable[[str, int, int, Any], Parts]] = {
    "c_attn": _c_attn,
    "att_proj": _always_thirds,  # Bark
    "qkv": _qkv,
    "Wqkv": _qkv,
    "qkv_proj": _qkv_proj,
    "qkv_linear": _always_thirds,  # LayoutLMv2
    "query_key_value": _query_key_value,
    "in_proj": _in_proj,
    "in_proj_qkv": _in_proj_qkv,
    "in_proj_qkvz": _in_proj_qkvz,
    "kv_b_proj": _kv_b_proj,
    "to_kv": _halves("k", "v"),
    "gate_up_proj": _gate_up_proj,
    "Wi": _halves("input", "gate"),
}
