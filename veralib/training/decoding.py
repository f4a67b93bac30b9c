"""Decoding: how text is generated, and the generation itself."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ConfigError, VeraWarning


@dataclass(frozen=True)
class Decoding:
    """How text is generated; left as it is, greedily. ConfigError lists every fault."""

    max_new_tokens: int = 64
    beams: int = 1
    length_penalty: float = 1.0
    """A beam's score is its log-probability over its length to this power."""
    no_repeat: int = 0
    """No n-gram of so many tokens twice in what is written; 0: anything goes. The prompt's n-grams may be used."""

    def __post_init__(self) -> None:
        faults = [f"{k} is {getattr(self, k)}, expected 1 or more" for k in ("max_new_tokens", "beams") if getattr(self, k) < 1]
        if self.no_repeat < 0:
            faults.append(f"no_repeat is {self.no_repeat}, expected an n-gram's length, or 0 for no such rule")
        if not math.isfinite(self.length_penalty):
            faults.append(f"length_penalty is {self.length_penalty}, expected a finite number")
        if faults:
            raise ConfigError("decoding: " + "; ".join(faults))


# Hu et al. (2021) for E2E, and the VeRA paper after them.
PUBLISHED = Decoding(max_new_tokens=64, beams=10, length_penalty=0.8, no_repeat=4)


def pad_left(prompts: Sequence[list[int]], pad_id: int) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask, (rows, longest), padded on the left, where generate wants it."""
    width = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[pad_id] * (width - len(p)) + p for p in prompts]),
        "attention_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
    }


def write(model: Any, tokenizer: Any, prompts: Sequence[list[int]], decoding: Decoding) -> list[str]:
    """The text that the model writes after each prompt (token ids), all prompts in one batch, padded on the left.

    A prompt that leaves no room for it in the model's positions keeps its end, and a warning says so.
    """
    from transformers import LogitsProcessorList

    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**40
    new = min(decoding.max_new_tokens, max(positions // 2, 1))
    if cut := sum(len(p) > positions - new for p in prompts):
        prompts = [p[-(positions - new) :] for p in prompts]
        many = f"{cut} of {len(prompts)} prompts"
        warnings.warn(f"{many} leave no room in the model's {positions} positions; their end was kept", VeraWarning, stacklevel=2)
    width = max(map(len, prompts))
    device = next(model.parameters()).device
    batch = pad_left(prompts, tokenizer.pad_token_id or 0)
    fields: dict[str, Any] = {}
    if decoding.beams > 1:
        # never: as in Hu et al.'s search, which goes on to the last step whatever has ended before.
        fields = {"num_beams": decoding.beams, "length_penalty": decoding.length_penalty, "early_stopping": "never"}
    if decoding.no_repeat:
        fields["logits_processor"] = LogitsProcessorList([_no_repeat(decoding.no_repeat, width)])
    made = model.generate(
        **{name: tensor.to(device) for name, tensor in batch.items()},
        max_new_tokens=min(decoding.max_new_tokens, positions - width),
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        **fields,
    )
    return tokenizer.batch_decode(made[:, width:], skip_special_tokens=True)


def _no_repeat(size: int, width: int) -> Any:
    """transformers' rule over the text after the prompt: its own counts the prompt, and forbids to copy a name of four tokens."""
    from transformers import LogitsProcessor, NoRepeatNGramLogitsProcessor

    rule = NoRepeatNGramLogitsProcessor(size)

    class OwnText(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return rule(input_ids[:, width:], scores)  # type: ignore[arg-type]

    return OwnText()
