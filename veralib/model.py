"""attach and the handle: adapters in, on, over and out of one frozen model."""

import contextlib
import re
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import layers, matching, merging, root
from .adapter import Adapter, BaseModel
from .autograd import UnitSpec
from .bank import Bank, Layout, Member
from .basis import Basis, layer_id_of
from .config import VeraConfig
from .errors import ConfigError, StateError, VeraWarning, unknown_name
from .format import load_adapter, save_adapter
from .linears import shape
from .selection import BASE, Runtime, Selection
from .targets import Target, find_targets

if TYPE_CHECKING:
    from .merging import Keep, MergeReport

_OWN = re.compile(r"(^|\.)vera_\d+(\.|$)")


def attach(model: nn.Module, config: Any = None, name: str = "default") -> "Vera":
    """The handle of `model`, which can now carry adapters; with a config, a fresh trainable adapter is active in it.

    The base's parameters are frozen. Modules keep their names, classes stay subclasses of what they were, and the handle
    lives on the model (handle(model) finds it). config: a VeraConfig or a peft.VeraConfig; without one, load adapters later.
    Raises StateError on a model that is attached already or is a PeftModel, ConfigError where the config's targets match
    nothing; then the model is as it was.
    """
    if "_vera_handle" in model.__dict__:
        raise StateError(
            "this model is attached already: handle(model).add(config, name=…) puts another adapter beside the others."
        )
    if any(cls.__module__.startswith("peft.") for cls in type(model).__mro__):
        raise StateError(
            "this is a PeftModel, whose layers are wrapped already: veralib.from_peft(model) takes over its VeRA adapters, or "
            "attach to the base model, model.unload()."
        )
    if inside := [n for n, m in model.named_modules() if "_vera_handle" in m.__dict__]:
        raise StateError(f'"{inside[0]}" inside this model is attached already: detach it first, or use its own handle.')
    config = _checked(config, name)
    vera = Vera(model)
    if config is not None:
        try:
            vera.add(config, name)
            vera.use(name)
        except BaseException:
            vera.detach()
            raise
    return vera


def handle(model: nn.Module) -> "Vera":
    """The Vera handle that lives on a model, also behind DistributedDataParallel or torch.compile. StateError without one."""
    inner: Any = model
    while inner is not None and "_vera_handle" not in inner.__dict__:
        inner = inner._modules.get("module") or inner._modules.get("_orig_mod")
    if inner is None:
        raise StateError("this model carries no adapters: attach(model, VeraConfig(…)) first.")
    return inner.__dict__["_vera_handle"]


def _checked(config: Any, name: str) -> VeraConfig | None:
    if not isinstance(name, str) or not name:
        raise ConfigError(f"an adapter's name is {name!r}, expected a string that isn't empty.")
    if config is None or isinstance(config, VeraConfig):
        return config
    if type(config).__name__ == "VeraConfig" and type(config).__module__.startswith("peft."):
        from .interop.peft import config_from_peft

        return config_from_peft(config)
    raise ConfigError(f"config is a {type(config).__name__}, expected a veralib.VeraConfig or a peft.VeraConfig.")


