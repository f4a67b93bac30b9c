"""Every count of trained parameters that the paper prints, from the models' configs on the meta device, heads left out."""

from pathlib import Path
from typing import Any

import torch

from ..baselines import find_method
from ..errors import need
from .pages import page, write

ROBERTA = {
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
}
VIT = {
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
}
GPT2 = {"medium": {"n_embd": 1024, "n_layer": 24, "n_head": 16}, "large": {"n_embd": 1280, "n_layer": 36, "n_head": 20}}
LLAMA = {
    "7b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008},
    "13b": {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "intermediate_size": 13824},
}
ALL = {"targets": "all-linear"}
QV = {"targets": ("c_attn:q", "c_attn:v")}
# model, method, rank, more settings -> what the paper prints and where, and why it differs if it does.
ROWS: list[tuple[str, str, int | None, dict[str, Any], str, str, str]] = [
    ("roberta-base", "full", None, {}, "125M", "T2", "without the pooler, which has 0.59 M"),
    ("roberta-base", "bitfit", None, {}, "0.1M", "T2", ""),
    ("roberta-base", "adapter_d", 48, {"options": {"drop": 8}}, "0.3M", "T2", "4 blocks: one reading"),
    ("roberta-base", "adapter_d", 16, {"options": {"drop": 0}}, "0.3M", "T2", "12 blocks: the other"),
    ("roberta-base", "adapter_d", 48, {"options": {"drop": 0}}, "0.9M", "T2", ""),
    ("roberta-base", "lora", 8, {}, "0.3M", "T2", ""),
    ("roberta-base", "vera", 1024, {}, "0.043M", "T2", ""),
    ("roberta-large", "adapter_p", 64, {}, "3M", "T2", ""),
    ("roberta-large", "adapter_p", 16, {}, "0.8M", "T2", ""),
    ("roberta-large", "adapter_h", 64, {}, "6M", "T2", ""),
    ("roberta-large", "adapter_h", 8, {}, "0.8M", "T2", ""),
    ("roberta-large", "lora_fa", 8, {}, "3.7M", "T2", "inherited; no rank gives it: B at r=75 would"),
    ("roberta-large", "lora", 8, {}, "0.8M", "T2", ""),
    ("roberta-large", "vera", 256, {}, "0.061M", "T2", ""),
    ("gpt2-medium", "full", None, {}, "354.92M", "T3", "a tenth of a million more than the model has"),
    ("gpt2-medium", "adapter_l", 6, {}, "0.37M", "T3", ""),
    ("gpt2-medium", "adapter_l", 224, {}, "11.09M", "T3", ""),
    ("gpt2-medium", "adapter_h", 112, {}, "11.09M", "T3", "inherited; 48 bottlenecks of width 112 have 11.06 M"),
    ("gpt2-medium", "dylora", 4, {"targets": ("c_attn",)}, "0.39M", "T3", ""),
    ("gpt2-medium", "adalora", 4, {}, "0.38M", "T3", "inherited; at the rank that stays: it starts at rank 6 with 589,968"),
    ("gpt2-medium", "lora", 4, {}, "0.35M", "T3", "inherited from Hu et al."),
    ("gpt2-medium", "vera", 1024, QV, "0.098M", "T3", ""),
    ("gpt2-large", "full", None, {}, "774.03M", "T3", ""),
    ("gpt2-large", "adapter_l", 8, {}, "0.88M", "T3", ""),
    ("gpt2-large", "adapter_l", 248, {}, "23.00M", "T3", ""),
    ("gpt2-large", "lora", 4, {}, "0.77M", "T3", "inherited from Hu et al."),
    ("gpt2-large", "vera", 1024, QV, "0.17M", "T3", ""),
    ("llama-7b", "lora", 64, ALL, "159.9M", "T4", ""),
    ("llama-7b", "vera", 1024, ALL, "1.6M", "T4", ""),
    ("llama-13b", "lora", 64, ALL, "250.3M", "T4", ""),
    ("llama-13b", "vera", 1024, ALL, "2.4M", "T4", ""),
    ("llama-7b", "vera", 256, ALL, "1.4M", "T13", "the rank isn't stated"),
    ("vit-base", "full", None, {}, "85.8M", "T5", ""),
    ("vit-large", "full", None, {}, "303.3M", "T5", ""),
    ("vit-base", "vera", 256, {}, "24.6K", "T5", ""),
    ("vit-base", "lora", 8, {}, "294.9K", "T5", ""),
    ("vit-large", "vera", 256, {}, "61.4K", "T5", ""),
    ("vit-large", "lora", 8, {}, "786.4K", "T5", ""),
]


