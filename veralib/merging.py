"""merge: W0 + ΔW written into the base weights; unmerge: the old bits from a copy, since subtraction wouldn't give them."""

import os
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from . import layers
from .bank import Member
from .core import delta_weight
from .errors import ConfigError, StateError, VeraWarning
from .linears import quantisation, read_weight, restore, snapshot, write_weight

if TYPE_CHECKING:
    from .model import Vera

Keep = Literal["cpu", "device", "disk", None]
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


@dataclass
class Kept:
    """The old weights while an adapter is merged: layer -> snapshot; on disk, the file's path."""

    where: Keep
    weights: dict[str, Any]
    biases: dict[str, Tensor | None]
    heads: dict[str, dict[str, Tensor]]
    file: str = ""


def merge(vera: "Vera", member: Member, keep: Keep) -> MergeReport:
    """Writes the adapter into the base weights; on any failure everything is as it was."""
    if vera.merged is not None:
        raise StateError(f'adapter "{vera.merged}" is merged already: call unmerge(), or switch_merged("{member.name}").')
    if keep not in ("cpu", "device", "disk", None):
        raise ConfigError(f'keep is {keep!r}, expected "cpu", "device", "disk" or None.')
    _refuse_ties(vera, member)
    names = list(dict.fromkeys([*member.layout.by_layer, *member.biases]))
    vera.inside.hashes_of(vera.inside.sites)  # of the base weights: load() compares with these while merged
    kept = Kept(keep, {}, {}, {})
    inner, norm, rest = (torch.zeros((), dtype=torch.float64) for _ in range(3))
    shares = {}
    try:
        for name in names:
            module = vera.inside.sites[name]
            kept.weights[name] = snapshot(module, None if keep == "device" else "cpu")
            if name in member.biases:
                bias = module.bias
                kept.biases[name] = bias.detach().clone() if isinstance(bias, Tensor) else None
            if name in member.layout.by_layer:
                along, size, off = _write_delta(module, member, name)
                inner, norm, rest = inner + along, norm + size, rest + off
                shares[name] = float(along / size) if size > 0 else 1.0
            if name in member.biases:
                _set_bias(module, member.biases[name])
        for head in member.heads:
            module = vera.inside.heads[head]
            kept.heads[head] = {k: v.detach().clone() for k, v in layers.plain_copy(module).state_dict().items()}
            _load_plain(module, vera.inside.head(head, member).state_dict())
    except BaseException:
        _put_back(vera, kept)
        raise
    if keep == "disk":
        _to_disk(kept)
    elif keep is None:
        kept.weights, kept.biases, kept.heads = {}, {}, {}
    vera.kept = kept
    vera.runtime.merged = member.name
    surviving, error = (float(inner / norm), float((rest / norm).sqrt())) if norm > 0 else (1.0, 0.0)
    report = MergeReport(member.name, len(shares), surviving, error, shares)
    if surviving < LOW_SHARE or error > LARGE_ERROR:
        layer, share = report.worst
        warnings.warn(
            f'merging "{member.name}" kept {100 * surviving:.0f} % of ΔW, the rest is rounded away; rounding errors are '
            f"{100 * error:.0f} % of its size: the weights are {_precision(vera.inside.sites[layer])} (least is left in {layer}: "
            f"{100 * share:.0f} %). "
            "The unmerged adapter is exact; or load the base in float32 to merge.",
            VeraWarning,
        )
    return report


def unmerge(vera: "Vera") -> None:
    """Puts the old weights back, bit for bit."""
    if vera.merged is None:
        raise StateError("no adapter is merged: there is nothing to undo.")
    kept = vera.kept
    assert kept is not None
    if kept.where is None:
        raise StateError(
            f'"{vera.merged}" was merged with keep=None, so the old weights are gone: load the base model again, and merge '
            'with keep="cpu" next time.'
        )
    if kept.where == "disk":
        _from_disk(kept)
    _put_back(vera, kept)
    vera.kept = None
    vera.runtime.merged = None


