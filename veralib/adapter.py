"""Adapter: one fine-tune as plain data, without a model. load_adapter makes one, vera.load takes one."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .basis import Basis
from .config import VeraConfig
from .core import delta_weight

MAGNITUDE = "magnitude"
"""What DVoRA's module of a layer is called: `<layer>.magnitude`, with the one tensor `weight` (m,)."""


def layer_of(unit: str) -> str:
    """The module a unit belongs to: "h.0.attn.c_attn" for the unit "h.0.attn.c_attn:q", or the unit itself."""
    return unit.partition(":")[0]


@dataclass(frozen=True)
class BaseModel:
    """What an adapter remembers of the model it was trained on, to know it again."""

    id: str = ""
    """Hub id or folder; a different one only warns."""
    revision: str = ""
    layers: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Every targeted module: (outputs m, inputs n)."""
    hashes: Mapping[str, str] = field(default_factory=dict)
    """Of each targeted module: a hash of sampled entries of its weight, rounded to bf16 (hashes.weight_hash). Empty for a
    quantised base."""
    quantised: str = ""
    """The quantisation of the base the adapter was trained on, "" for none."""


@dataclass(frozen=True)
class Adapter:
    """One adapter: its config and, for each unit, the trained vectors.

    A unit is an adapted linear's name, or name:part for a part of a fused one. Tensors are on the CPU; d and b are float32.
    """

    config: VeraConfig
    basis: Basis
    base: BaseModel
    vectors: Mapping[str, tuple[Tensor, Tensor]]
    """unit -> (d of length r, b of length m)."""
    layer_ids: Mapping[str, int] = field(default_factory=dict)
    """unit -> the counter word of its own A and B, with sharing="unique"; empty with one shared pair."""
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    """module -> a full bias that replaces the base's (PEFT's bias="vera_only")."""
    modules: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """train_modules: module name -> its state_dict."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """Free text that travels with the file: library version, metrics."""

    def __getstate__(self) -> dict[str, Any]:
        # A loaded adapter's tensors are views of one block, which pickle would write for each of them: 25 MB for 225 KB.
        return {
            **self.__dict__,
            "vectors": {unit: (d.clone(), b.clone()) for unit, (d, b) in self.vectors.items()},
            "biases": {layer: bias.clone() for layer, bias in self.biases.items()},
            "modules": {name: {k: t.clone() for k, t in state.items()} for name, state in self.modules.items()},
        }

    @property
    def parameters(self) -> int:
        """Number of entries in all d and b; the paper counts them so, without biases and heads."""
        return sum(d.numel() + b.numel() for d, b in self.vectors.values())

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        tensors = [t for pair in self.vectors.values() for t in pair]
        tensors += list(self.biases.values()) + [t for m in self.modules.values() for t in m.values()]
        return sum(t.numel() * t.element_size() for t in tensors)

    @property
    def magnitudes(self) -> dict[str, Tensor]:
        """DVoRA's magnitudes among the modules, layer -> (m,); empty for VeRA."""
        named = {layer: self.modules.get(f"{layer}.{MAGNITUDE}") for layer in self.base.layers}
        return {layer: state["weight"] for layer, state in named.items() if state is not None and list(state) == ["weight"]}

    def basis_of(self, unit: str) -> Basis:
        """The pair A, B of one unit."""
        if unit not in self.layer_ids:
            return self.basis
        return Basis(self.basis.kind, self.basis.seed, self.basis.levels, self.layer_ids[unit])

    def scale_of(self, unit: str) -> float:
        """config.scale · s_A · s_B of one unit: what d is multiplied by before Eq. 2."""
        n = self.base.layers[layer_of(unit)][1]
        return self.config.scale * self.basis.scale(n, self.vectors[unit][0].numel())

    def delta(self, unit: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """ΔW (m, n) of one unit, on the CPU."""
        d, b = self.vectors[unit]
        n = self.base.layers[layer_of(unit)][1]
        basis = self.basis_of(unit)
        A, B = basis.A(d.numel(), n).to(dtype), basis.B(b.numel(), d.numel()).to(dtype)
        return delta_weight(A, B, d.to(dtype) * self.scale_of(unit), b.to(dtype))
