"""Bottleneck adapters: h + W_up σ(W_down h) behind a sublayer, before its residual is added. Four placements.

adapter_h (Houlsby et al., 2019): behind attention and behind the MLP of each block. adapter_p (Pfeiffer et al., 2021): behind the
MLP alone. adapter_l (Lin et al., 2020): the same, with a layer norm of its own in front. adapter_d (Rücklé et al., 2021,
AdapterDrop): adapter_p with the lower blocks left out.
"""

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, unknown_text
from ..linears import is_linear, shape
from .base import Attached
from .hooked import attach_behind

if TYPE_CHECKING:
    from ..training.settings import Settings

FILE = "adapters.safetensors"
_NUMBER = re.compile(r"\.(\d+)\.")
# The linear whose output a block adds to its residual, by the end of its name.
ATTENTION = re.compile(
    r"(^|\.|_)(attention\.output\.dense|attn\.(c_proj|o_proj|out_proj|dense|o)|attention\.(o_proj|out_proj|out_lin|dense))$"
)
MLP = re.compile(
    r"(^|\.)((?<!attention\.)output\.dense|mlp\.(c_proj|down_proj|fc2|fc_out|dense_4h_to_h)|fc2|ffn\.(lin2|down_proj)|ffn_output)$"
)
ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}
DROPPED = 5
"""Blocks that AdapterDrop leaves out, from the lowest."""


class Bottleneck(nn.Module):
    """h (…, d) -> h + up(σ(down(h))); at the start up is 0 and h unchanged. 2·d·m + m + d parameters, 2·d more with the norm."""

    def __init__(self, d: int, m: int, activation: str = "relu", norm: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d) if norm else None
        self.down, self.up = nn.Linear(d, m), nn.Linear(m, d)
        self.activation = ACTIVATIONS[activation]()
        nn.init.normal_(self.down.weight, std=1e-2)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor, output: Tensor, module: nn.Module) -> Tensor:
        h = output.to(self.down.weight.dtype)
        change = self.up(self.activation(self.down(h if self.norm is None else self.norm(h))))
        return output + change.to(output.dtype)


def places(model: nn.Module, attention: bool, drop: int = 0) -> dict[str, int]:
    """{linear that ends a sublayer: its width}, lowest blocks first; drop: so many blocks from the lowest are left out."""
    found = {
        name: shape(module)[0]
        for name, module in model.named_modules()
        if is_linear(module) and (MLP.search(name) or (attention and ATTENTION.search(name)))
    }
    blocks = sorted({int(n[1]) for name in found if (n := _NUMBER.search(f".{name}."))})
    left_out = set(blocks[:drop])
    return {name: d for name, d in found.items() if not (n := _NUMBER.search(f".{name}.")) or int(n[1]) not in left_out}


def _attach(model: nn.Module, settings: "Settings", head: tuple[str, ...], kind: str) -> Attached:
    options: dict[str, Any] = {"activation": "relu", "drop": DROPPED if kind == "adapter_d" else 0, **settings.options}
    for name in options:
        if name not in ("activation", "drop"):
            raise ConfigError(unknown_text("option", name, ("activation", "drop")))
    if options["activation"] not in ACTIVATIONS:
        raise ConfigError(unknown_text("activation", options["activation"], ACTIVATIONS))
    rank = settings.resolved_rank
    if not isinstance(rank, int) or rank < 1:
        raise ConfigError(f"rank is {rank!r}; for {kind} it is the bottleneck's width, a whole number above 0")
    found = places(model, kind == "adapter_h", options["drop"])
    if not found:
        where = ", outside the dropped blocks" if options["drop"] else ""
        raise ConfigError(
            f"{kind} knows no place in a {type(model).__name__}: no linear has a name by which it knows the end of an MLP or of "
            f"an attention, such as output.dense, c_proj, down_proj or fc2{where}."
        )
    if kind == "adapter_h":
        of = {what: sum(bool(end.search(n)) for n in found) for what, end in (("attention", ATTENTION), ("MLP", MLP))}
        if min(of.values()) == 0:
            raise ConfigError(
                f"adapter_h goes behind attention and MLP, and of a {type(model).__name__} it knows the end of {of['attention']} "
                f"attentions and {of['MLP']} MLPs: method=adapter_p is the one behind the MLP alone."
            )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        parts = {name: Bottleneck(d, rank, options["activation"], kind == "adapter_l") for name, d in found.items()}
    return attach_behind(model, parts, head, FILE)


def attach_adapter_h(model: nn.Module, settings: "Settings", head: tuple[str, ...]) -> Attached:
    """Houlsby's: two a block."""
    return _attach(model, settings, head, "adapter_h")


def attach_adapter_p(model: nn.Module, settings: "Settings", head: tuple[str, ...]) -> Attached:
    """Pfeiffer's: one a block."""
    return _attach(model, settings, head, "adapter_p")


def attach_adapter_l(model: nn.Module, settings: "Settings", head: tuple[str, ...]) -> Attached:
    """Lin's: one a block, with a layer norm."""
    return _attach(model, settings, head, "adapter_l")


def attach_adapter_d(model: nn.Module, settings: "Settings", head: tuple[str, ...]) -> Attached:
    """AdapterDrop: Pfeiffer's, without the lower blocks (options: {drop: 5})."""
    return _attach(model, settings, head, "adapter_d")
