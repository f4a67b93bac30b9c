"""merge: W0 + ΔW written into the base weights; unmerge: the old bits from a copy, since subtraction wouldn't give them."""

import os
import shutil
import tempfile
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import kernels, sharded
from .autograd import UnitSpec
from .bank import Member
from .core import delta_weight
from .errors import ConfigError, StateError, VeraWarning
from .heads import plain_copy
from .linears import Snapshot, is_conv1d, is_plain, quantisation, read_weight, refuse_computed, restore, snapshot
from .merge_report import MergeReport, Tally

if TYPE_CHECKING:
    from .model import Vera

Keep = Literal["cpu", "device", "disk", None]


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
    _refuse_overrides(vera)
    _refuse_ties(vera, member)
    return _write(vera, member, keep)


def _write(vera: "Vera", member: Member, keep: Keep, old: "Kept | None" = None) -> MergeReport:
    """old: what another adapter, merged now, has kept. Those weights are W0 and stay kept; what only it changed is put back."""
    names = list(dict.fromkeys([*member.layout.by_layer, *member.biases]))
    vera.inside.hashes_of(vera.inside.sites)  # of the base weights: load() compares with these while merged
    kept = Kept(keep, {}, {}, {})
    tally = Tally()
    try:
        if keep == "disk":
            _to_disk(kept, vera, member, names)
        if old is not None:
            _put_back(vera, old, but=member.layout.by_layer)
        for name in names:
            module = vera.inside.sites[name]
            known = old.weights.get(name) if old is not None else None
            if keep != "disk":
                if known is not None and keep == "device" and known.data.device != module.weight.device:
                    restore(module, known)  # the model has moved since
                    known = None
                kept.weights[name] = known or snapshot(module, None if keep == "device" else "cpu")
                if name in member.biases:
                    kept.biases[name] = _bias_of(module)
            if name in member.layout.by_layer:
                _merge_layer(tally, module, member, name, known)
            if name in member.biases:
                _set_bias(module, member.biases[name])
        if keep != "disk":
            kept.heads = {head: _state_of(vera.inside.heads[head]) for head in member.heads}
        write_heads(vera, member)
        report = tally.report(member.name, vera.inside.sites)
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
    if kept.folder:
        _from_disk(kept)
    _put_back(vera, kept)
    kept.forget()
    vera.kept = None
    vera.runtime.merged = None


def switch(vera: "Vera", member: Member) -> MergeReport:
    """Merges another adapter in the place of the one that is merged, keeping the weights where they were kept."""
    old = vera.kept
    if old is None:
        return merge(vera, member, "cpu")
    before, keep = vera.member(vera.merged), old.where
    _refuse_overrides(vera)
    _refuse_ties(vera, member)
    if keep in ("disk", None):
        unmerge(vera)
        old = None
    try:
        return _write(vera, member, keep, old)
    except BaseException:
        if old is not None:
            unmerge(vera)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", VeraWarning)  # said when it was merged
            _write(vera, before, keep)
        raise


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


def _merge_layer(tally: Tally, module: nn.Module, member: Member, name: str, known: Snapshot | None) -> None:
    """W0 + ΔW into one layer. known: a copy of W0, where the weight isn't W0 now."""
    units = member.layout.by_layer[name]
    W0 = None
    if known is not None:
        W0 = _in_reach(known, module) if len(units) == 1 and units[0].rows is None else None
        if W0 is None:
            restore(module, known)
    if _fits_kernel(module, units):
        for unit in units:
            tally.add(name, _by_kernel(module, unit, member, W0))
    else:
        tally.write(name, module, _delta(module, member, name), W0)


def _in_reach(known: Snapshot, module: nn.Module) -> Tensor | None:
    """A kept weight as W0 (m, n), where it lies on the weight's own device as plain numbers."""
    if known.kind or known.data.device != module.weight.device:
        return None
    return known.data.t() if is_conv1d(module) else known.data


def _fits_kernel(module: nn.Module, units: Sequence[UnitSpec]) -> bool:
    weight: Any = module.weight
    whole = len(units) == 1 and units[0].rows is None
    parts = all(isinstance(u.rows, slice) for u in units)  # of one linear, so apart from each other
    return (whole or parts) and is_plain(weight) and kernels.on(weight) and not quantisation(module)


def _by_kernel(module: nn.Module, unit: UnitSpec, member: Member, W0: Tensor | None) -> Tensor:
    """ΔW of one unit added by the kernel: the old weight is read once and the new one written. The sums of a Tally."""
    from .kernels.merge import merge_into

    weight = read_weight(module)
    here = weight if unit.rows is None else weight[unit.rows]
    # A and B of a seed are exact in bf16; PEFT's, and those of a float32 weight, are multiplied as float32.
    half = weight.dtype != torch.float32 and unit.basis.kind != "peft"
    like = weight.new_empty(0, dtype=torch.bfloat16 if half else torch.float32)
    d, b = (v.detach().to(like.device, torch.float32) for v in member.vectors(unit.unit))
    return merge_into(here, here if W0 is None else W0, unit.A(like), unit.B(like), d * unit.scale, b)


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


def _refuse_overrides(vera: "Vera") -> None:
    if vera.runtime.overrides:
        raise StateError("a rows(), tokens() or using() hasn't ended: merging would change the weights under its rows.")


def _put_back(vera: "Vera", kept: Kept, but: Collection[str] = ()) -> None:
    """but: layers whose weights are left as they are."""
    for name, saved in kept.weights.items():
        if name not in but:
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
    """A tied weight is two layers': ΔW would change both. So is memory that two weights share, and a weight that is computed from
    others can't be written at all."""
    for layer in member.layout.by_layer:
        refuse_computed(vera.inside.sites[layer], layer)
    adapted = {id(getattr(vera.inside.sites[n], "weight", n)): n for n in member.layout.by_layer}
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
    _refuse_overlaps(vera, member)


def _refuse_overlaps(vera: "Vera", member: Member) -> None:
    """StateError where the memory of a weight that will be written is also another's (`a.weight.data = b.weight.data.t()`)."""
    written = {id(getattr(vera.inside.sites[layer], "weight", None)) for layer in member.layout.by_layer}
    written |= {id(p) for head in member.heads for p in vera.inside.heads[head].parameters()}
    places = sorted((*place, name, id(p) in written) for name, p in vera.model.named_parameters() if (place := _place(p)))
    reached: dict[tuple[str, bool], tuple[int, str]] = {}
    for device, first, end, name, mine in places:
        for before in (True, False) if mine else (True,):
            stop, other = reached.get((device, before), (0, ""))
            if first < stop:
                raise StateError(
                    f'"{name}" and "{other}" lie in the same memory: merging would change both. Leave the layer out of the '
                    "targets, serve the adapter unmerged, or give one of them a copy of its own."
                )
        reached[device, mine] = max(reached.get((device, mine), (0, "")), (end, name))


def _place(p: Tensor) -> tuple[str, int, int] | None:
    """(device, first byte, end) of a tensor; None where it has no memory of its own."""
    if p.is_meta or not p.numel() or p.layout is not torch.strided or is_traceable_wrapper_subclass(p):
        return None
    extent = 1 + sum((n - 1) * stride for n, stride in zip(p.shape, p.stride(), strict=True))
    return str(p.device), p.data_ptr(), p.data_ptr() + extent * p.element_size()
