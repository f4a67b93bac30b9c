"""The base model and its tokenizer, ready to serve; what of it can be adapted, and how much room there is."""

import os
from typing import Any

import torch
from torch import nn

from ...errors import ConfigError
from ...linears import is_linear
from ...products import emulated
from .errors import BadRequest

PROBE = 17  # tokens of the forward that finds out which layers see each token once


def load_model(
    model: Any, dtype: str | torch.dtype | None = None, device: str | None = None, auto: str = "CausalLM", **options: Any
) -> tuple[Any, str]:
    """(the model in eval mode, its folder or id). dtype None: the checkpoint's, or float32 where this processor would only
    emulate it."""
    import transformers

    if isinstance(model, nn.Module):
        config: Any = getattr(model, "config", None)
        return model.eval(), str(getattr(config, "_name_or_path", "") or "")
    if not isinstance(model, (str, os.PathLike)) or not os.fspath(model):
        raise ConfigError(f"the model is {model!r}, expected a folder, a hub id or a loaded model.")
    path = os.fspath(model)
    cls = getattr(transformers, "AutoModel" if not auto else f"AutoModelFor{auto}")
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ConfigError(f'there is no dtype "{dtype}", expected float32, bfloat16 or float16.')
    try:
        loaded = cls.from_pretrained(path, dtype=dtype or "auto", **options)
    except (OSError, ValueError) as e:
        raise ConfigError(f'the model "{path}" can\'t be loaded: {e}') from e
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded = loaded.to(device)
    if dtype is None and emulated(next(loaded.parameters())):
        loaded = loaded.float()
    return loaded.eval(), path


def load_tokenizer(path: str) -> Any:
    """The tokenizer beside the model."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as e:
        raise ConfigError(f'no tokenizer at "{path}": {e}. Save one there, or pass tokenizer=.') from e


def pad_token(model: Any, tokenizer: Any) -> int | None:
    """The token that fills up shorter texts: the model's, else the tokenizer's; None where neither names one of the model's."""
    size = model.get_input_embeddings().weight.shape[0]
    named = (getattr(model.config.get_text_config(), "pad_token_id", None), getattr(tokenizer, "pad_token_id", None))
    return next((t for t in named if t is not None and 0 <= t < size), None)


def encode(tokenizer: Any, text: str, special: bool = True) -> list[int]:
    """A text's tokens. BadRequest for a text that isn't Unicode: half a surrogate pair, which JSON can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise BadRequest(f"the text holds half a surrogate pair at character {e.start}: it is no Unicode text.", "prompt") from e
    return list(tokenizer.encode(text, add_special_tokens=special))


@torch.no_grad()
def servable_layers(model: Any) -> tuple[frozenset[str], str]:
    """(the linears that are called once in a forward, with each token in its order; the output layer's name, "" without one).

    An expert of a mixture sees some tokens only, so nobody could say which adapter each of its rows has.
    """
    seen: dict[str, list[int]] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = args[0] if args else kwargs.get("input", kwargs.get("x"))
            whole = isinstance(x, torch.Tensor) and x.dim() == 3 and x.shape[:2] == (1, PROBE)
            seen.setdefault(name, []).append(PROBE if whole else 0)

        return hook

    linears = {n: m for n, m in model.named_modules() if is_linear(m)}
    hooks = [m.register_forward_pre_hook(note(n), with_kwargs=True) for n, m in linears.items()]
    try:
        size = model.get_input_embeddings().weight.shape[0]
        ids = torch.arange(PROBE, device=model.device)[None] * max(1, size // PROBE) % size
        model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    head = model.get_output_embeddings()
    output = next((n for n, m in linears.items() if m is head), "")
    return frozenset(n for n, calls in seen.items() if calls == [PROBE]), output


def cache_tokens(model: Any, longest: int, requests: int) -> int:
    """For how many tokens there is room to keep keys and values: a quarter of the free memory (half on a GPU), at least one
    longest request, at most what `requests` of them could fill."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize
    if model.device.type == "cuda":
        room = torch.cuda.mem_get_info(model.device)[0] // 2
    else:
        import psutil

        room = min(psutil.virtual_memory().available // 4, 2 * 2**30)
    longest += 64
    return max(longest, min(room // size, requests * longest))