def model_on_meta(name: str) -> Any:
    """A model of the paper without weights; encoders without their pooler, which full fine-tuning counts."""
    try:
        from transformers import AutoConfig, AutoModel
    except ImportError as e:
        raise need("transformers", "cli", "vera reproduce") from e
    kind, _, size = name.partition("-")
    fields: dict[str, Any]
    if kind == "roberta":
        fields = {**ROBERTA[size], "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
    else:
        fields = {"vit": VIT, "gpt2": GPT2, "llama": LLAMA}[kind][size]
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(kind, **fields))
    if kind != "gpt2" and hasattr(model, "pooler"):
        model.pooler = None
    return model


def count(name: str, method: str, rank: int | None, more: dict[str, Any]) -> int:
    """Trained parameters, the head's left out."""
    from ..training import Settings

    settings = Settings(model=name, data="none", task="classification", method=method, rank=rank, **more)
    with torch.device("meta"):
        return find_method(method)(model_on_meta(name), settings, ()).adapter_parameters


def exact(name: str, method: str, rank: int | None, more: dict[str, Any]) -> int:
    """The count by formula alone, from the width, the blocks and the MLP's width; no model is made."""
    kind, _, size = name.partition("-")
    fields = {"roberta": ROBERTA, "vit": VIT, "gpt2": GPT2, "llama": LLAMA}[kind][size]
    d, blocks = fields.get("hidden_size") or fields["n_embd"], fields.get("num_hidden_layers") or fields["n_layer"]
    f, r = fields.get("intermediate_size", 4 * d), rank or 0
    bottleneck = 2 * d * r + r + d
    if method.startswith("adapter_"):
        dropped = more.get("options", {}).get("drop", 0)
        places = 2 * blocks if method == "adapter_h" else blocks - dropped
        return places * (bottleneck + (2 * d if method == "adapter_l" else 0))
    block = 4 * (d * d + d) + 2 * d * f + d + f + 4 * d
    embeddings = {"roberta": (50265 + 514 + 1) * d + 2 * d, "gpt2": (50257 + 1024) * d, "vit": (3 * 16 * 16 + 1) * d + 198 * d}
    every_linear = more == ALL  # of Llama: q, k, v, o, and gate, up, down
    return {
        "full": lambda: blocks * block + embeddings[kind] + (0 if kind == "roberta" else 2 * d),
        "bitfit": lambda: blocks * (4 * d + f + d + 2 * d) + d,
        "lora": lambda: blocks * r * (8 * d + 3 * (d + f) if every_linear else 4 * d),
        "lora_fa": lambda: blocks * r * 2 * d,
        "dylora": lambda: blocks * r * 4 * d,
        "adalora": lambda: blocks * r * (4 * d + 1),
        "vera": lambda: blocks * (5 * d + 2 * f + 7 * r if every_linear else 2 * (d + r)),
    }[method]()


def make(folder: Path) -> dict[str, Any]:
    """All counts beside the printed ones."""
    rows: list[dict[str, Any]] = [
        {
            **{"model": m, "method": method, "rank": r, "printed": p, "exact": exact(m, method, r, more)},
            **{"parameters": count(m, method, r, more), "where": w, "note": note},
        }
        for m, method, r, more, p, w, note in ROWS
    ]
    columns = ("", "model", "method", "rank or width", "printed", "exact", "ours", "")
    cells = [
        (
            *(r["where"], r["model"], r["method"], "" if r["rank"] is None else str(r["rank"])),
            *(r["printed"], f"{r['exact']:,}", f"{r['parameters']:,}", r["note"]),
        )
        for r in rows
    ]
    remarks = ["Exact: by formula. Ours: what the method attaches to a model built from the config, heads left out."]
    return write(folder, "counts", {"rows": rows}, page("Trained parameters", "counts", [("", columns, cells)], remarks))
