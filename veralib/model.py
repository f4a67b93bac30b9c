"""The handle of a model: adapters in, on, over and out of it. attaching.py makes it."""

import contextlib
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import checkpoint, matching, merging, root, sharded
from .adapter import Adapter
from .bank import Member
from .checks import faults
from .config import as_config
from .errors import ConfigError, StateError, unknown_name
from .format import adapter_file, load_adapter, save_adapter
from .linears import is_linear, shape
from .residence import Residence
from .runtime import Runtime
from .selection import BASE, Selection, row_names, token_names

if TYPE_CHECKING:
    from .fleet import Fleet
    from .merge_report import MergeReport
    from .merging import Keep


class Vera:
    """Many adapters in one frozen model. Made by attach(); found again by handle(model)."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.runtime = Runtime()
        self.inside = Residence(model, self.runtime)
        self.kept: merging.Kept | None = None
        self._selections: OrderedDict[tuple, Selection] = OrderedDict()
        self._trained_before = [p for p in model.parameters() if p.requires_grad]
        self.batches_at_start = checkpoint.batches_seen(model)
        model.requires_grad_(False)
        root.adopt(model, self)

    # What there is

    @property
    def members(self) -> dict[str, Member]:
        """The adapters' entries by name."""
        return self.inside.members

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
        self._live()
        if name is not None and not isinstance(name, str):
            raise ConfigError(f"an adapter's name is {name!r}, expected a string.")
        if name is None:
            name = self.active or self.merged or (self.names[0] if len(self.members) == 1 else None)
            if name is None:
                raise StateError(f"no adapter is active: name one of {', '.join(self.names) or '(there is none)'}.")
        if name not in self.members:
            raise unknown_name("adapter", name, self.members)
        return self.members[name]

    def adapter(self, name: str | None = None) -> Adapter:
        """A copy of one adapter's present state as plain data, on the CPU. In a sharded model all processes call it."""
        return checkpoint.adapter_of(self, self.member(name))

    # In and out

    def add(self, config: Any, name: str) -> "Vera":
        """A fresh trainable adapter beside the others; what is active stays active."""
        config = as_config(config, name, self.model)
        if config is None:
            raise ConfigError("add() needs a VeraConfig.")
        self._unmerged("add an adapter")
        self._new_name(name)
        sharded.refuse_new_vectors(self.model)
        with self.runtime.lock:
            self.inside.fresh(config, name)
            self._selections.clear()
        root.watch_learning_rate(self)
        return self

    def fleet(self, config: Any, slots: int, dtype: torch.dtype = torch.float32, recompute: bool | None = None) -> "Fleet":
        """A Fleet: room for `slots` owners that train at once, each row of a batch one owner's. Its add(names) lets them in.
        recompute: backward computes B u anew, or finds it kept: faster, and m numbers more a token. None: kept on a CPU alone."""
        from .fleet import fleet

        checked = as_config(config, "fleet", self.model)
        if checked is None:
            raise ConfigError("fleet() needs a VeraConfig.")
        self._unmerged("make a fleet")
        return fleet.make(self, checked, slots, dtype, recompute)

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
        if isinstance(source, Adapter):
            adapter = source
        else:
            adapter = self._read(source, revision)
        if any(n == 0 for _, n in adapter.base.layers.values()):  # PEFT's folder doesn't say: this model does
            from .interop.parse import with_shapes

            adapter = with_shapes(adapter, {n: shape(m) for n, m in self.model.named_modules() if n and is_linear(m)})
        if adapter.modules:
            sharded.refuse(self.model, "load an adapter with a trained head", "Load it before fully_shard.")
        if isinstance(source, Adapter) and (wrong := next(faults(adapter), None)):
            raise ConfigError(f'the adapter for "{name}" can\'t be used: {wrong}.')
        modules = matching.check(self.inside, adapter, name, allow_other_base)
        if trainable:
            self._unmerged("load a trainable adapter")
            sharded.refuse_new_vectors(self.model)
        with self.runtime.lock:
            self._new_name(name)
            self.inside.from_adapter(adapter, name, trainable, modules)
            self._selections.clear()
        return self

    def _read(self, source: "str | PathLike", revision: str | None) -> Adapter:
        from pathlib import Path

        if not isinstance(source, (str, PathLike)) or not os.fspath(source):
            raise ConfigError(f"the adapter to load is {source!r}, expected a file, a folder, a hub id or an Adapter.")
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
        """Writes one adapter to a file, or to adapter_model.safetensors in a folder; returns the file's path.

        In a sharded model all processes call it, and the first writes: a barrier must come before others read the file.
        """
        adapter = self.adapter(name)
        if self.member(name).trainable:
            checkpoint.warn_of_what_stays_behind(self)
        if sharded.shards(self.model) and not sharded.is_first():
            return adapter_file(path)
        return save_adapter(adapter, path)

    def push(self, repo_id: str, name: str | None = None, **options: Any) -> str:
        """Uploads one adapter to the hub with a README card; see interop.hub.push for the options."""
        from .interop import hub

        sharded.refuse(self.model, "push", "save() the adapter; one process can load_adapter() and interop.hub.push it.")
        return hub.push(self.adapter(name), repo_id, **options)

    def remove(self, name: str) -> None:
        """Takes one adapter out of memory; if it was active, the base model is."""
        with self.runtime.lock:
            member = self.member(name)
            if self.merged == member.name:
                raise StateError(f'adapter "{name}" is merged into the base weights: call unmerge() first.')
            if self.runtime.in_use(member):
                raise StateError(
                    f'adapter "{name}" is in use by a rows(), tokens() or using() that hasn\'t ended: remove it after that.'
                )
            if member.trainable:
                sharded.refuse(self.model, f'remove the trainable adapter "{name}"', "use(None) leaves it out.")
            if self.active == name:
                self.runtime.active = BASE
            self.inside.remove(name)
            self._selections.clear()

    def detach(self) -> nn.Module:
        """The plain model again: classes, keys, bits and requires_grad as before attach. Unsaved adapters are gone.

        After merge(keep=None) it is the plain merged model.
        """
        sharded.refuse(self.model, "detach", "save() the adapter, and load it into the base model on one device.")
        if self.merged is not None and self.kept is not None and self.kept.where is None:
            self.runtime.merged = self.kept = None
        self._unmerged("detach")
        self.runtime.active = BASE
        self.inside.release()
        self._selections.clear()
        root.release(self.model)
        for p in self._trained_before:
            p.requires_grad_(True)
        return self.model

    # Which adapter

    def use(self, name: str | None) -> None:
        """One adapter for all rows from now on; None is exactly the base model."""
        self._unmerged("switch adapters")
        with self.runtime.lock:
            self.runtime.active = BASE if name is None else self._one(self.member(name))

    def _one(self, member: Member) -> Selection:
        return Selection("one", member, device=self.inside.device)

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
        return self._mixed("tokens", token_names(index, names))

    def _mixed(self, kind: Any, names: Sequence[str | None]) -> contextlib.AbstractContextManager:
        self._unmerged(f"use {kind}()")
        names = row_names(kind, names)
        with self.runtime.lock:  # a name may go to another adapter between the look-up and the entry
            key = (kind, names, self.inside.device)
            selection = self._selections.get(key)
            if selection is None:
                members = tuple(None if n is None else self.member(n) for n in names)
                selection = Selection(kind, names=names, members=members, device=self.inside.device)
                self._selections[key] = selection
                if len(self._selections) > 32:
                    self._selections.popitem(last=False)
        return self.runtime.override(selection)

    def reference(self) -> nn.Module:
        """The base model as a module of its own without a second copy: the reference model that DPO and KL terms ask for."""
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
        """Merges `name` in the place of what is merged; the weights kept for unmerge() stay kept."""
        return merging.switch(self, self.member(name))

    # Training

    def parameter_groups(self, lr: float = 1e-2, lr_head: float = 4e-3, name: str | None = None) -> list[dict[str, Any]]:
        """Optimiser groups of one adapter, or of all trainable ones: d and b at lr, whole modules at lr_head (Table 8)."""
        sharded.put_in_pieces(self.model)  # what trains is the pieces
        chosen = [self.member(name)] if name is not None else [m for m in self.members.values() if m.trainable]
        vectors = [
            t
            for m in chosen
            for o, d, b in m.owners.values()
            for t in (o._parameters[d], o._parameters[b])
            if t is not None and t.requires_grad
        ]
        heads = [p for m in chosen for h in m.heads for p in self.inside.head(h, m).parameters() if p.requires_grad]
        if not vectors and not heads:
            raise StateError(
                "there is nothing to train: add(config) an adapter, or load one with trainable=True. A fleet's owners are moved "
                "by veralib.fleet.FleetAdamW."
            )
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

    # Checks

    def _live(self) -> None:
        if self.model.__dict__.get("_vera_handle") is not self:
            raise StateError("this handle was detached from its model: attach(model) gives a new one.")

    def _new_name(self, name: str) -> None:
        self._live()
        as_config(None, name)
        if name in self.members:
            raise StateError(f'there is an adapter "{name}" already: choose another name, or remove("{name}") first.')

    def _unmerged(self, what: str) -> None:
        self._live()
        if self.merged is not None and self.kept is not None and self.kept.where is None:
            raise StateError(
                f'can\'t {what}: adapter "{self.merged}" is merged for good (keep=None). detach() leaves the plain merged model; '
                "load the base anew for other adapters."
            )
        if self.merged is not None:
            raise StateError(f'can\'t {what}: adapter "{self.merged}" is merged into the base weights. Call unmerge() first.')
