"""The pairs A, B that a worker holds: a fixed number of places, filled when the first adapter of a basis comes.

Only the blocks that this worker's layers read are made, straight from the generator: the columns of A and the rows of B of its
shards. Each block is one static buffer for all places, so nothing that a CUDA graph has seen ever moves.
"""

import torch
from torch import Tensor

from ...basis import MATRIX_A, MATRIX_B, Basis, basis_bytes, level_table, peft_pair
from ...errors import StateError

_STEP = 2**22
FULL = "no place for its pair A, B"
"""What a worker answers where adapters in its memory take all places: the engine core knows which of them nobody uses."""


class NoPlace(StateError):
    """All places have users."""


class Bases:
    """Places for `count` pairs of rank `rank`; blocks of A and B by their range of columns or rows."""

    def __init__(self, count: int, rank: int, dtype: torch.dtype, device: torch.device) -> None:
        self.count, self.rank, self.dtype, self.device = count, rank, dtype, device
        self.held: list[Basis | None] = [None] * count
        self.users = [0] * count
        self._a: dict[tuple[int, int], Tensor] = {}
        self._b: dict[tuple[int, int], Tensor] = {}

    @property
    def bytes(self) -> int:
        """Of all blocks, over all places."""
        return sum(t.numel() * t.element_size() for t in [*self._a.values(), *self._b.values()])

    def factor(self, basis: Basis) -> float:
        """What the matrices are multiplied by here and d divided by. In float16 sums of A x could pass 65504; 1/64 is exact."""
        return 1 / 64 if self.dtype == torch.float16 and basis.kind != "peft" else 1.0

    def A(self, first: int, last: int) -> Tensor:
        """Columns [first, last) of A in every place: (count, rank, last - first). Asked for before the first place()."""
        return self._block(self._a, (first, last), (self.count, self.rank, last - first))

    def B(self, first: int, last: int) -> Tensor:
        """Rows [first, last) of B in every place: (count, last - first, rank)."""
        return self._block(self._b, (first, last), (self.count, last - first, self.rank))

    def _block(self, blocks: dict, key: tuple[int, int], shape: tuple[int, int, int]) -> Tensor:
        if key not in blocks:
            blocks[key] = torch.zeros(shape, dtype=self.dtype, device=self.device)
        return blocks[key]

    def place(self, basis: Basis) -> int:
        """The place of a basis, filled if it is new, and one user more. NoPlace where all of them have users."""
        if basis in self.held:
            at = self.held.index(basis)
        else:
            if 0 not in self.users:
                raise NoPlace(FULL)
            free = [at for at in range(self.count) if not self.users[at]]
            at = next((at for at in free if self.held[at] is None), free[0])
            self.held[at] = None
            self._fill(at, basis)
            self.held[at] = basis
        self.users[at] += 1
        return at

    def leave(self, at: int) -> None:
        """One user less. The pair stays until its place is needed."""
        self.users[at] -= 1

    def _fill(self, at: int, basis: Basis) -> None:
        if basis.kind == "peft":
            pair = (basis.stored.A, basis.stored.B) if basis.stored else peft_pair(basis)
            for (first, last), block in self._a.items():
                block[at].zero_()
                part = pair[0][: self.rank, first:last]
                block[at, : part.shape[0], : part.shape[1]] = part.to(self.device, self.dtype)
            for (first, last), block in self._b.items():
                block[at].zero_()
                part = pair[1][first:last, : self.rank]
                block[at, : part.shape[0], : part.shape[1]] = part.to(self.device, self.dtype)
            return
        table = torch.from_numpy(level_table(basis.levels).copy()).to(self.device) * self.factor(basis)
        for (first, _), block in self._a.items():
            _grow(block[at], table, basis, MATRIX_A, 0, first)
        for (first, _), block in self._b.items():
            _grow(block[at], table, basis, MATRIX_B, first, 0)


def _grow(out: Tensor, table: Tensor, basis: Basis, matrix: int, row: int, column: int) -> None:
    rows, columns = out.shape
    step = max(1, _STEP // columns)
    for start in range(0, rows, step):
        n = min(step, rows - start)
        raw = basis_bytes(basis.seed, matrix, n, columns, row=row + start, column=column, device=out.device)
        out[start : start + n] = table[raw.int()].to(out.dtype)
