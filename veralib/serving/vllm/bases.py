"""The pairs A, B that a worker holds: a fixed number of places, filled when the first adapter of a basis comes.

Only the blocks that this worker's layers read are made, straight from the generator: the columns of A and the rows of B of its
shards. Each block is one static buffer for all places, so nothing that a CUDA graph has seen ever moves.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ... import kernels
from ...basis import MATRIX_A, MATRIX_B, Basis, basis_bytes, level_table, peft_pair
from ...errors import StateError
from ...products import emulated

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
        self.fused = kernels.on(torch.empty(1, dtype=dtype, device=device))
        """Whether the static form goes through veralib.kernels; fixed here, since B is laid out for it."""
        self._packs = _packer(dtype, device)
        self._packed: dict[tuple[int, int, int | None, int | None], Callable[[Tensor], Tensor]] = {}

    @property
    def bytes(self) -> int:
        """Of all blocks, over all places."""
        return sum(t.numel() * t.element_size() for t in [*self._a.values(), *self._b.values()])

    def factor(self, basis: Basis) -> float:
        """What A is multiplied by here and d must be divided by. In float16 sums of A x could pass 65504; 1/64 is exact."""
        return 1 / 64 if self.dtype == torch.float16 and basis.kind != "peft" else 1.0

    def A(self, first: int, last: int) -> Tensor:
        """Columns [first, last) of A in every place: (count, rank, last - first). Asked for before the first place()."""
        return self._block(self._a, (first, last), (self.count, self.rank, last - first))

    def B(self, first: int, last: int) -> Tensor:
        """Rows [first, last) of B in every place: (count, last - first, rank)."""
        return self._block(self._b, (first, last), (self.count, last - first, self.rank))

    def _block(self, blocks: dict, key: tuple[int, int], shape: tuple[int, int, int]) -> Tensor:
        if key not in blocks:
            count, rows, columns = shape
            if self.fused:
                blocks[key] = torch.zeros(shape, dtype=self.dtype, device=self.device)
            else:  # as its transpose: a product with few tokens is a fifth faster on a CPU
                blocks[key] = torch.zeros(count, columns, rows, dtype=self.dtype, device=self.device).transpose(1, 2)
        return blocks[key]

    def product(self, x: Tensor, block: Tensor, at: int, rows: int | None = None, columns: int | None = None) -> Tensor:
        """x Wᵀ, W: the first rows and columns of a block of A or B in one place. x: (tokens, columns).

        Packed for ranks that are powers of two, and the largest: together less than thrice the block, whatever ranks come.
        """
        key = id(block), at, rows, columns
        packed = self._packed.get(key)
        if packed is None:
            W = block[at, :rows, :columns]
            rank = min(rows or self.rank, columns or self.rank)
            if self._packs is None or (rank & (rank - 1) and rank != self.rank):
                return F.linear(x, W)
            packed = self._packed[key] = self._packs(W)
        return packed(x)

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
        self._packed = {key: packed for key, packed in self._packed.items() if key[1] != at}
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
        table = torch.from_numpy(level_table(basis.levels).copy()).to(self.device)
        for (first, _), block in self._a.items():
            _grow(block[at], table * self.factor(basis), basis, MATRIX_A, 0, first)
        for (first, _), block in self._b.items():
            _grow(block[at], table, basis, MATRIX_B, first, 0)


def _packer(dtype: torch.dtype, device: torch.device) -> Callable[[Tensor], Callable[[Tensor], Tensor]] | None:
    """What packs a matrix for products as vLLM packs its own weights on a CPU with arithmetic of the type; None elsewhere.

    With 32 tokens on AMX such a product takes half the time. In float32 it gains nothing over a matrix kept as its transpose.
    """
    if device.type != "cpu" or dtype == torch.float32 or emulated(torch.empty(0, dtype=dtype)):
        return None
    try:
        from vllm._custom_ops import create_onednn_mm, onednn_mm

        onednn_mm(create_onednn_mm(torch.ones(32, 32, dtype=dtype), 1), torch.ones(1, 32, dtype=dtype), None)
    except (ImportError, AttributeError, TypeError, RuntimeError):  # a vLLM or a processor without it
        return None

    def packed(W: Tensor) -> Callable[[Tensor], Tensor]:
        handler: Any = create_onednn_mm(W.t(), 32)
        return lambda x: onednn_mm(handler, x, None)

    return packed


def _grow(out: Tensor, table: Tensor, basis: Basis, matrix: int, row: int, column: int) -> None:
    rows, columns = out.shape
    step = max(1, _STEP // columns)
    for start in range(0, rows, step):
        n = min(step, rows - start)
        raw = basis_bytes(basis.seed, matrix, n, columns, row=row + start, column=column, device=out.device)
        out[start : start + n] = table[raw.int()].to(out.dtype)
