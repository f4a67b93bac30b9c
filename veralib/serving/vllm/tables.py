"""The d and b of the adapters in slots, and the step's plan: which slot each token uses.

Two static tables hold a row a slot and, for every piece of every layer, its columns. The last row is zero: a token without an
adapter reads that. So an adapter becomes active by two copies, whatever the number of layers.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

MOST_KEYS = 256
"""Of the sets of pieces that steps use; with more, all are forgotten and numbered anew."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Which columns of the tables an adapter's vectors fill: the same for all adapters with the same units and ranks."""

    columns_d: Tensor
    columns_b: Tensor
    pieces: frozenset[int]
    rank: int


@dataclass(frozen=True, eq=False)
class Loaded:
    """An adapter in CPU memory, in the tables' dtype and this worker's shard of it."""

    number: int
    layout: Layout
    basis: int
    """Its place among the bases."""
    d: Tensor
    b: Tensor

    @property
    def bytes(self) -> int:
        """Of d and b."""
        return self.d.nbytes + self.b.nbytes


@dataclass(frozen=True, eq=False)
class Step:
    """What the layers of one forward must do, for the eager path. None of it is read from a device."""

    tokens: int
    key: int
    """Steps with one key use the same pieces; those pieces may get another one later."""
    pieces: frozenset[int]
    rank: int
    bases: tuple[int, ...]
    slot: int | None
    """The one slot of every token with an adapter; None where there are several."""
    positions: Tensor | None
    """The tokens with an adapter; None where all have one."""
    rows: Tensor
    """The table row of each token with an adapter."""
    rows_of: tuple[Tensor, ...]
    """For each of `bases`, the table row, or the zero row where the token's adapter is of another basis."""


@dataclass
class Tables:
    """slots + 1 rows of d and b. static: also keep the tokens' rows in device buffers, for compiled code and CUDA graphs."""

    slots: int
    rank: int
    bases: int
    width_d: int
    width_b: int
    tokens: int
    dtype: torch.dtype
    device: torch.device
    static: bool
    step: Step | None = None
    held: list[Loaded | None] = field(default_factory=list)
    """What lies in each slot."""

    def __post_init__(self) -> None:
        self.d = torch.zeros(self.slots + 1, self.width_d, dtype=self.dtype, device=self.device)
        self.b = torch.zeros(self.slots + 1, self.width_b, dtype=self.dtype, device=self.device)
        self.held = [None] * self.slots
        self.rows = torch.full((self.tokens,), self.slots, dtype=torch.long, device=self.device)
        self.rows_of = torch.full((self.bases, self.tokens), self.slots, dtype=torch.long, device=self.device)
        self._keys: dict[frozenset[int], int] = {}
        self._numbers = itertools.count()
        self._last: tuple[int, ...] | None = None

    @property
    def bytes(self) -> int:
        """Of both tables."""
        return (self.d.numel() + self.b.numel()) * self.d.element_size()

    def write(self, slot: int, adapter: Loaded) -> None:
        """Puts an adapter into a slot. Two copies to the device and two scatters there."""
        self.d[slot].zero_()
        self.b[slot].zero_()
        self.d[slot].index_copy_(0, adapter.layout.columns_d, adapter.d.to(self.device, non_blocking=True))
        self.b[slot].index_copy_(0, adapter.layout.columns_b, adapter.b.to(self.device, non_blocking=True))
        self.held[slot] = adapter
        self._last = None

    def clear(self, slot: int) -> None:
        """Empties a slot: nothing of an adapter that was removed stays."""
        self.d[slot].zero_()
        self.b[slot].zero_()
        self.held[slot] = None
        self._last = None

    def follow(self, ids: Sequence[int], slot_of: dict[int, int]) -> None:
        """Makes the plan of the next forward. ids: for each token its adapter's number, 0 for none."""
        ids = tuple(ids)
        if self._last == ids:
            return
        numbers = np.asarray(ids, dtype=np.int64)
        distinct, place = np.unique(numbers, return_inverse=True)
        row = np.array([slot_of[int(i)] if i > 0 else self.slots for i in distinct], dtype=np.int64)
        rows = row[place]
        basis_of_row = np.full(self.slots + 1, -1)
        adapters = []
        for slot in row.tolist():
            if slot != self.slots and (adapter := self.held[slot]) is not None:
                adapters.append(adapter)
                basis_of_row[slot] = adapter.basis
        if self.static:
            self._fill_static(rows, basis_of_row)
        self.step = self._plan(rows, adapters, basis_of_row) if adapters else None
        self._last = ids

    def _plan(self, rows: np.ndarray, adapters: list[Loaded], basis_of_row: np.ndarray) -> Step:
        layouts = {a.layout for a in adapters}
        pieces, rank = frozenset[int]().union(*(a.pieces for a in layouts)), max(a.rank for a in layouts)
        bases = tuple(sorted({a.basis for a in adapters}))
        active = np.flatnonzero(rows != self.slots)
        everyone = len(active) == len(rows)
        mine = rows if everyone else rows[active]
        device_rows = self._sent(mine)
        if len(bases) == 1:
            rows_of: tuple[Tensor, ...] = (device_rows,)
        else:
            rows_of = tuple(self._sent(np.where(basis_of_row[mine] == k, mine, self.slots)) for k in bases)
        slot = int(mine[0]) if len(adapters) == 1 else None
        positions = None if everyone else self._sent(active)
        return Step(len(rows), self._key(pieces), pieces, rank, bases, slot, positions, device_rows, rows_of)

    def _sent(self, array: np.ndarray) -> Tensor:
        host = torch.from_numpy(np.ascontiguousarray(array))
        return host if self.device.type == "cpu" else host.pin_memory().to(self.device, non_blocking=True)

    def _key(self, pieces: frozenset[int]) -> int:
        if pieces not in self._keys:
            if len(self._keys) >= MOST_KEYS:
                self._keys.clear()
            self._keys[pieces] = next(self._numbers)
        return self._keys[pieces]

    def _fill_static(self, rows: np.ndarray, basis_of_row: np.ndarray) -> None:
        n = len(rows)
        self.rows[:n].copy_(self._sent(rows), non_blocking=True)
        self.rows[n:].fill_(self.slots)
        for k in range(self.bases):
            mine = self._sent(np.where(basis_of_row[rows] == k, rows, self.slots))
            self.rows_of[k, :n].copy_(mine, non_blocking=True)
            self.rows_of[k, n:].fill_(self.slots)
