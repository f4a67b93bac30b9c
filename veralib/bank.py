"""Where adapters live in memory: resident ones as rows of one flat table, trainable ones as Parameters of their layers.

A Layout says which units an adapter adapts and where each vector lies in a row; adapters of one layout share a Bank. Tables
grow by chunks, so that loading the thousandth adapter costs what the first did. Nothing here is an nn.Module: DDP would
broadcast it and state_dict save it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from .autograd import UnitSpec
from .basis import Basis
from .config import VeraConfig
from .fused import sharers

CHUNK_BYTES = 16 * 2**20  # a chunk holds at least 8 adapters, and at most what fits in this


@dataclass(frozen=True, eq=False)
class Layout:
    """The units of an adapter, in order, and each one's place in the flat row: d, then b."""

    units: tuple[UnitSpec, ...]

    @cached_property
    def by_layer(self) -> dict[str, tuple[UnitSpec, ...]]:
        out: dict[str, tuple[UnitSpec, ...]] = {}
        for unit in self.units:
            out[unit.layer] = (*out.get(unit.layer, ()), unit)
        return out

    @cached_property
    def sharers(self) -> dict[str, int]:
        """layer -> how many adapted layers read the x that it reads."""
        return sharers(self.by_layer)

    @cached_property
    def offsets(self) -> dict[str, tuple[int, int, int]]:
        """unit -> (start of d, start of b, end)."""
        out, at = {}, 0
        for unit in self.units:
            out[unit.unit] = (at, at + unit.r, at + unit.r + unit.m)
            at += unit.r + unit.m
        return out

    @cached_property
    def size(self) -> int:
        return sum(u.r + u.m for u in self.units)

    @cached_property
    def bases(self) -> frozenset[Basis]:
        return frozenset(u.basis for u in self.units)

    @cached_property
    def one_basis(self) -> dict[str, tuple[tuple[int, ...], tuple[UnitSpec, ...]]]:
        """layer -> (for each of its units, which distinct A x it reads; one unit for each distinct A x)."""
        out = {}
        for layer, units in self.by_layer.items():
            keys = list(dict.fromkeys((u.basis, u.r) for u in units))
            first = tuple(next(u for u in units if (u.basis, u.r) == key) for key in keys)
            out[layer] = (tuple(keys.index((u.basis, u.r)) for u in units), first)
        return out


class Bank:
    """All resident adapters of one layout: chunks of one flat table each, one row an adapter, float32."""

    trains = False
    """True for the table of a fleet (fleetbank.py)."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.layout = layout
        self.device = device
        self.chunk_rows = max(8, min(64, CHUNK_BYTES // max(1, 4 * layout.size)))
        self.chunks: list[Tensor] = []
        self.free: list[int] = []

    def put(self, row: Tensor) -> int:
        """Stores one flat row (layout.size,), returns its slot."""
        if not self.free:
            first = len(self.chunks) * self.chunk_rows
            self.chunks.append(torch.empty(self.chunk_rows, self.layout.size, dtype=torch.float32, device=self.device))
            self.free = list(range(first + self.chunk_rows - 1, first - 1, -1))
        slot = self.free.pop()
        self.row(slot).copy_(row)
        return slot

    @property
    def capacity(self) -> int:
        """Slots, taken and free."""
        return len(self.chunks) * self.chunk_rows

    def drop(self, slot: int) -> None:
        self.free.append(slot)

    def row(self, slot: int) -> Tensor:
        """A view of one adapter's flat row."""
        return self.chunks[slot // self.chunk_rows][slot % self.chunk_rows]

    def to(self, device: torch.device) -> None:
        if device != self.device:
            self.device = device
            self.chunks = [c.to(device) for c in self.chunks]

    def find(self, slots: Sequence[int]) -> "Found":
        """Where these slots' rows lie, for gather: worked out on the host, once for a selection."""
        chunks: dict[int, tuple[list[int], list[int]]] = {}
        for place, slot in enumerate(slots):
            places, rows = chunks.setdefault(slot // self.chunk_rows, ([], []))
            places.append(place)
            rows.append(slot % self.chunk_rows)
        on = lambda numbers: torch.tensor(numbers, device=self.device)  # noqa: E731
        return Found(len(slots), tuple((k, on(places), on(rows)) for k, (places, rows) in chunks.items()))

    def gather(self, found: "Found", start: int, end: int) -> Tensor:
        """Columns [start, end) of the rows that find() found, (how many, end - start). Never waits for the device."""
        if len(found.chunks) == 1:
            k, _, rows = found.chunks[0]
            return self.chunks[k][:, start:end].index_select(0, rows)
        out = torch.empty(found.count, end - start, dtype=self.chunks[0].dtype, device=self.device)
        for k, places, rows in found.chunks:
            out.index_copy_(0, places, self.chunks[k][:, start:end].index_select(0, rows))
        return out

    @property
    def bytes(self) -> int:
        return sum(c.numel() * c.element_size() for c in self.chunks)


@dataclass(frozen=True, eq=False)
class Found:
    """Rows of a bank by chunk: (chunk, the places they take in the answer, their rows in the chunk)."""

    count: int
    chunks: tuple[tuple[int, Tensor, Tensor], ...]


@dataclass(eq=False)
class Member:
    """One adapter in a model. Resident: a slot of a bank. Trainable: Parameters that its layers own, float32."""

    name: str
    config: VeraConfig
    layout: Layout
    number: int
    """Names its Parameters, vera_<number>_d: an adapter's name never enters the module tree."""
    bank: Bank | None = None
    slot: int = -1
    owners: Mapping[str, tuple[nn.Module, str, str]] = field(default_factory=dict)
    """Trainable: unit -> (module, name of d, name of b)."""
    biases: dict[str, Tensor] = field(default_factory=dict)
    heads: tuple[str, ...] = ()
    base_id: str = ""
    base_revision: str = ""
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def trainable(self) -> bool:
        """Whether it has Parameters of its own. An owner of a fleet trains too, in the fleet's table."""
        return self.bank is None

    @property
    def fleet(self) -> Bank | None:
        """The fleet's bank, where this is an owner of one."""
        return self.bank if self.bank is not None and self.bank.trains else None

    def vectors(self, unit: str) -> tuple[Tensor, Tensor]:
        """d (r,) and b (m,) of one unit, float32: the Parameters, or views of the bank's row."""
        if self.bank is None:
            module, d, b = self.owners[unit]
            return module._parameters[d], module._parameters[b]  # type: ignore[return-value]
        start, middle, end = self.layout.offsets[unit]
        row = self.bank.row(self.slot)
        return row[start:middle], row[middle:end]

    def tensors(self, units: Sequence[UnitSpec]) -> list[Tensor]:
        """d and b of each unit, interleaved."""
        return [t for u in units for t in self.vectors(u.unit)]
