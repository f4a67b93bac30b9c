"""merge: W0 + ΔW written into the base weights; unmerge: the old bits from a copy, since subtraction wouldn't give them."""

import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from . import sharded
from .bank import Member
from .core import delta_weight
from .errors import ConfigError, StateError, VeraWarning
from .heads import plain_copy
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


class Tally:
    """Adds layer by layer to what a MergeReport says."""

    def __init__(self) -> None:
        self.inner, self.norm, self.rest = (torch.zeros((), dtype=torch.float64) for _ in range(3))
        self.shares: dict[str, float] = {}

    def write(self, name: str, module: nn.Module, delta: Tensor) -> None:
        """W0 + ΔW into the module's weight; ΔW (m, n), in float32 or wider."""
        before = read_weight(module).to(delta.dtype, copy=True)
        write_weight(module, before + delta)
        change = read_weight(module).to(delta.dtype) - before
        # In float32 each is a sum of mn products: float64 would take twice the memory of the weight.
        along, size = (change * delta).sum(dtype=torch.float64).cpu(), (delta * delta).sum(dtype=torch.float64).cpu()
        self.shares[name] = float(along / size) if size > 0 else 1.0
        self.inner, self.norm = self.inner + along, self.norm + size
        self.rest += change.sub_(delta).square_().sum(dtype=torch.float64).cpu()

    def report(self, name: str, modules: Mapping[str, nn.Module]) -> MergeReport:
        """The MergeReport of what was written; warns where much was lost."""
        surviving, error = 1.0, 0.0
        if self.norm > 0:
            surviving, error = float(self.inner / self.norm), float((self.rest / self.norm).sqrt())
        report = MergeReport(name, len(self.shares), surviving, error, self.shares)
        if surviving < LOW_SHARE or error > LARGE_ERROR:
            layer, share = report.worst
            warnings.warn(
                f'merging "{name}" kept {100 * surviving:.0f} % of ΔW, the rest is rounded away; rounding errors are '
                f"{100 * error:.0f} % of its size: the weights are {_precision(modules[layer])} (least is left in {layer}: "
                f"{100 * share:.0f} %). "
                "The unmerged adapter is exact; or load the base in float32 to merge.",
                VeraWarning,
            )
        return report