class Vera:
    """Many adapters in one frozen model. Made by attach(); found again by handle(model)."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.runtime = Runtime()
        self.members: dict[str, Member] = {}
        self.kept: merging.Kept | None = None
        self._banks: dict[Layout, Bank] = {}
        self._layouts: dict[tuple, Layout] = {}
        self._sites: dict[str, nn.Module] = {}
        self._heads: dict[str, nn.Module] = {}
        self._next = 0
        self._hashes: dict[str, tuple[int, int, str]] = {}
        self._selections: OrderedDict[tuple, Selection] = OrderedDict()
        self._checked_calls = False
        self._trained_before = [p for p in model.parameters() if p.requires_grad]
        model.requires_grad_(False)
        root.adopt(model, self)

    # What there is

    @property
    def names(self) -> tuple[str, ...]:
        """All adapters, in the order they came."""
        return tuple(self.members)

    @property
    def active(self) -> str | None:
        """The adapter that use() chose for all rows, None for the base model."""
        return self.runtime.active.member.name if self.runtime.active.member else None

    @property
    def merged(self) -> str | None:
        """The adapter that is merged into the base weights now."""
        return self.runtime.merged

    def member(self, name: str | None) -> Member:
        """The adapter's entry; None means the active one, or the only one. UnknownName lists the known."""
        if name is None:
            name = self.active or self.merged or (self.names[0] if len(self.members) == 1 else None)
            if name is None:
                raise StateError(f"no adapter is active: name one of {', '.join(self.names) or '(there is none)'}.")
        if name not in self.members:
            raise unknown_name("adapter", name, self.members)
        return self.members[name]

    def adapter(self, name: str | None = None) -> Adapter:
        """A copy of one adapter's present state as plain data, on the CPU."""
        member = self.member(name)
        vectors = {}
        for unit in member.layout.units:
            d, b = member.vectors(unit.unit)
            vectors[unit.unit] = (d.detach().to("cpu", copy=True), b.detach().to("cpu", copy=True))
        names = list(dict.fromkeys([*member.layout.by_layer, *member.biases]))
        modules = {
            n: {k: t.detach().to("cpu", copy=True) for k, t in self._head(n, member).state_dict().items()} for n in member.heads
        }
        basis = next(iter(member.layout.units)).basis.shared()
        own = {u.unit: u.basis.layer_id for u in member.layout.units if u.basis.layer_id}
        config = getattr(self.model, "config", None)
        base = BaseModel(
            id=str(getattr(config, "_name_or_path", "") or ""),
            revision=str(getattr(config, "_commit_hash", "") or ""),
            layers={n: shape(self._sites[n]) for n in names},
            hashes=self.hashes(names),
            quantised=matching.quantisation_of(self._sites[n] for n in names),
        )
        return Adapter(
            member.config,
            basis,
            base,
            vectors,
            own,
            {k: v.to("cpu", copy=True) for k, v in member.biases.items()},
            modules,
            dict(member.notes),
        )

    # In and out

    def add(self, config: Any, name: str) -> "Vera":
        """A fresh trainable adapter beside the others; what is active stays active."""
        config = _checked(config, name)
        if config is None:
            raise ConfigError("add() needs a VeraConfig.")
        self._unmerged("add an adapter")
        self._new_name(name)
        targets = [t for t in find_targets(self.model, config) if not _OWN.search(t.layer)]
        heads = self._find_heads(config)
        member = Member(name, config, self._layout(_units(targets, config)), self._next, heads=tuple(heads))
        self._adapt(member.layout, {t.layer: t.module for t in targets}, heads)
        self._make_trainable(member)
        for head, module in heads.items():
            self._add_head(head, module, member)
        self._enter(member)
        root.watch_learning_rate(self)
        return self

    def load(
        self,
        source: "str | PathLike | Adapter",
        name: str = "default",
        trainable: bool = False,
        *,
        revision: str | None = None,
        allow_other_base: bool = False,
    ) -> "Vera":
        """One more adapter in the model: a veralib file or folder, a folder that PEFT saved, a hub id, or an Adapter.

        What is active stays active. AdapterMismatch where it was trained on another base model, by its layers' names, shapes
        or weights; allow_other_base=True loads it all the same if names and shapes fit.
        """
        self._new_name(name)
        adapter = source if isinstance(source, Adapter) else self._read(source, revision)
        matching.check(self, adapter, name, allow_other_base)
        layout = self._layout_of(adapter)
        heads = matching.heads(self, adapter)
        missing = {n: self.model.get_submodule(n) for n in [*layout.by_layer, *adapter.biases] if n not in self._sites}
        self._adapt(layout, missing, heads)
        member = Member(name, adapter.config, layout, self._next, heads=tuple(heads), notes=adapter.notes)
        row = torch.cat([t for u in layout.units for t in adapter.vectors[u.unit]]) if layout.units else torch.empty(0)
        if trainable:
            self._unmerged("load a trainable adapter")
            self._make_trainable(member)
            self._write(member, row)
        else:
            bank = self._banks.get(layout) or self._banks.setdefault(layout, Bank(layout, self.device))
            member.bank, member.slot = bank, bank.put(row)
        member.biases = {n: b.to(self.device) for n, b in adapter.biases.items()}
        for head, module in heads.items():
            self._add_head(head, module, member, adapter.modules[head])
        self._enter(member)
        return self

    def _read(self, source: "str | PathLike", revision: str | None) -> Adapter:
        from pathlib import Path

        path = Path(source)
        if not path.exists() and isinstance(source, str):
            from .interop import hub

            if hub.is_hub_id(source):
                path = Path(hub.download(source, revision))
        if (path / "adapter_config.json").is_file():
            from .interop.peft import read_peft

            return read_peft(path, model=self.model)
        return load_adapter(path)

    def save(self, path: "str | PathLike", name: str | None = None) -> Any:
        """Writes one adapter to a file, or to adapter_model.safetensors in a folder; returns the file's path."""
        return save_adapter(self.adapter(name), path)

    def push(self, repo_id: str, name: str | None = None, **options: Any) -> str:
        """Uploads one adapter to the hub with a README card; see interop.hub.push for the options."""
        from .interop import hub

        return hub.push(self.adapter(name), repo_id, **options)

    def remove(self, name: str) -> None:
        """Takes one adapter out of memory; if it was active, the base model is."""
        member = self.member(name)
        if self.merged == name:
            raise StateError(f'adapter "{name}" is merged into the base weights: call unmerge() first.')
        if self.active == name:
            self.runtime.active = BASE
        for owner, d, b in member.owners.values():
            del owner._parameters[d], owner._parameters[b]
        for head in member.heads:
            module = self._heads[head]
            module._vera_head.resident.pop(member.number, None)  # type: ignore[union-attr, operator]
            module._modules.pop(f"vera_{member.number}", None)
        if member.bank is not None:
            member.bank.drop(member.slot)
        del self.members[name]
        self._selections.clear()

    def detach(self) -> nn.Module:
        """The plain model again: classes, keys, bits and requires_grad as before attach. Unsaved adapters are gone."""
        self._unmerged("detach")
        for name in list(self.members):
            self.remove(name)
        for module in self._sites.values():
            layers.release(module)
        for module in self._heads.values():
            layers.release_head(module)
        root.release(self.model)
        for p in self._trained_before:
            p.requires_grad_(True)
        return self.model

    # Which adapter

    def use(self, name: str | None) -> None:
        """One adapter for all rows from now on; None is exactly the base model."""
        self._unmerged("switch adapters")
        self.runtime.active = BASE if name is None else self._one(self.member(name))

    def _one(self, member: Member) -> Selection:
        return Selection("one", member, device=self.device)

    @contextlib.contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """use(), for this thread and the length of the `with`."""
        self._unmerged("switch adapters")
        with self.runtime.override(BASE if name is None else self._one(self.member(name))):
            yield

    def rows(self, names: Sequence[str | None]) -> contextlib.AbstractContextManager:
        """Inside the `with`, row i of each batch uses adapter names[i]; None is exactly the base model. Works in generate."""
        return self._mixed("rows", names)

    def tokens(
        self, index: "Sequence[str | None] | Tensor", names: Sequence[str | None] | None = None
    ) -> contextlib.AbstractContextManager:
        """Inside the `with`, token i (in the batch's flattened order) uses its own adapter: packed and continuous batches.

        index: an adapter's name for each token, or, with `names`, an integer for each token: its place in names; -1 the base.
        """
        if names is None:
            if isinstance(index, Tensor):
                raise ConfigError(
                    "tokens(index) got a tensor without names=: give names=[…], the adapters that its numbers mean."
                )
            return self._mixed("tokens", index)
        places = [int(i) for i in index]  # type: ignore[arg-type]
        if wrong := [i for i in places if not -1 <= i < len(names)]:
            raise ConfigError(f"tokens(index) holds {wrong[0]}, expected -1 to {len(names) - 1}: there are {len(names)} names.")
        return self._mixed("tokens", [None if i < 0 else names[i] for i in places])

    def _mixed(self, kind: Any, names: Sequence[str | None]) -> contextlib.AbstractContextManager:
        self._unmerged(f"use {kind}()")
        if isinstance(names, str):
            raise ConfigError(f'{kind}() got the string "{names}", expected a list with a name or None for each row.')
        key = (kind, tuple(names), self.device)
        selection = self._selections.get(key)
        if selection is None:
            members = tuple(None if n is None else self.member(n) for n in names)
            selection = Selection(kind, names=tuple(names), members=members, device=self.device)
            self._selections[key] = selection
            if len(self._selections) > 32:
                self._selections.popitem(last=False)
        return self.runtime.override(selection)

    def reference(self) -> nn.Module:
        """The base model as a module of its own without a second copy of it: the reference model that DPO and KL terms ask for."""
        return root.Reference(self)

    # Merging

    def merge(self, name: str | None = None, keep: "Keep" = "cpu") -> "MergeReport":
        """Writes W0 + ΔW into the base weights; the report says which share of ΔW survived the weights' precision.

        keep: where the old weights wait for unmerge(): "cpu", "device", "disk", or None, and then unmerge() raises.
        """
        return merging.merge(self, self.member(name), keep)

    def unmerge(self) -> None:
        """The base weights again, bit for bit."""
        merging.unmerge(self)

    def switch_merged(self, name: str) -> "MergeReport":
        """Unmerges what is merged and merges `name`."""
        return merging.switch(self, self.member(name))

    # Training

    def parameter_groups(self, lr: float = 1e-2, lr_head: float = 4e-3, name: str | None = None) -> list[dict[str, Any]]:
        """Optimiser groups of one adapter, or of all trainable ones: vectors at lr, fully trained modules at lr_head (Table 8)."""
        chosen = [self.member(name)] if name is not None else [m for m in self.members.values() if m.trainable]
        vectors = [
            t
            for m in chosen
            for o, d, b in m.owners.values()
            for t in (o._parameters[d], o._parameters[b])
            if t is not None and t.requires_grad
        ]
        heads = [p for m in chosen for h in m.heads for p in self._head(h, m).parameters() if p.requires_grad]
        if not vectors and not heads:
            raise StateError("there is nothing to train: add(config) an adapter, or load one with trainable=True.")
        groups = [{"params": vectors, "lr": lr, "name": "vectors"}] if vectors else []
        return groups + ([{"params": heads, "lr": lr_head, "name": "head"}] if heads else [])

    def trainable_parameters(self) -> tuple[int, int]:
        """(entries of d and b that train, entries of fully trained modules)."""
        groups = {g["name"]: sum(p.numel() for p in g["params"]) for g in self.parameter_groups()}
        return groups.get("vectors", 0), groups.get("head", 0)

    def print_trainable_parameters(self) -> None:
        """Prints how many parameters train, heads apart: the paper doesn't count them."""
        vectors, head = self.trainable_parameters() if any(m.trainable for m in self.members.values()) else (0, 0)
        base = sum(p.numel() for n, p in self.model.named_parameters() if not p.requires_grad)
        extra = f" + {head:,} in fully trained modules" if head else ""
        print(f"trainable: {vectors:,} in d and b{extra}; frozen: {base:,} ({100 * vectors / max(1, base):.4f} %)")

    # Insides

    @property
    def device(self) -> torch.device:
        """The device of the first adapted weight, or of the model's first parameter."""
        module: nn.Module = next(iter(self._sites.values()), self.model)
        first = next((p for p in module.parameters() if p.device.type != "meta"), None)
        return torch.device("cpu") if first is None else first.device

    def hashes(self, names: Sequence[str]) -> dict[str, str]:
        """Weight hashes of these layers, cached until a weight changes; of a merged model, those of its base weights."""
        return {n: h for n in names if (h := matching.cached_hash(self, n))}

    def _new_name(self, name: str) -> None:
        _checked(None, name)
        if name in self.members:
            raise StateError(f'there is an adapter "{name}" already: choose another name, or remove("{name}") first.')

    def _unmerged(self, what: str) -> None:
        if self.merged is not None:
            raise StateError(f'can\'t {what}: adapter "{self.merged}" is merged into the base weights. Call unmerge() first.')

    def _enter(self, member: Member) -> None:
        self._next += 1
        self.members[member.name] = member
        self._selections.clear()

    def _adapt(self, layout: Layout, modules: Mapping[str, nn.Module], heads: Mapping[str, nn.Module]) -> None:
        for layer, module in modules.items():
            if layer not in self._sites:
                layers.adapt(layer, module, self.runtime)
                self._sites[layer] = module
        for head, module in heads.items():
            if head not in self._heads:
                layers.adapt_head(head, module, self.runtime)
                self._heads[head] = module

    def _layout(self, units: Sequence[UnitSpec]) -> Layout:
        key = tuple((u.unit, u.m, u.r, u.scale, u.basis) for u in units)
        if key not in self._layouts:
            self._layouts[key] = Layout(tuple(units))
        return self._layouts[key]

    def _layout_of(self, adapter: Adapter) -> Layout:
        vectors, ids = adapter.vectors, adapter.layer_ids
        lengths = tuple((unit, len(b), len(d), ids.get(unit)) for unit, (d, b) in vectors.items())
        key = (adapter.basis, adapter.config.scale, lengths)
        if key not in self._layouts:
            self._layouts[key] = self._layout(matching.units(self, adapter))
        return self._layouts[key]

    def _make_trainable(self, member: Member) -> None:
        owners = {}
        for unit in member.layout.units:
            module = self._sites[unit.layer]
            stem = f"vera_{member.number}" + (f"_{unit.unit.partition(':')[2]}" if ":" in unit.unit else "")
            device = module.weight.device if module.weight.device.type != "meta" else torch.device("cpu")  # type: ignore[union-attr]
            d = torch.full((unit.r,), float(member.config.d_start), device=device)
            b = torch.full((unit.m,), float(member.config.b_start), device=device)
            module.register_parameter(f"{stem}_d", nn.Parameter(d, requires_grad=member.config.train != "b"))
            module.register_parameter(f"{stem}_b", nn.Parameter(b, requires_grad=member.config.train != "d"))
            owners[unit.unit] = (module, f"{stem}_d", f"{stem}_b")
        member.owners = owners

    @torch.no_grad()
    def _write(self, member: Member, row: Tensor) -> None:
        """Fills the vectors of an adapter from a flat row in its layout's order."""
        at = 0
        for unit in member.layout.units:
            for vector in member.vectors(unit.unit):
                vector.copy_(row[at : at + vector.numel()])
                at += vector.numel()

    def _find_heads(self, config: VeraConfig) -> dict[str, nn.Module]:
        found: dict[str, nn.Module] = {}
        modules = {n: m for n, m in self.model.named_modules() if n and not _OWN.search(n)}
        for wanted in config.train_modules:
            hits = {n: m for n, m in modules.items() if n == wanted or n.endswith("." + wanted)}
            if not hits:
                leaves = list(dict.fromkeys(n.rpartition(".")[2] for n in modules))
                raise unknown_name("module (train_modules)", wanted, leaves)
            found |= hits
        adapted = [n for n, m in found.items() if any(isinstance(c, layers.VeraLayer) for c in m.modules())]
        if adapted:
            raise ConfigError(f'"{adapted[0]}" is adapted by another adapter and can\'t be trained in full too.')
        return found

    def _add_head(self, name: str, module: nn.Module, member: Member, state: Mapping[str, Tensor] | None = None) -> None:
        copied = layers.plain_copy(module)
        if state is not None:
            copied.load_state_dict(dict(state))
        if member.trainable:
            copied.requires_grad_(True)
            module.add_module(f"vera_{member.number}", copied)
        else:
            module._vera_head.resident[member.number] = copied  # type: ignore[union-attr, operator]

    def _head(self, name: str, member: Member) -> nn.Module:
        module = self._heads[name]
        return module._vera_head.copy_of(module, member)  # type: ignore[union-attr, operator]

    def warn_uncalled(self) -> None:
        """After the first forward with adapters: names adapted layers that it never called, whose vectors can't train."""
        selection = self.runtime.overridden() or self.runtime.active
        if self._checked_calls or not selection.distinct:
            return
        self._checked_calls = True
        silent = [n for m in selection.distinct for n in m.layout.by_layer if not self._sites[n]._vera.called]  # type: ignore[union-attr]
        if silent:
            warnings.warn(
                f"{len(silent)} adapted layers were not called in the first forward, so their adapters do nothing: "
                f"{', '.join(silent[:3])}{' …' if len(silent) > 3 else ''}. Their parent may read the weight directly.",
                VeraWarning,
            )

    def trained_vectors(self) -> "weakref.WeakSet[Tensor]":
        """All trainable d and b."""
        return weakref.WeakSet(t for m in self.members.values() if m.trainable for u in m.layout.units for t in m.vectors(u.unit))


def _units(targets: Sequence[Target], config: VeraConfig) -> list[UnitSpec]:
    if config.basis == "peft":
        ranks = {t.rank for t in targets}
        if len(ranks) > 1:
            raise ConfigError(
                f"basis='peft' has one rank for all layers; the config gives {sorted(ranks)}. Use basis='philox-u8'."
            )
        widest_in, widest_out = max(t.n for t in targets), max(shape(t.module)[0] for t in targets)
        whole = Basis("peft", config.seed, rank=ranks.pop(), max_in=widest_in, max_out=widest_out)
    else:
        whole = Basis("philox-u8", config.seed, config.levels)
    out = []
    for t in targets:
        basis = whole if config.sharing == "shared" else Basis("philox-u8", config.seed, config.levels, layer_id_of(t.unit))
        out.append(UnitSpec(t.unit, t.layer, t.rows, t.m, t.n, t.rank, config.scale * basis.scale(t.n, t.rank), basis))
    return out
