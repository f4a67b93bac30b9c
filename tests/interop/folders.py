"""PEFT folders in every variant, with vectors as if trained, and the logits PEFT itself gives with them."""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.conftest import tiny_bert, tiny_gpt2, tiny_llama, tokens
from veralib import attach

TOLERANCE = 1e-5  # float32 logits of size 1: another order of the same additions


def biased_llama():
    return tiny_llama(attention_bias=True)


@dataclass(frozen=True)
class Variant:
    base: Callable[[], Any]
    config: dict = field(default_factory=dict)
    saving: dict = field(default_factory=dict)


VARIANTS = {
    "projections saved": Variant(tiny_llama, dict(target_modules=["q_proj", "v_proj"])),
    "projections not saved": Variant(tiny_llama, dict(target_modules=["q_proj", "v_proj"], save_projection=False)),
    "layers of several shapes": Variant(tiny_llama, dict(target_modules="all-linear", save_projection=False)),
    "another seed": Variant(tiny_llama, dict(target_modules=["down_proj"], projection_prng_key=2**40 + 7)),
    "targets as a regular expression": Variant(tiny_llama, dict(target_modules=r".*\.1\..*(q|down)_proj")),
    "layers_to_transform": Variant(
        tiny_llama, dict(target_modules=["k_proj", "up_proj"], layers_to_transform=[1], save_projection=False)
    ),
    "layers_pattern": Variant(
        tiny_llama, dict(target_modules=["k_proj"], layers_to_transform=1, layers_pattern="layers", save_projection=False)
    ),
    "bias vera_only": Variant(biased_llama, dict(target_modules=["q_proj", "v_proj", "down_proj"], bias="vera_only")),
    "modules_to_save": Variant(tiny_llama, dict(target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "modules_to_save by ending": Variant(tiny_llama, dict(target_modules=["q_proj"], modules_to_save=["embed_tokens", "norm"])),
    "classification head": Variant(tiny_bert, dict(target_modules=["query", "dense"], task_type="SEQ_CLS")),
    "classification head, seed alone": Variant(
        tiny_bert, dict(target_modules=["query", "value"], task_type="SEQ_CLS", save_projection=False)
    ),
    "Conv1D": Variant(tiny_gpt2, dict(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "Conv1D, seed alone": Variant(tiny_gpt2, dict(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, save_projection=False)),
    "pickled weights": Variant(tiny_llama, dict(target_modules=["q_proj"]), dict(safe_serialization=False)),
}


@torch.no_grad()
def trained(peft_model, seed: int = 0, size: float = 0.3):
    """The PeftModel with all that it trains away from the start: vectors, biases, modules trained in full."""
    generator = torch.Generator().manual_seed(seed)
    for p in peft_model.parameters():
        if p.requires_grad:
            p.add_(size * torch.randn(p.shape, generator=generator).to(p.dtype))
    return peft_model.eval()


def make(variant: Variant, folder: Path, r: int = 6, seed: int = 0) -> torch.Tensor:
    """Saves a trained PEFT adapter of this variant to `folder`; the logits that PEFT gave with it."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = trained(peft.get_peft_model(variant.base(), peft.VeraConfig(r=r, **variant.config)), seed)
        model.save_pretrained(folder, **variant.saving)
    return logits(model)


def peft_logits(base, folder: Path) -> torch.Tensor:
    """What PEFT itself gives with the adapter of a folder."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return logits(peft.PeftModel.from_pretrained(base, folder))


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(tokens()).logits


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def ours(base, adapter) -> torch.Tensor:
    vera = attach(base)
    vera.load(adapter, name="a")
    vera.use("a")
    return logits(base)


def edit_config(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(folder, change):
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