@dataclass
class Kept:
    """The old weights while an adapter is merged: layer -> snapshot; on disk, the file's path."""

    where: Keep
    weights: dict[str, Any]
    biases: dict[str, Tensor | None]
    heads: dict[str, dict[str, Tensor]]
    folder: str = ""

    def forget(self) -> None:
        """Removes what lies on the disk."""
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder = ""

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle holds the weights itself: the files are removed by whoever made them."""
        state = {**self.__dict__}
        if self.folder:
            inner = Kept("disk", {}, {}, {}, self.folder)
            _from_disk(inner)
            state |= {"where": "cpu", "weights": inner.weights, "biases": inner.biases, "heads": inner.heads, "folder": ""}
        return state


def merge(vera: "Vera", member: Member, keep: Keep) -> MergeReport:
    """Writes the adapter into the base weights; on any failure everything is as it was."""
    if vera.merged is not None:
        raise StateError(f'adapter "{vera.merged}" is merged already: call unmerge(), or switch_merged("{member.name}").')
    if keep not in ("cpu", "device", "disk", None):
        raise ConfigError(f'keep is {keep!r}, expected "cpu", "device", "disk" or None.')
    sharded.refuse(vera.model, "merge", "save() the adapter, and merge it on one device.")
    if vera.runtime.overrides:
        raise StateError("a rows(), tokens() or using() hasn't ended: merging would change the weights under its rows.")
    _refuse_ties(vera, member)
    names = list(dict.fromkeys([*member.layout.by_layer, *member.biases]))
    vera.inside.hashes_of(vera.inside.sites)  # of the base weights: load() compares with these while merged
    kept = Kept(keep, {}, {}, {})
    tally = Tally()
    try:
        if keep == "disk":
            _to_disk(kept, vera, member, names)
        for name in names:
            module = vera.inside.sites[name]
            if keep != "disk":
                kept.weights[name] = snapshot(module, None if keep == "device" else "cpu")
                if name in member.biases:
                    kept.biases[name] = _bias_of(module)
            if name in member.layout.by_layer:
                tally.write(name, module, _delta(module, member, name))
            if name in member.biases:
                _set_bias(module, member.biases[name])
        if keep != "disk":
            kept.heads = {head: _state_of(vera.inside.heads[head]) for head in member.heads}
        write_heads(vera, member)
    except BaseException:
        if kept.folder:
            _from_disk(kept)
        _put_back(vera, kept)
        kept.forget()
        raise
    if keep is None:
        kept.weights, kept.biases, kept.heads = {}, {}, {}
    vera.kept = kept
    vera.runtime.merged = member.name
    return tally.report(member.name, vera.inside.sites)


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
    if kept.folder:
        _from_disk(kept)
    _put_back(vera, kept)
    kept.forget()
    vera.kept = None
    vera.runtime.merged = None


def switch(vera: "Vera", member: Member) -> MergeReport:
    """Unmerges what is merged, then merges another, keeping the weights where they were kept."""
    keep: Keep = "cpu"
    if vera.kept is not None:
        keep, before = vera.kept.where, vera.member(vera.merged)
        _refuse_ties(vera, member)
        unmerge(vera)
        try:
            return merge(vera, member, keep)
        except BaseException:
            merge(vera, before, keep)
            raise
    return merge(vera, member, keep)


def write_heads(vera: "Vera", member: Member) -> None:
    """The member's own copies of fully trained modules into the base's."""
    for head in member.heads:
        _load_plain(vera.inside.heads[head], vera.inside.head_state(head, member))


def _delta(module: nn.Module, member: Member, name: str) -> Tensor:
    """ΔW (m, n) of one layer, all its parts, in float32 or wider."""
    W = read_weight(module)
    like = W.new_empty(0, dtype=torch.promote_types(W.dtype, torch.float32))
    delta = torch.zeros(W.shape, dtype=like.dtype, device=like.device)
    for unit in member.layout.by_layer[name]:
        d, b = (v.detach().to(like) for v in member.vectors(unit.unit))
        part = delta_weight(unit.A(like), unit.B(like), d * unit.scale, b)
        if unit.rows is None:
            delta += part
        elif isinstance(unit.rows, slice):
            delta[unit.rows] += part
        else:
            delta.index_add_(0, unit.rows.to(delta.device), part)
    return delta


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


def _bias_of(module: nn.Module) -> Tensor | None:
    return module.bias.detach().clone() if isinstance(module.bias, Tensor) else None


def _state_of(head: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in plain_copy(head).state_dict().items()}


def _to_disk(kept: Kept, vera: "Vera", member: Member, names: list[str]) -> None:
    """Every old weight in a file of its own, before the first is changed: one at a time in memory."""
    kept.folder = tempfile.mkdtemp(prefix="veralib-merge-")
    try:
        for i, name in enumerate(names):
            module = vera.inside.sites[name]
            bias = {name: _bias_of(module)} if name in member.biases else {}
            torch.save(("weight", name, snapshot(module, "cpu"), bias), os.path.join(kept.folder, f"{i:06d}"))
        for i, head in enumerate(member.heads, len(names)):
            torch.save(("head", head, _state_of(vera.inside.heads[head]), {}), os.path.join(kept.folder, f"{i:06d}"))
    except (OSError, RuntimeError) as e:  # torch's writer raises RuntimeError on a full disk
        kept.forget()
        raise StateError(
            f'the old weights can\'t be kept on the disk: {e}. Nothing was merged; free space, or keep="cpu".'
        ) from e


def _from_disk(kept: Kept) -> None:
    try:
        for file in sorted(os.listdir(kept.folder)):
            kind, name, saved, bias = torch.load(os.path.join(kept.folder, file), weights_only=False)
            if kind == "head":
                kept.heads[name] = saved
            else:
                kept.weights[name] = saved
                kept.biases |= bias
    except OSError as e:
        raise StateError(f"the weights kept in {kept.folder} can't be read ({e}): load the base model again.") from e


def _refuse_ties(vera: "Vera", member: Member) -> None:
    """A tied weight is two layers': ΔW would change both."""
    adapted = {id(vera.inside.sites[n].weight): n for n in member.layout.by_layer}
    own = {n: {id(vera.inside.sites[n])} for n in member.layout.by_layer}
    for head in member.heads:  # a head is written over as a whole
        adapted |= {id(p): head for p in vera.inside.heads[head].parameters()}
        own[head] = {id(m) for m in vera.inside.heads[head].modules()}
    for name, module in vera.model.named_modules(remove_duplicate=True):
        for key, p in module._parameters.items():
            if p is not None and id(p) in adapted and id(module) not in own[adapted[id(p)]]:
                raise StateError(
                    f'the weight of "{adapted[id(p)]}" is tied to "{name}.{key}": merging would change both. Leave that layer '
                    "out of the targets, or serve the adapter unmerged."
                )


def _precision(module: nn.Module) -> str:
    return quantisation(module) or str(module.weight.dtype).removeprefix("torch.")  # type: ignore[union-attr]