def switch(vera: "Vera", member: Member) -> MergeReport:
    """Unmerges what is merged, then merges another, keeping the weights where they were kept."""
    keep: Keep = "cpu"
    if vera.kept is not None:
        keep = vera.kept.where
        _refuse_ties(vera, member)
        unmerge(vera)
    return merge(vera, member, keep)


def _write_delta(module: nn.Module, member: Member, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """W0 + ΔW, written; returns ⟨W' − W0, ΔW⟩, ⟨ΔW, ΔW⟩ and ‖W' − W0 − ΔW‖² in float64."""
    old = read_weight(module)
    exact = torch.promote_types(old.dtype, torch.float32)
    before = old.to(exact, copy=True)
    delta = torch.zeros_like(before, memory_format=torch.contiguous_format)
    for unit in member.layout.by_layer[name]:
        d, b = (v.detach().to(before.device, exact) for v in member.vectors(unit.unit))
        part = delta_weight(unit.A(before), unit.B(before), d * unit.scale, b)
        if unit.rows is None:
            delta += part
        elif isinstance(unit.rows, slice):
            delta[unit.rows] += part
        else:
            delta.index_add_(0, unit.rows.to(delta.device), part)
    write_weight(module, before + delta)
    change = read_weight(module).to(exact) - before
    # In float32 each is a sum of mn products: float64 would take twice the memory of the weight.
    along, size = (change * delta).sum(dtype=torch.float64), (delta * delta).sum(dtype=torch.float64)
    return along.cpu(), size.cpu(), change.sub_(delta).square_().sum(dtype=torch.float64).cpu()


def _set_bias(module: nn.Module, bias: Tensor) -> None:
    old = module.bias
    with torch.no_grad():
        if isinstance(old, Tensor):
            old.copy_(bias)
        else:
            weight: Any = module.weight
            module.bias = nn.Parameter(bias.to(weight.device, weight.dtype), requires_grad=False)


@torch.no_grad()
def _load_plain(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    for key, value in state.items():
        target: Any = module
        *path, last = key.split(".")
        for step in path:
            target = getattr(target, step)
        getattr(target, last).copy_(value)


def _put_back(vera: "Vera", kept: Kept) -> None:
    for name, saved in kept.weights.items():
        restore(vera.inside.sites[name], saved)
    for name, bias in kept.biases.items():
        module = vera.inside.sites[name]
        if bias is None:
            module.bias = None  # type: ignore[assignment]
        else:
            with torch.no_grad():
                module.bias.copy_(bias)  # type: ignore[union-attr, operator]
    for head, state in kept.heads.items():
        _load_plain(vera.inside.heads[head], state)


def _to_disk(kept: Kept) -> None:
    handle, kept.file = tempfile.mkstemp(prefix="veralib-merge-", suffix=".pt")
    with os.fdopen(handle, "wb") as f:
        torch.save((kept.weights, kept.biases, kept.heads), f)
    kept.weights, kept.biases, kept.heads = {}, {}, {}


def _from_disk(kept: Kept) -> None:
    try:
        kept.weights, kept.biases, kept.heads = torch.load(kept.file, weights_only=False)
    except OSError as e:
        raise StateError(f"the weights kept in {kept.file} can't be read ({e}): load the base model again.") from e
    os.unlink(kept.file)


def _refuse_ties(vera: "Vera", member: Member) -> None:
    """A tied weight is two layers': ΔW would change both."""
    adapted = {id(vera.inside.sites[n].weight): n for n in member.layout.by_layer}
    for name, module in vera.model.named_modules(remove_duplicate=True):
        for key, p in module._parameters.items():
            if p is not None and id(p) in adapted and module is not vera.inside.sites[adapted[id(p)]]:
                raise StateError(
                    f'the weight of "{adapted[id(p)]}" is tied to "{name}.{key}": merging would change both. Leave that layer '
                    "out of the targets, or serve the adapter unmerged."
                )


def _precision(module: nn.Module) -> str:
    return quantisation(module) or str(module.weight.dtype).removeprefix("torch.")  # type: ignore[union-attr]
