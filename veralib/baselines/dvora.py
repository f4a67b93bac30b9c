"""DVoRA: DoRA's magnitude (Liu et al., 2024, §4.4) on VeRA: h = (mag / ‖W0 + ΔW‖) ∘ (W0 + ΔW) x + bias.

mag (m,) starts at the norms of W0's rows, so that the output is unchanged, and trains beside d and b; the norm is a constant for
the gradient, as in DoRA. ΔW is formed once a layer and forward, for its norms.

The file is VeRA's, with mag as a module trained in full: `module.<layer>.magnitude.weight`. A base model has no such module, so
whoever knows VeRA alone refuses the file.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..adapter import MAGNITUDE
from ..core import delta_weight
from ..errors import AdapterFileError, ConfigError
from ..linears import read_weight
from .base import Attached, Notes
from .hooked import fold_behind, put_behind, start_weight
from .vera import FILE, vera_config

if TYPE_CHECKING:
    from ..training.settings import Settings


class Magnitude(nn.Module):
    """One layer's mag, and how its ΔW is found."""

    def __init__(self, module: nn.Module, vera: Any, unit: str) -> None:
        super().__init__()
        self.magnitude = nn.Parameter(start_weight(module).norm(dim=1))
        self.vera, self.unit = [vera], unit  # in a list: not a child

    @torch.no_grad()
    def delta(self, module: nn.Module) -> Tensor:
        """ΔW, (m, n), in float32."""
        member = self.vera[0].member(None)
        spec = next(u for u in member.layout.units if u.unit == self.unit)
        d, b = member.vectors(self.unit)
        W = read_weight(module).float()
        return delta_weight(spec.A(W), spec.B(W), d * spec.scale, b)

    def factor(self, module: nn.Module) -> Tensor:
        """mag / ‖W0 + ΔW‖ of each row, (m,); 1 where the row is zero."""
        with torch.no_grad():
            norms = (read_weight(module).float() + self.delta(module)).norm(dim=1)
        return torch.where(norms == 0, 1.0, self.magnitude / norms.masked_fill(norms == 0, 1.0))

    @torch.no_grad()
    def change(self, module: nn.Module) -> Tensor:
        """What merging adds to W0, (m, n): the scaled W0 + ΔW without W0."""
        W = read_weight(module).float()
        return self.factor(module)[:, None] * (W + self.delta(module)) - W

    def forward(self, x: Tensor, output: Tensor, module: nn.Module) -> Tensor:
        factor = self.factor(module).to(output.dtype)
        bias: Any = module.bias
        return output * factor if bias is None else (output - bias) * factor + bias


def attach_dvora(model: nn.Module, settings: "Settings", head: tuple[str, ...]) -> Attached:
    """The model with VeRA and a magnitude on its targets; saved as one veralib file."""
    from ..attaching import attach
    from ..format import load_adapter, save_adapter
    from ..merge_report import MergeReport
    from ..merging import write_heads
    from ..targets import whole_targets

    config = vera_config(settings, head)
    vera = attach(model, config if config.targets is not None else replace(config, targets=whole_targets(model)))
    layout = vera.member(None).layout
    if fused := next((u for u in layout.units if u.rows is not None), None):
        raise ConfigError(f'DVoRA adapts whole linears, and "{fused.unit}" is a part of one: name it whole in targets.')
    parts = {u.layer: Magnitude(model.get_submodule(u.layer), vera, u.unit) for u in layout.units}
    put_behind(model, parts)
    vectors, *heads = vera.parameter_groups(lr=settings.resolved_lr, lr_head=settings.resolved_lr_head)

    def save(folder: Path, notes: Notes) -> list[Path]:
        adapter = vera.adapter("default")
        own = {f"{layer}.{MAGNITUDE}": {"weight": part.magnitude.detach().cpu().clone()} for layer, part in parts.items()}
        notes = {**adapter.notes, **notes}
        save_adapter(replace(adapter, notes=notes, modules={**adapter.modules, **own}), folder / FILE)
        return [folder / FILE]

    def load(path: Path) -> None:
        adapter = load_adapter(path)
        found = adapter.magnitudes
        if found.keys() != parts.keys():
            raise AdapterFileError(
                f"{path} has magnitudes of {len(found)} layers, and DVoRA with these settings has {len(parts)}: load it with the "
                "rank and targets that it was trained with."
            )
        rest = {name: state for name, state in adapter.modules.items() if name.removesuffix(f".{MAGNITUDE}") not in found}
        vera.remove("default")
        vera.load(replace(adapter, modules=rest), name="default")
        vera.use("default")
        for layer, part in parts.items():
            part.magnitude.data.copy_(found[layer])

    def merge() -> MergeReport:
        report = fold_behind(model, parts)
        write_heads(vera, vera.member("default"))
        vera.detach()
        return report

    rest = tuple(p for group in heads for p in group["params"])
    return Attached(model, (*vectors["params"], *(p.magnitude for p in parts.values())), rest, save, load, merge)
