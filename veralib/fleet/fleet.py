"""Fleet: many owners' adapters that train at once in one model, one row of a table each."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import matching
from ..adapter import Adapter
from ..config import VeraConfig
from ..errors import AdapterMismatch, ConfigError, StateError, unknown_name
from ..fleetbank import FleetBank
from ..heads import TEMPLATE

if TYPE_CHECKING:
    from ..model import Vera


class Fleet:
    """Owners that train together: each one's rows of a batch move its own d and b alone. Made by vera.fleet(config, slots).

        fleet = vera.fleet(VeraConfig(rank=64), slots=64)
        fleet.add(["ann", "bob"])
        optimizer = FleetAdamW(fleet, lr=1e-2)
        with vera.rows(["ann", "bob", "ann"]):
            loss = owner_loss(model(**batch).logits, labels, ["ann", "bob", "ann"])
        loss.backward()
        optimizer.step()

    Owners are adapters of the model like any other: vera.save(path, name="ann"), vera.use("ann"), vera.rows([...]).
    """

    def __init__(self, vera: "Vera", config: VeraConfig, bank: FleetBank) -> None:
        self.vera = vera
        self.config = config
        self.bank = bank
        parts = [
            torch.full((size,), float(value), dtype=bank.table.dtype)
            for u in bank.layout.units
            for size, value in ((u.r, config.d_start), (u.m, config.b_start))
        ]
        self._start = torch.cat([*parts, *(self._head_row(head, {}) for head in bank.heads)])
        self.trained = self._trained_columns()
        self._last: tuple[Adapter, Tensor] | None = None

    def _trained_columns(self) -> Tensor | None:
        """None, or (layout.size,) of 0 and 1 where train="d" or "b" leaves a part as it is."""
        if self.config.train == "both":
            return None
        one, other = (1.0, 0.0) if self.config.train == "d" else (0.0, 1.0)
        parts = [torch.full((size,), v) for u in self.bank.layout.units for size, v in ((u.r, one), (u.m, other))]
        return torch.cat([*parts, torch.ones(self.head_parameters_per_owner)]).to(self.bank.table)

    @property
    def names(self) -> tuple[str, ...]:
        """The owners that have a slot now."""
        return tuple(n for n, m in self.vera.members.items() if m.bank is self.bank)

    @property
    def free(self) -> int:
        """How many more owners have room."""
        return len(self.bank.free)

    @property
    def parameters_per_owner(self) -> int:
        """Of d and b; the paper counts them so, without heads."""
        return self.bank.layout.size

    @property
    def head_parameters_per_owner(self) -> int:
        return self.bank.width - self.bank.layout.size

    def _head_row(self, head: str, state: Mapping[str, Tensor]) -> Tensor:
        """A head's parameters in the table's order: of a state_dict, else the base's own."""
        module = self.vera.inside.heads[head]
        base = dict(module._vera_head.resident[TEMPLATE].named_parameters())  # type: ignore[union-attr, index]
        own = {name: state.get(name, base[name]) for name in self.bank.heads[head]}
        return torch.cat([t.detach().to("cpu", self.bank.table.dtype).flatten() for t in own.values()])

    def add(self, names: "str | Iterable[str]", start: Adapter | None = None) -> "Fleet":
        """One owner, or several: fresh, or each from a copy of `start`. StateError where no slot is free or a name is taken."""
        given = [names] if isinstance(names, str) else list(names)
        if len(set(given)) < len(given):
            raise ConfigError("add() got a name twice.")
        for name in given:
            self.vera._new_name(name)
        if len(given) > self.free:
            raise StateError(
                f"{len(given)} owners for {self.free} free slots of {self.bank.slots}: remove(name) those that are done, or make "
                "the fleet with more slots."
            )
        row = self._start if start is None else self._row_from(start)
        for name in given:
            self.vera.inside.enter_fleet(name, self.config, self.bank, row)
        self.vera._selections.clear()
        return self

    def remove(self, name: str) -> None:
        """Frees an owner's slot; save its adapter first."""
        self.slot(name)
        self.vera.remove(name)

    def slot(self, name: str) -> int:
        """The owner's row of the table. UnknownName lists the owners."""
        member = self.vera.members.get(name)
        if member is None or member.bank is not self.bank:
            raise unknown_name("owner", name, self.names)
        return member.slot

    def by_slot(self) -> dict[int, str]:
        """Slot -> its owner."""
        return {m.slot: n for n, m in self.vera.members.items() if m.bank is self.bank}

    def _row_from(self, start: Adapter) -> Tensor:
        """row_of, once for an adapter that many owners begin from; refused on other weights than it was trained on."""
        if self._last is None or self._last[0] is not start:
            matching.check(self.vera.inside, start, "start", allow_other_base=False)
            self._last = start, self.row_of(start)
        return self._last[1]

    def row_of(self, adapter: Adapter) -> Tensor:
        """An adapter as a flat row of the table: its vectors, and behind them its heads, or the base's where it has none.

        AdapterMismatch where it isn't of the fleet's shape, or has heads that the fleet doesn't train.
        """
        units = self.bank.layout.units
        wrong = [u.unit for u in units if u.unit not in adapter.vectors] or [n for n in adapter.vectors if not self._has(n)]
        wrong = wrong or [u.unit for u in units if tuple(map(len, adapter.vectors[u.unit])) != (u.r, u.m)]
        wrong = wrong or [u.unit for u in units if adapter.basis_of(u.unit) != u.basis]
        if wrong:
            raise AdapterMismatch(
                f'the adapter doesn\'t fit this fleet: they differ in {len(wrong)} units, such as "{wrong[0]}", by name, rank, '
                "shape or seed. Make the fleet with the adapter's own config."
            )
        if extra := sorted(adapter.modules.keys() - self.bank.heads.keys()):
            raise AdapterMismatch(
                f'the adapter has a trained "{extra[0]}", which this fleet doesn\'t train: name it in train_modules, or load it '
                "into the base model and give the adapter without it."
            )
        for head, places in self.bank.heads.items():
            for name, tensor in adapter.modules.get(head, {}).items():
                if name in places and tensor.shape != places[name][1]:
                    shapes = f"{list(tensor.shape)}, the model's {list(places[name][1])}"
                    raise AdapterMismatch(f'the adapter\'s "{head}.{name}" has the shape {shapes}.')
        # The scale is folded into what d is multiplied by: an adapter of another scale is the same function with d rescaled.
        parts = [
            t.to(self.bank.table.dtype) * (adapter.scale_of(u.unit) / u.scale if k == 0 else 1.0)
            for u in units
            for k, t in enumerate(adapter.vectors[u.unit])
        ]
        return torch.cat([*parts, *(self._head_row(head, adapter.modules.get(head, {})) for head in self.bank.heads)])

    def _has(self, unit: str) -> bool:
        return unit in self.bank.layout.offsets

    def reset(self, name: str, start: Adapter | None = None) -> None:
        """An owner's vectors at their start again, its gradient gone."""
        slot = self.slot(name)
        self.bank.row(slot).copy_(self._start if start is None else self._row_from(start))
        self.bank.clear([slot])

    def adapter(self, name: str) -> Adapter:
        """A copy of one owner's present state as plain data, on the CPU."""
        self.slot(name)
        return self.vera.adapter(name)

    def __repr__(self) -> str:
        return f"Fleet({len(self.names)} owners in {self.bank.slots} slots, {self.bank.width:,} parameters each)"


def make(vera: "Vera", config: Any, slots: int, dtype: torch.dtype, recompute: bool | None) -> Fleet:
    """What vera.fleet does: the layers adapted, the tables allocated, nobody in them."""
    if not isinstance(slots, int) or slots < 1:
        raise ConfigError(f"slots is {slots!r}, expected how many owners train at a time, at least 1.")
    if config.dropout:
        raise ConfigError(
            f"a fleet trains without dropout, and the config has dropout={config.dropout:g}: an owner must learn the same "
            "whoever else is in the batch."
        )
    return Fleet(vera, config, vera.inside.fleet_bank(config, slots, dtype, recompute))
