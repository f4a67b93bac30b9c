"""What lives in a model with adapters: the adapted linears, the copies of heads, the banks and the members."""

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from . import layers, matching, sharded
from .adapter import Adapter
from .autograd import UnitSpec
from .bank import Bank, Layout, Member
from .basis import Basis, layer_id_of
from .config import VeraConfig
from .errors import ConfigError, StateError, VeraWarning, unknown_name
from .fleetbank import FleetBank
from .foreign import device_of
from .heads import TEMPLATE, adapt_head, plain_copy, release_head
from .linears import shape
from .runtime import Runtime
from .selection import Selection
from .targets import Target, find_targets

EMPTY_BANKS = 4
_OWN = re.compile(r"(^|\.)vera_\d+(\.|$)")


class Residence:
    """The inside of one Vera handle: makes members, resident and trainable, and takes them out again."""

    def __init__(self, model: nn.Module, runtime: Runtime) -> None:
        self.model = model
        self.runtime = runtime
        self.members = runtime.members
        self.sites: dict[str, nn.Module] = {}
        self.heads: dict[str, nn.Module] = {}
        self.banks: dict[Layout, Bank] = {}
        self.fleets: list[FleetBank] = []
        self.layouts: dict[tuple, Layout] = {}
        self.hashes: dict[str, tuple[int, int, str]] = {}
        self._next = 0
        self._checked_calls = False

    @property
    def device(self) -> torch.device:
        """The device of the first adapted weight, or of the model's first parameter."""
        module: nn.Module = next(iter(self.sites.values()), self.model)
        first = next((p for p in module.parameters() if p.device.type != "meta"), None)
        return torch.device("cpu") if first is None else first.device

    @torch.inference_mode(False)
    def fresh(self, config: VeraConfig, name: str) -> Member:
        """A trainable member with vectors at their start."""
        targets = [t for t in find_targets(self.model, config) if not _OWN.search(t.layer)]
        heads = self._find_heads(config)
        _refuse_offloaded(heads)
        member = Member(name, config, self._layout(_units(targets, config)), self._next, heads=tuple(heads))
        self._adapt({t.layer: t.module for t in targets}, heads)
        self._make_trainable(member)
        for module in heads.values():
            self._add_head(module, member)
        return self._enter(member)

    @torch.inference_mode(False)  # a chunk made inside inference_mode could never be written to outside
    def from_adapter(self, adapter: Adapter, name: str, trainable: bool, modules: Mapping[str, nn.Module]) -> Member:
        """A member with an adapter's vectors; modules: its layers, as matching.check found them."""
        layout = self._layout_of(adapter, modules)
        heads = matching.heads(self.model, adapter)
        self._adapt({n: modules[n] for n in (*layout.by_layer, *adapter.biases)}, heads)
        member = Member(name, adapter.config, layout, self._next, heads=tuple(heads), notes=adapter.notes)
        row = torch.cat([t for u in layout.units for t in adapter.vectors[u.unit]]) if layout.units else torch.empty(0)
        if trainable:
            self._make_trainable(member)
            self._write(member, row)
        else:
            bank = self.banks.get(layout) or self.banks.setdefault(layout, Bank(layout, self.device))
            member.bank, member.slot = bank, bank.put(row)
        member.biases = {n: b.to(self.device) for n, b in adapter.biases.items()}
        for head, module in heads.items():
            self._add_head(module, member, adapter.modules[head])
        return self._enter(member)

    @torch.inference_mode(False)
    def fleet_bank(self, config: VeraConfig, slots: int, dtype: torch.dtype, recompute: bool | None) -> FleetBank:
        """The tables of a fleet, nobody in them, the layers that it adapts ready."""
        targets = [t for t in find_targets(self.model, config) if not _OWN.search(t.layer)]
        heads = self._find_heads(config)
        _refuse_offloaded(heads)
        self._adapt({t.layer: t.module for t in targets}, heads)
        templates = {name: self._template(module) for name, module in heads.items()}
        bank = FleetBank(self._layout(_units(targets, config)), self.device, slots, dtype, templates, recompute)
        self.fleets.append(bank)
        return bank

    def enter_fleet(self, name: str, config: VeraConfig, bank: FleetBank, row: Tensor) -> Member:
        """A member in a slot of a fleet's table."""
        slot = bank.put(row)
        return self._enter(Member(name, config, bank.layout, self._next, bank=bank, slot=slot, heads=tuple(bank.heads)))

    def remove(self, name: str) -> None:
        """Takes one member out of memory."""
        member = self.members.pop(name)
        for owner, d, b in member.owners.values():
            del owner._parameters[d], owner._parameters[b]
        for head in member.heads:
            module = self.heads[head]
            module._vera_head.resident.pop(member.number, None)  # type: ignore[union-attr, operator]
            module._modules.pop(f"vera_{member.number}", None)
        if member.bank is not None:
            member.bank.drop(member.slot)
            self._drop_empty_banks()

    def _drop_empty_banks(self) -> None:
        """A few stay, for the next adapter of that layout; the oldest go, their layouts with them."""
        empty = [layout for layout, bank in self.banks.items() if len(bank.free) == bank.capacity]
        for layout in empty[:-EMPTY_BANKS]:
            del self.banks[layout]
            self.layouts = {key: known for key, known in self.layouts.items() if known is not layout}

    def release(self) -> None:
        """Every adapted module the plain one again."""
        for name in list(self.members):
            self.remove(name)
        for module in self.sites.values():
            layers.release(module)
        for module in self.heads.values():
            release_head(module)

    def move(self) -> None:
        """Resident adapters follow the model to its device."""
        for bank in (*self.banks.values(), *self.fleets):
            bank.to(self.device)
        for member in self.members.values():
            member.biases = {n: b.to(self.device) for n, b in member.biases.items()}

    def hashes_of(self, names: Iterable[str]) -> dict[str, str]:
        """Weight hashes of these layers, cached until a weight changes; of a merged model, those of its base weights."""
        return matching.cached_hashes(self, {n: self.sites[n] for n in names})

    def hash_in_time(self) -> None:
        """Takes the hashes while the weights are whole, where the model may be sharded later."""
        if sharded.several_processes():
            self.hashes_of(self.sites)

    def head_state(self, name: str, member: Member) -> dict[str, Tensor]:
        """The state_dict of a member's own copy of a fully trained module."""
        module = self.heads[name]
        return module._vera_head.state_of(module, member)  # type: ignore[union-attr, operator]

    def head(self, name: str, member: Member) -> nn.Module:
        """A member's own copy of a fully trained module."""
        module = self.heads[name]
        return module._vera_head.copy_of(module, member)  # type: ignore[union-attr, operator]

    def warn_uncalled(self, selection: Selection) -> None:
        """After the first forward with adapters: names what it never called, which can't train."""
        if self._checked_calls or not selection.distinct:
            return
        self._checked_calls = True
        silent = [n for m in selection.distinct for n in m.layout.by_layer if not self.sites[n]._vera.called]  # type: ignore[union-attr]
        silent += [n for m in selection.distinct for n in m.heads if not self.heads[n]._vera_head.called]  # type: ignore[union-attr]
        if silent:
            warnings.warn(
                f"{len(silent)} adapted layers or fully trained modules were not called in the first forward, so they do "
                f"nothing: {', '.join(silent[:3])}{' …' if len(silent) > 3 else ''}. Their parent, or a trainer (TRL's read "
                "lm_head's weight), may use the weight directly.",
                VeraWarning,
            )

    def _enter(self, member: Member) -> Member:
        self._next += 1
        self.members[member.name] = member
        return member

    def _adapt(self, modules: Mapping[str, nn.Module], heads: Mapping[str, nn.Module]) -> None:
        split = next(
            (n for n, m in modules.items() if n not in self.sites and sharded.is_piece(m._parameters.get("weight"))), None
        )
        if split is not None and not sharded.shards(self.model):
            raise StateError(
                f'layer "{split}" is split over processes (its weight is a DTensor) by something else than fully_shard on this '
                "model: tensor parallelism isn't supported. Train with fully_shard or DistributedDataParallel; vLLM serves "
                "adapters in tensor parallel."
            )
        for layer, module in modules.items():
            if layer not in self.sites:
                layers.adapt(layer, module, self.model, self.runtime)
                self.sites[layer] = module
        for head, module in heads.items():
            if head not in self.heads:
                adapt_head(head, module, self.runtime)
                self.heads[head] = module

    def _layout(self, units: Sequence[UnitSpec]) -> Layout:
        key = tuple((u.unit, u.m, u.r, u.scale, u.basis) for u in units)
        if key not in self.layouts:
            self.layouts[key] = Layout(tuple(units))
        return self.layouts[key]

    def _layout_of(self, adapter: Adapter, modules: Mapping[str, nn.Module]) -> Layout:
        vectors, ids = adapter.vectors, adapter.layer_ids
        lengths = tuple((unit, len(b), len(d), ids.get(unit)) for unit, (d, b) in vectors.items())
        key = (adapter.basis, adapter.config.scale, lengths)
        if key not in self.layouts:
            self.layouts[key] = self._layout(matching.units(self.model, adapter, modules))
        return self.layouts[key]

    def _make_trainable(self, member: Member) -> None:
        owners = {}
        for unit in member.layout.units:
            module = self.sites[unit.layer]
            stem = f"vera_{member.number}" + (f"_{unit.unit.partition(':')[2]}" if ":" in unit.unit else "")
            device = device_of(module)
            d = torch.full((unit.r,), float(member.config.d_start), dtype=torch.float32, device=device)
            b = torch.full((unit.m,), float(member.config.b_start), dtype=torch.float32, device=device)
            module.register_parameter(f"{stem}_d", nn.Parameter(d, requires_grad=member.config.train != "b"))
            module.register_parameter(f"{stem}_b", nn.Parameter(b, requires_grad=member.config.train != "d"))
            owners[unit.unit] = (module, f"{stem}_d", f"{stem}_b")
        member.owners = owners
        self.hash_in_time()

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
                # The model's own children first, a head among them: of many layers only the first dozen are shown.
                leaves = list(dict.fromkeys(n.rpartition(".")[2] for n in sorted(modules, key=lambda n: n.count("."))))
                raise unknown_name("module (train_modules)", wanted, leaves)
            found |= hits
        adapted = [n for n, m in found.items() if any(isinstance(c, layers.VeraLayer) for c in m.modules())]
        if adapted:
            raise ConfigError(f'"{adapted[0]}" is adapted by another adapter and can\'t be trained in full too.')
        return found

    def _template(self, module: nn.Module) -> nn.Module:
        """The copy of a head that runs with the parameters of a fleet's owners."""
        template = plain_copy(module).requires_grad_(False)
        module._vera_head.resident[TEMPLATE] = template  # type: ignore[union-attr, operator, index, assignment]
        return template

    def _add_head(self, module: nn.Module, member: Member, state: Mapping[str, Tensor] | None = None) -> None:
        copied = plain_copy(module)
        offloaded = any(p.is_meta for p in copied.parameters())
        if state is not None:
            copied.load_state_dict({k: t.clone() for k, t in state.items()} if offloaded else dict(state), assign=offloaded)
        if offloaded:
            copied.to(getattr(getattr(module, "_hf_hook", None), "execution_device", None) or self.device)
        if member.trainable:
            _warn_of_half(module._vera_head.name, copied)  # type: ignore[union-attr, arg-type]
            copied.requires_grad_(True)
            module.add_module(f"vera_{member.number}", copied)
        else:
            module._vera_head.resident[member.number] = copied  # type: ignore[union-attr, operator, assignment]


def _warn_of_half(name: str, head: nn.Module) -> None:
    if any(p.dtype == torch.float16 for p in head.parameters()):
        warnings.warn(
            f'"{name}" is to train in full and is float16, in which an optimizer soon makes NaN of it: load the model with '
            "dtype=torch.float32 or bfloat16.",
            VeraWarning,
            stacklevel=2,
        )


def _refuse_offloaded(heads: Mapping[str, nn.Module]) -> None:
    offloaded = next((n for n, module in heads.items() if any(p.is_meta for p in module.parameters())), None)
    if offloaded is not None:
        raise ConfigError(
            f'"{offloaded}", to train in full, is offloaded: load the base model onto one device to train its head.'
        )


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
