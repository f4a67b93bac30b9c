"""Attention over a paged cache, sequence by sequence.

transformers gives sdpa all sequences of a batch as one, with a mask of (tokens, all keys): the work grows with the square of the
number of requests, and one request's NaN, times zero, reaches every other. Here each sequence sees its own keys alone.
"""

import contextlib
import inspect
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "veralib_paged"
_thread = threading.local()


@contextlib.contextmanager
def steps() -> Iterator[None]:
    """Within it this thread's forwards are the engine's steps, which need no masks."""
    _thread.steps = True
    try:
        yield
    finally:
        _thread.steps = False


def mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """sdpa's mask for an ordinary forward; None in a step."""
    return None if getattr(_thread, "steps", False) else sdpa_mask(*args, **kwargs)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    cache: Any = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention of every sequence in a batch. query: (1, H, T, D); key, value: (1, H', T, D) -> (1, T, H, D).

    cache: transformers' paged cache, which keeps key and value and gives back those of all earlier tokens, sequence after
    sequence; cu_seq_lens_q and cu_seq_lens_k in kwargs say where each begins.
    """
    if cache is None:  # an ordinary forward, outside of the engine's loop
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, sliding_window=sliding_window, **kwargs
        )
    key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
    queries, keys = kwargs["cu_seq_lens_q"].tolist(), kwargs["cu_seq_lens_k"].tolist()
    out = torch.empty_like(query.transpose(1, 2))
    grouped = query.shape[1] != key.shape[1]
    for q0, q1, k0, k1 in zip(queries, queries[1:], keys, keys[1:], strict=False):
        mask, tokens, length = None, q1 - q0, k1 - k0
        far = sliding_window is not None and length > sliding_window
        if far or 1 < tokens < length:  # a part of a long prompt: token i sees the keys up to its own, as far as the window goes
            mask = torch.ones(tokens, length, dtype=torch.bool, device=query.device).tril_(length - tokens)
            if far:
                mask.triu_(length - tokens - sliding_window + 1)  # type: ignore[operator]
        part = F.scaled_dot_product_attention(
            query[:, :, q0:q1],
            key[:, :, k0:k1],
            value[:, :, k0:k1],
            attn_mask=mask,
            scale=scaling,
            is_causal=mask is None and 1 < tokens == length,
            enable_gqa=grouped,
        )
        out[:, q0:q1] = part.transpose(1, 2)
    return out, None


def usable(model: Any) -> bool:
    """Whether this model's attention can be replaced: causal sdpa, on the CPU, and a cache that we know.

    A model that knows flash attention says in its call how far a layer's window goes, since that has no mask to say it.
    """
    from transformers.generation.continuous_batching.cache import PagedAttentionCache

    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    known = {"key_states", "value_states", "layer_idx", "kwargs"} <= inspect.signature(
        PagedAttentionCache.update
    ).parameters.keys()
    return (
        known
        and model.device.type == "cpu"
        and model.config._attn_implementation in ("sdpa", "paged|sdpa")  # the loop of transformers 5.17 makes it the second
        and kinds <= {"full_attention", "sliding_attention"}
        and model._supports_flash_attn
        and not getattr(config, "attn_logit_softcapping", None)
    )


def use(model: Any) -> None:
    """Makes it the model's attention; set_attn_implementation("sdpa") is the way back."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask)
    model.set_attn_implementation(NAME)
