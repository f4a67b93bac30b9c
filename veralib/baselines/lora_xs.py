"""LoRA-XS (Bałazy et al., 2024): W0 + U_r Σ_r R V_rᵀ, R (r, r) trained; the rest is W0's own singular vectors, frozen."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..linears import shape
from .base import Attached
from .dylora import check, linears
from .hooked import attach_behind, fold_behind, start_weight

if TYPE_CHECKING:
    from ..training.settings import Settings

FILE = "lora_xs.safetensors"
START = 1e-5
"""R starts at N(0, 1e-5²), as in the paper: the output hardly changes."""


class LoraXs(nn.Module):
    """A = V_rᵀ (r, n) and B = U_r Σ_r (m, r) of a linear's weight, buffers; R (r, r) trains."""

    A: Tensor
    B: Tensor

    def __init__(self, module: nn.Module, r: int, scale: float) -> None:
        super().__init__()
        W = start_weight(module)
        U, S, V = torch.linalg.svd(W, full_matrices=False)
        self.register_buffer("A", V[:r].contiguous())
        self.register_buffer("B", U[:, :r] * S[:r])
        self.R = nn.Parameter(torch.randn(r, r, device=W.device) * START)
        self.scale = scale

    @torch.no_grad()
    def change(self, module: nn.Module) -> Tensor:
        """ΔW, (m, n)."""
        return self.B @ self.R @ self.A * self.scale

    def forward(self, x: Tensor, output: Tensor, module: nn.Module) -> Tensor:
        u = nn.functional.linear(nn.functional.linear(x.to(self.R.dtype), self.A), self.R)
        return output + (nn.functional.linear(u, self.B) * self.scale).to(output.dtype)


def attach_lora_xs(model: nn.Module, settings: "Settings", head: tuple[str, ...]) -> Attached:
    """The model with LoRA-XS on its targets; options: {scale: 1.0}. The rank is at most a linear's smaller side."""
    rank, options = check(settings, {"scale": 1.0}, "LoRA-XS")
    found = linears(model, settings, head, "LoRA-XS")
    small = next((n for n, module in found.items() if min(shape(module)) < rank), None)
    if small is not None:
        raise ConfigError(
            f'rank is {rank}, and "{small}" of shape {shape(found[small])} has no more than {min(shape(found[small]))}.'
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        parts = {name: LoraXs(module, rank, options["scale"]) for name, module in found.items()}
    return attach_behind(model, parts, head, FILE, merge=lambda: fold_behind(model, parts))
