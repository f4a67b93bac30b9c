"""Sampling: how the next token of each request is chosen, each by its own settings and its own random numbers."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from .errors import BadRequest

GREEDY = 1e-5
"""Temperatures below it mean greedy."""
MOST_LOGPROBS = 20


@dataclass(frozen=True)
class Sampling:
    """A request's settings; greedy unless told. All faults are reported by BadRequest.

    seed: the same request to the same engine gives the same tokens, as far as the model's numbers don't depend on who shares the
    batch (they do in their last bits). logprobs: how many of the likeliest tokens to name, with the chosen one; None: none.
    """

    max_tokens: int | None = 16
    """None: as many as the model's length leaves."""
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    """0 and -1: all."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise BadRequest(f"{f.name} is {value}, expected a finite number.", f.name)
        checks = {
            "max_tokens": (self.max_tokens is None or self.max_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature <= 100, "0 (greedy) to 100"),
            "top_p": (0 < self.top_p <= 1, "more than 0, at most 1"),
            "top_k": (-1 <= self.top_k < 2**31, "-1 or 0 (all tokens), or at least 1"),
            "min_p": (0 <= self.min_p <= 1, "0 to 1"),
            "presence_penalty": (-2 <= self.presence_penalty <= 2, "-2 to 2"),
            "frequency_penalty": (-2 <= self.frequency_penalty <= 2, "-2 to 2"),
            "seed": (self.seed is None or -(2**63) <= self.seed < 2**64, "a whole number of 64 bits"),
            "stop": (
                len(self.stop) <= 16 and all(0 < len(s) <= 1000 for s in self.stop),
                "up to 16 strings of 1 to 1,000 characters",
            ),
            "stop_token_ids": (len(self.stop_token_ids) <= 64, "up to 64 tokens"),
            "logprobs": (self.logprobs is None or 0 <= self.logprobs <= MOST_LOGPROBS, f"0 to {MOST_LOGPROBS}"),
        }
        for name, (fine, expected) in checks.items():
            if not fine:
                raise BadRequest(f"{name} is {getattr(self, name)!r}, expected {expected}.", name)

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY


@dataclass(frozen=True)
class Logprob:
    """The chosen token's log-probability, and the likeliest tokens' with theirs, before temperature and penalties."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass
class Chooser:
    """What one request's choices depend on: its settings, the tokens it has generated, its random numbers."""

    sampling: Sampling
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    failed: bool = False
    """Its logits weren't finite: an adapter of huge numbers, say."""

    def __post_init__(self) -> None:
        s = self.sampling
        # Without a seed: from the system's entropy. Random(-1) would be Random(1).
        self.random = random.Random(None if s.seed is None else s.seed % 2**64)
        self.plain = s.greedy and s.logprobs is None and not s.presence_penalty and not s.frequency_penalty


def choose(logits: Tensor, choosers: Sequence[Chooser]) -> Tensor:
    """The next token of each request, (N,). logits: (N, V) float32, may be written to. Sets failed where they aren't finite."""
    best, tokens = logits.max(dim=-1)  # NaN wins a max, so `best` shows every row that isn't finite
    if not torch.isfinite(best).all():
        for row in (~torch.isfinite(best)).nonzero().flatten().tolist():
            choosers[row].failed = True
            logits[row] = 0.0
            tokens[row] = 0
    rows = [i for i, c in enumerate(choosers) if not c.plain and not c.failed]
    if not rows:
        return tokens
    raw = {i: torch.log_softmax(logits[i].float(), -1) for i in rows if choosers[i].sampling.logprobs is not None}
    drawn = [i for i in rows if not choosers[i].sampling.greedy]
    for i in rows:
        if _penalise(logits[i], choosers[i]) and choosers[i].sampling.greedy:
            tokens[i] = logits[i].argmax()
    if drawn:
        tokens[drawn] = draw(logits[drawn], [choosers[i] for i in drawn]).to(tokens.device)
    for i, logprobs in raw.items():
        token, (values, ids) = int(tokens[i]), logprobs.topk(min(choosers[i].sampling.logprobs or 0, logprobs.numel()))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        choosers[i].logprobs.append(Logprob(token, float(logprobs[token]), top))
    return tokens


def _penalise(logits: Tensor, chooser: Chooser) -> bool:
    """Takes the penalties for the tokens generated so far off one request's logits (OpenAI's definition)."""
    s = chooser.sampling
    if not chooser.tokens or not (s.presence_penalty or s.frequency_penalty):
        return False
    seen, counts = torch.tensor(chooser.tokens, device=logits.device).unique(return_counts=True)
    logits[seen] -= s.frequency_penalty * counts + s.presence_penalty
    return True


def draw(logits: Tensor, choosers: Sequence[Chooser]) -> Tensor:
    """One token for each row by its temperature, top_k, top_p and min_p: the place where its random number falls in the sum of
    the sorted probabilities that are left. (n, V) -> (n,)."""
    settings = [c.sampling for c in choosers]
    column = lambda values: torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]  # noqa: E731
    ordered, ids = (logits.double() / column([s.temperature for s in settings])).sort(dim=-1, descending=True)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    place = torch.arange(logits.shape[-1], device=logits.device)
    keep = (before < column([s.top_p for s in settings])) & (
        probabilities >= column([s.min_p for s in settings]) * probabilities[:, :1]
    )
    keep &= place < column([s.top_k if s.top_k > 0 else logits.shape[-1] for s in settings])
    keep[:, 0] = True
    total = probabilities.mul_(keep).cumsum(-1)
    at = column([c.random.random() for c in choosers]) * total[:, -1:]
    found = torch.searchsorted(total, at, right=True).clamp_(max=logits.shape[-1] - 1)
    found = torch.minimum(found, keep.sum(-1, keepdim=True) - 1)
    return ids.gather(-1, found).squeeze(-1)


def sampler(choosers_of_step: Any) -> Any:
    """What stands in for transformers' own sampling: one way for the whole batch, without seeds.

    choosers_of_step() lists the requests that get a token in this step, in the order of the logits' rows.
    """

    def sample(scores: Tensor, output_ids: Tensor) -> None:
        """scores: (1, N, V). Writes the N tokens to output_ids[0]."""
        choosers = choosers_of_step()
        tokens = choose(scores[0, : len(choosers)], choosers)
        output_ids[0, : len(choosers)].copy_(tokens)

    return sample
