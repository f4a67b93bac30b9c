"""What a merge did to weights that aren't exact: summed up while it writes, layer by layer."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .errors import VeraWarning
from .linears import quantisation, read_weight, write_weight

LOW_SHARE = 0.9
LARGE_ERROR = 0.5


@dataclass(frozen=True)
class MergeReport:
    """What a merge did to weights that aren't exact.

    surviving: the share of ΔW that their precision kept, ⟨W' − W0, ΔW⟩ / ⟨ΔW, ΔW⟩, 1 at best. error: what rounding left away
    or added, ‖W' − W0 − ΔW‖ / ‖ΔW‖, 0 at best; in 4 bits ΔW may survive on average under noise as large as itself.
    """

    name: str
    layers: int
    surviving: float
    error: float
    by_layer: Mapping[str, float] = field(repr=False)
    """surviving, of each layer"""

    @property
    def worst(self) -> tuple[str, float]:
        """The layer that lost most, and its share."""
        return min(self.by_layer.items(), key=lambda item: item[1]) if self.by_layer else ("", 1.0)


class Tally:
    """Adds layer by layer to what a MergeReport says."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def write(self, name: str, module: nn.Module, delta: Tensor, W0: Tensor | None = None) -> None:
        """W0 + ΔW into the module's weight; ΔW (m, n), in float32 or wider. W0: None where it lies in the module."""
        before = (read_weight(module) if W0 is None else W0).to(delta.dtype, copy=True)
        write_weight(module, before + delta)
        change = read_weight(module).to(delta.dtype) - before
        # In float32 each is a sum of mn products: float64 would take twice the memory of the weight.
        along, size = ((change * delta).sum(dtype=torch.float64), (delta * delta).sum(dtype=torch.float64))
        self.add(name, torch.stack([along, size, change.sub_(delta).square_().sum(dtype=torch.float64)]))

    def add(self, name: str, sums: Tensor) -> None:
        """What a kernel wrote into a layer. sums (3,): ⟨W' − W0, ΔW⟩, ⟨ΔW, ΔW⟩, ‖W' − W0 − ΔW‖²; a layer may come in parts."""
        self.sums[name] = self.sums[name] + sums if name in self.sums else sums.double()

    def report(self, name: str, modules: Mapping[str, nn.Module]) -> MergeReport:
        """The MergeReport of what was written; warns where much was lost."""
        found = {layer: sums.tolist() for layer, sums in self.sums.items()}
        shares = {layer: along / size if size != 0 else 1.0 for layer, (along, size, _) in found.items()}
        inner, norm, rest = (sum(column) for column in zip(*found.values(), strict=True)) if found else (0.0, 0.0, 0.0)
        surviving, error = (inner / norm, (rest / norm) ** 0.5) if norm != 0 else (1.0, 0.0)
        report = MergeReport(name, len(shares), surviving, error, shares)
        if not math.isfinite(norm):
            warnings.warn(
                f"ΔW of \"{name}\" isn't finite, and now the weights aren't: the adapter holds NaN or inf.", VeraWarning
            )
        elif surviving < LOW_SHARE or error > LARGE_ERROR:
            layer, share = report.worst
            warnings.warn(
                f'merging "{name}" kept {100 * surviving:.0f} % of ΔW, the rest is rounded away; rounding errors are '
                f"{100 * error:.0f} % of its size: the weights are {_precision(modules[layer])} (least is left in {layer}: "
                f"{100 * share:.0f} %). "
                "The unmerged adapter is exact; or load the base in float32 to merge.",
                VeraWarning,
            )
        return report


def _precision(module: nn.Module) -> str:
    return quantisation(module) or str(module.weight.dtype).removeprefix("torch.")  # type: ignore[union-attr]
