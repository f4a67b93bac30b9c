"""plan: what a run would train and how much memory it would take, from the base model's config alone, without its weights."""

from dataclasses import dataclass
from math import prod
from typing import Any

from ..errors import ConfigError, VeraError, need
from .loading import check_model_name, head_modules, quiet_transformers
from .settings import Settings

LINEAR_BYTES = {"4bit": 0.516, "8bit": 1.0}
"""A quantised linear's bytes a weight: NF4 with doubly quantised scales of blocks of 64 (Dettmers et al. 2023, section 3)."""
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 2}


@dataclass(frozen=True)
class Plan:
    """Parameters, and bytes of memory by what they hold. activations_bytes is an estimate; the others are counts."""

    base_parameters: int
    adapter_parameters: int
    head_parameters: int
    weights_bytes: int
    training_bytes: int
    """Value, gradient and two moments of AdamW in float32, for what trains beside the base's own weights."""
    activations_bytes: int

    @property
    def bytes(self) -> int:
        return self.weights_bytes + self.training_bytes + self.activations_bytes


def plan(settings: Settings, labels: int = 2) -> Plan:
    """The plan of a run. ConfigError where the model's config can't be had, or the method can't adapt it.

    Activations are estimated as 34 bytes a token, block and hidden dimension at 16 bits, attention's scores left out
    (Korthikanti et al. 2022, equation 2), and for language models twice the logits in float32; 0 for models of convolutions.
    Quantised are the linears, without the output embedding and the heads.
    """
    try:
        import torch
        import transformers
    except ImportError as e:
        raise need("transformers", "cli", "A plan of a run") from e
    from ..baselines import find_method

    check_model_name(settings.model)
    classifies, images = settings.task in ("classification", "regression"), settings.task == "images"
    auto: Any = transformers.AutoModelForSequenceClassification if classifies else transformers.AutoModelForCausalLM
    if images:
        auto = transformers.AutoModelForImageClassification
    try:
        with torch.device("meta"), quiet_transformers():
            config = transformers.AutoConfig.from_pretrained(settings.model, revision=settings.revision)
            if classifies or images:
                config.num_labels = 1 if settings.task == "regression" else labels
            model = auto.from_config(config)
            head = head_modules(model) if classifies or images else ()
            kept = {id(model.get_output_embeddings()), *(id(m) for name in head for m in model.get_submodule(name).modules())}
            linears = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear) and id(m) not in kept)
            base = sum(p.numel() for p in model.parameters())
            in_heads = sum(p.numel() for name in head for p in model.get_submodule(name).parameters())
            for name in head:  # no method adapts them
                model.set_submodule(name, torch.nn.Identity())
            trained = 0 if settings.method == "head" else find_method(settings.method)(model, settings, ()).adapter_parameters
    except VeraError:
        raise
    except (OSError, ValueError, KeyError) as e:
        raise ConfigError(f'can\'t read the config of "{settings.model}" for {settings.task}: {e}') from e
    wide = DTYPE_BYTES[settings.dtype]
    of_linears = LINEAR_BYTES[settings.quantise] if settings.quantise else wide
    body = getattr(config, "text_config", config)
    tokens = settings.batch_size * (_patches(config) if images else settings.max_length)
    blocks, hidden = getattr(body, "num_hidden_layers", 0), getattr(body, "hidden_size", 0)
    logits = 0 if classifies or images else 2 * 4 * tokens * body.vocab_size
    return Plan(
        base_parameters=base - in_heads,
        adapter_parameters=trained,
        head_parameters=in_heads,
        weights_bytes=int(linears * of_linears + (base - linears) * wide),
        training_bytes=(12 if settings.method == "full" else 16) * (trained + in_heads),
        activations_bytes=34 * tokens * blocks * hidden * wide // 2 + logits,
    )


def _patches(config: Any) -> int:
    """Tokens of one image; 0 where the model has no patches, and no estimate."""
    size, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if size is None or patch is None:
        return 0
    pair = [n if isinstance(n, (list, tuple)) else (n, n) for n in (size, patch)]
    return 1 + prod(a // b for a, b in zip(*pair, strict=True))
