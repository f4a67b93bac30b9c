"""DVoRA: DoRA's magnitude (Liu et al., 2024, §4.4) on VeRA: h = (mag / ‖W0 + ΔW‖) ∘ (W0 + ΔW) x + bias.

mag (m,) starts at the norms of W0's rows, so that the output is unchanged, and trains beside d and b; the norm is a constant for
the gradient, as in DoRA. ΔW is formed once a layer and forward, for its norms.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core import delta_weight
from ..errors import ConfigError
from ..linears import read_weight
from .base import Attached, Notes, load_tensors, save_tensors
from .hooked import CHILD, _after
from .vera import vera_config

if TYPE_CHECKING:
    from ..training.settings import Settings

FILE = "adapter_model.safetensors"
MAGNITUDES = "magnitudes.safetensors"


class Magnitude(nn.Module):
    """One layer's mag, and how its ΔW is found."""

    def __init__(self, module: nn.Module, vera: Any, unit: str) -> None:
        super().__init__()
        self.magnitude = nn.Parameter(read_weight(module).float().norm(dim=1))
        self.vera, self.unit = [vera], unit  # in a list: not a child

    @torch.no_grad()
    def norms(self, module: nn.Module) -> Tensor:
        """‖W0 + ΔW‖ of each row, (m,)."""
        member = self.vera[0].member(None)
        spec = next(u for u in member.layout.units if u.unit == self.unit)
        d, b = member.vectors(self.unit)
        W = read_weight(module).float()
        return (W + delta_weight(spec.A(W), spec.B(W), d * spec.scale, b)).norm(dim=1)

    def forward(self, x: Tensor, output: Tensor, module: nn.Module) -> Tensor:
        factor = (self.magnitude / self.norms(module)).to(output.dtype)
        bias: Any = module.bias
        return output * factor if bias is None else (output - bias) * factor + bias


def attach_dvora(model: nn.Module, settings: "Settings", head: tuple[str, ...]) -> Attached:
    """The model with VeRA and a magnitude on its targets; saved as a veralib file and the magnitudes beside it."""
    from ..attaching import attach
    from ..format import save_adapter

    vera = attach(model, vera_config(settings, head))
    layout = vera.member(None).layout
    if fused := next((u for u in layout.units if u.rows is not None), None):
        raise ConfigError(f'DVoRA adapts whole linears, and "{fused.unit}" is a part of one: name it whole in targets.')
    magnitudes = []
    for unit in layout.units:
        module = model.get_submodule(unit.layer)
        part = Magnitude(module, vera, unit.unit)
        module.add_module(CHILD, part)
        module.register_forward_hook(_after)
        magnitudes.append(part.magnitude)
    vectors, *heads = vera.parameter_groups(lr=settings.resolved_lr, lr_head=settings.resolved_lr_head)
    inside = tuple(f"{unit.layer}.{CHILD}." for unit in layout.units)

    def save(folder: Path, notes: Notes) -> list[Path]:
        adapter = vera.adapter("default")
        save_adapter(replace(adapter, notes={**adapter.notes, **notes}), folder / FILE)
        state = {k: p for k, p in model.named_parameters() if k.startswith(inside)}
        return [folder / FILE, *save_tensors(model, state.__contains__, folder / MAGNITUDES, notes)]

    def load(folder: Path) -> None:
        vera.remove("default")
        vera.load(folder / FILE, name="default")
        vera.use("default")
        load_tensors(model, folder / MAGNITUDES)

    rest = tuple(p for group in heads for p in group["params"])
    return Attached(model, (*vectors["params"], *magnitudes), rest, save, load)
