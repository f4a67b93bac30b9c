"""What the judge will cost, before it is asked."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .judge import Ask

CHARACTERS_A_TOKEN = 4  # English text under OpenAI's tokenizers; code and other languages take more tokens


@dataclass(frozen=True)
class Estimate:
    """Requests, tokens and money. cost_at_most: every judgement as long as max_tokens allows; None where no price is given."""

    requests: int
    input_tokens: int
    output_tokens: int
    output_tokens_at_most: int
    cost: float | None
    cost_at_most: float | None


def estimate(
    asks: Sequence[Ask], judgement_tokens: int, max_tokens: int, price_in: float | None = None, price_out: float | None = None
) -> Estimate:
    """The Estimate of some asks. judgement_tokens: a judgement's usual length; prices: money for a million tokens."""
    characters = [sum(len(m["content"]) for m in ask.messages) for ask in asks]
    read = sum(math.ceil(c / CHARACTERS_A_TOKEN) for c in characters)
    written, longest = len(asks) * min(judgement_tokens, max_tokens), len(asks) * max_tokens
    return Estimate(
        len(asks), read, written, longest, money(read, written, price_in, price_out), money(read, longest, price_in, price_out)
    )


def money(read: int, written: int, price_in: float | None, price_out: float | None) -> float | None:
    """What so many tokens cost; None where a price is missing."""
    if price_in is None or price_out is None:
        return None
    return (read * price_in + written * price_out) / 1_000_000
