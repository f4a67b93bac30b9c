"""open_engine: the engine that a model's kind asks for."""

from typing import Any

from ...errors import ConfigError
from ...store import Store
from .encoder import EncoderEngine
from .engine import EmbeddedEngine

CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_ENCODER_ONLY = ("pooling", "normalise", "labels", "max_batch")
_CAUSAL_ONLY = ("cache_tokens_limit", "max_batch_tokens", "max_batch_requests")


def open_engine(model: str, store: Store | None = None, **options: Any) -> EmbeddedEngine | EncoderEngine:
    """An EmbeddedEngine for a language model, an EncoderEngine for any other, by the architecture in its config.json."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as e:
        raise ConfigError(f'the model "{model}" can\'t be loaded: {e}') from e
    generates = any(a.endswith(CAUSAL) for a in config.architectures or [])
    unfit = [k for k in (_ENCODER_ONLY if generates else _CAUSAL_ONLY) if options.pop(k, None) is not None]
    if unfit:
        kind = "language model" if generates else "encoder"
        raise ConfigError(f"{', '.join(unfit)} isn't for a {kind} such as {model}: leave it out.")
    return (EmbeddedEngine if generates else EncoderEngine)(model, store, **options)
