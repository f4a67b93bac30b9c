"""DyLoRA (Valipour et al., 2023): LoRA that works at every rank up to r, since each step trains a prefix of it.

Each step draws b from 1 … r and uses A[:b] and B[:, :b]; scaled by alpha / b. In evaluation all r are used, or options: {use: b}.
"""

import random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, unknown_text
from ..linears import shape
from ..targets import find_targets, whole_targets
from .base import Attached
from .hooked import attach_behind, fold_behind

if TYPE_CHECKING:
    from ..training.settings import Settings

FILE = "dylora.safetensors"
OPTIONS = {"lora_alpha": None, "use": None}


class DyLora(nn.Module):
    """A (r, n) Kaiming uniform, B (m, r) zero; rank: how many of them count now."""

    def __init__(self, m: int, n: int, r: int, alpha: float, use: int) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(torch.empty(r, n)), nn.Parameter(torch.zeros(m, r))
        nn.init.kaiming_uniform_(self.A, a=5**0.5)
        self.alpha, self.use, self.drawn = alpha, use, use

    @property
    def rank(self) -> int:
        return self.drawn if self.training else self.use

    @torch.no_grad()
    def change(self, module: nn.Module) -> Tensor:
        """ΔW of the rank that evaluation uses, (m, n)."""
        return self.B[:, : self.use] @ self.A[: self.use] * (self.alpha / self.use)

    def forward(self, x: Tensor, output: Tensor, module: nn.Module) -> Tensor:
        b = self.rank
        u = nn.functional.linear(x.to(self.A.dtype), self.A[:b])
        return output + (nn.functional.linear(u, self.B[:, :b]) * (self.alpha / b)).to(output.dtype)


def linears(model: nn.Module, settings: "Settings", head: tuple[str, ...], what: str) -> dict[str, nn.Module]:
    """{name: linear} that a LoRA-like method adapts: settings.targets, else query and value, or the fused linear that holds both.

    ConfigError for a part of a fused linear.
    """
    from ..config import VeraConfig

    names = settings.targets if settings.targets is not None else whole_targets(model)
    targets = find_targets(model, VeraConfig(rank=1, targets=names, train_modules=head))
    if fused := next((t for t in targets if t.rows is not None), None):
        raise ConfigError(f'{what} adapts whole linears, and "{fused.unit}" is a part of one: name it whole in targets.')
    return {t.layer: t.module for t in targets}


def check(settings: "Settings", known: dict[str, Any], what: str) -> tuple[int, dict[str, Any]]:
    """(rank, options with their defaults); ConfigError."""
    rank = settings.resolved_rank
    if not isinstance(rank, int) or rank < 1:
        raise ConfigError(f"rank is {rank!r}, and {what} takes one whole number above 0")
    for name in settings.options:
        if name not in known:
            raise ConfigError(unknown_text("option", name, known))
    return rank, {**known, **settings.options}


def attach_dylora(model: nn.Module, settings: "Settings", head: tuple[str, ...]) -> Attached:
    """The model with DyLoRA on its targets; the step draws the rank, the same for all layers, from the seed and its number."""
    rank, options = check(settings, OPTIONS, "DyLoRA")
    alpha, use = options["lora_alpha"] or 2 * rank, options["use"] or rank
    if not 1 <= use <= rank:
        raise ConfigError(f"options.use is {use}, expected a rank from 1 to {rank}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        parts = {n: DyLora(*shape(m), rank, alpha, use) for n, m in linears(model, settings, head, "DyLoRA").items()}

    def on_step(step: int) -> None:
        drawn = random.Random(f"{settings.seed}/{step}").randint(1, rank)
        for part in parts.values():
            part.drawn = drawn

    on_step(0)
    return attach_behind(model, parts, head, FILE, before_step=on_step, merge=lambda: fold_behind(model, parts))
