"""A and B: random, frozen, shared by all layers and adapters, grown from a seed (paper §3.3; docs/FORMAT.md, "Basis").

Entry (i, j) is a function of (seed, matrix, layer id, i, j) alone, so a prefix or any other block of A or B is the same
matrix whatever the rank and the targets, and one copy per seed, device and dtype serves every layer and adapter.
"""

import hashlib
import math
import threading
from collections.abc import Collection
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import ConfigError

MASK = 0xFFFFFFFF
MATRIX_A, MATRIX_B = 0, 1

# |N(0,1)| cut into 128 equally likely bins; of each the root mean square, rounded to bf16: the variance is 1.00002.
# Literals (bf16 bit patterns), because quantiles computed on different platforms differ in the last bit.
_NORMAL_BF16 = (
    "3bb93c753cca3d0d3d353d5d3d833d973dab3dbf3dd33de73dfb3e083e123e1c3e263e303e3b3e453e4f3e593e633e6e"
    "3e783e813e863e8c3e913e963e9b3ea13ea63eab3eb03eb63ebb3ec03ec63ecb3ed13ed63edc3ee13ee73eec3ef23ef7"
    "3efd3f013f043f073f0a3f0d3f103f133f163f193f1c3f1f3f223f253f283f2b3f2e3f313f353f383f3b3f3e3f423f45"
    "3f483f4c3f4f3f533f563f5a3f5e3f613f653f693f6d3f703f743f783f7c3f803f823f843f873f893f8b3f8d3f903f92"
    "3f943f973f993f9c3f9f3fa23fa43fa73faa3fad3fb03fb43fb73fbb3fbe3fc23fc63fcb3fcf3fd43fd93fdf3fe53feb"
    "3ff23ffa40024007400d40164022403f"
)


def philox4x32_10(counters: tuple[Any, Any, Any, Any], seed: int) -> tuple[Any, Any, Any, Any]:
    """Four 32-bit words for each counter: Philox4x32 with 10 rounds (Salmon et al., SC11; Random123).

    counters: four broadcastable int64 numpy arrays or torch tensors with values below 2**32; seed: key, low word first.
    64-bit products wrap in two's complement, which leaves both halves' bits right.
    """
    c0, c1, c2, c3 = counters
    k0, k1 = seed & MASK, seed >> 32
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((p1 >> 32) & MASK) ^ c1 ^ k0,
            p1 & MASK,
            ((p0 >> 32) & MASK) ^ c3 ^ k1,
            p0 & MASK,
        )
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def basis_bytes(
    seed: int,
    matrix: int,
    rows: int,
    columns: int,
    *,
    row: int = 0,
    column: int = 0,
    layer_id: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The raw bytes v of the block [row : row + rows, column : column + columns], uint8 (rows, columns).

    matrix: MATRIX_A or MATRIX_B. Counter words (j // 16, i, matrix, layer id); entry (i, j) is byte j mod 16 of the
    four little-endian words. The same on every platform and device.
    """
    first, last = column // 16, (column + columns + 15) // 16
    device = torch.device(device)
    out = torch.empty(rows, columns, dtype=torch.uint8, device=device)
    # About 2**15 counters at a time stay in the cache: 2.5 times as fast as all at once on the CPU.
    step = max(1, (2**15 if device.type == "cpu" else 2**22) // max(1, last - first))
    make = _rows_numpy if device.type == "cpu" else _rows_torch
    offset = column - 16 * first
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        block = make(seed, (matrix, layer_id), (row + start, row + stop), (first, last), device)
        out[start:stop] = block[:, offset : offset + columns]
    return out


def _rows_numpy(seed: int, ids: tuple[int, int], i: tuple[int, int], j: tuple[int, int], device: torch.device) -> Tensor:
    """Bytes of the rows i[0] to i[1] and the 16-byte blocks j[0] to j[1], on the CPU. ids: matrix, layer id."""
    ti, tj = np.arange(*i, dtype=np.int64)[:, None], np.arange(*j, dtype=np.int64)[None, :]
    matrix, layer_id = (np.full((1, 1), word, np.int64) for word in ids)
    words = np.stack(np.broadcast_arrays(*philox4x32_10((tj, ti, matrix, layer_id), seed)), axis=-1)
    return torch.from_numpy(words.astype("<u4").view(np.uint8).reshape(i[1] - i[0], -1))


def _rows_torch(seed: int, ids: tuple[int, int], i: tuple[int, int], j: tuple[int, int], device: torch.device) -> Tensor:
    """The same bytes, made on any device: the matrix needn't cross the bus."""
    ti, tj = torch.arange(*i, device=device)[:, None], torch.arange(*j, device=device)[None, :]
    matrix, layer_id = (torch.full_like(tj[:, :1], word) for word in ids)
    words = torch.stack(torch.broadcast_tensors(*philox4x32_10((tj, ti, matrix, layer_id), seed)), dim=-1)
    shifts = torch.tensor([0, 8, 16, 24], device=device)
    return ((words[..., None] >> shifts) & 0xFF).to(torch.uint8).reshape(i[1] - i[0], -1)


@lru_cache(maxsize=8)
def level_table(levels: str) -> np.ndarray:
    """The 256 levels a byte stands for, float32, each exact in bf16 and fp16 too."""
    v = np.arange(256)
    if levels == "kaiming_uniform":
        table = (2 * v - 255) / 256
    elif levels == "uniform":
        table = v / 256
    elif levels == "rademacher":
        table = np.where(v >= 128, 1.0, -1.0)
    elif levels == "kaiming_normal":
        bits = np.array([int("".join(_NORMAL_BF16)[4 * k : 4 * k + 4], 16) for k in range(128)], np.uint32)
        magnitude = (bits << 16).view(np.float32)
        table = np.concatenate([-magnitude[::-1], magnitude])
    else:
        raise ConfigError(f"levels is {levels!r}; VeraConfig lists the known ones")
    table = table.astype(np.float32)
    table.setflags(write=False)
    return table


SCALE_RULES = {
    "kaiming_uniform": "6/sqrt(n*r)",  # bounds √(6/n) and √(6/r): Kaiming uniform, gain √2 (PyTorch, a = 0)
    "kaiming_normal": "2/sqrt(n*r)",  # standard deviations √(2/n) and √(2/r)
    "rademacher": "2/sqrt(n*r)",
    "uniform": "0.01",  # [0, 0.1] each (Table 6b)
}


def layer_id_of(name: str) -> int:
    """The counter word of a layer's own pair (sharing="unique"): 4 bytes of SHA-256(name), never 0, which is shared."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little") or 1


@dataclass(frozen=True, eq=False)
class StoredPair:
    """A pair that no seed gives back (from a PEFT file of another platform): A (r, max in), B (max out, r), float32."""

    A: Tensor
    B: Tensor
    digest: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "A", self.A.detach().to("cpu", torch.float32).contiguous())
        object.__setattr__(self, "B", self.B.detach().to("cpu", torch.float32).contiguous())
        object.__setattr__(self, "digest", pair_digest(self.A, self.B))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StoredPair) and other.digest == self.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __deepcopy__(self, memo: dict) -> "StoredPair":
        return self


@dataclass(frozen=True)
class Basis:
    """The identity of one pair A, B; equal bases share memory. The matrices come from A() and B().

    kind "philox-u8": seed, levels and layer_id say everything. kind "peft": PEFT's pair depends on its own shape too:
    rank, max_in and max_out are those of the adapter that made it; `stored` holds the pair where the seed doesn't.
    """

    kind: str = "philox-u8"
    seed: int = 0
    levels: str = "kaiming_uniform"
    layer_id: int = 0
    rank: int = 0
    max_in: int = 0
    max_out: int = 0
    stored: StoredPair | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.kind not in ("philox-u8", "peft") or self.levels not in SCALE_RULES:
            raise ConfigError(f"there is no basis of kind {self.kind!r} with levels {self.levels!r}; see VeraConfig")
        if not 0 <= self.seed < 2**64 or not 0 <= self.layer_id < 2**32:
            raise ConfigError(f"seed is {self.seed} and layer_id {self.layer_id}, expected 64 and 32 bits, unsigned")
        # Every forward looks A and B up by basis; a dataclass would hash its eight fields each time.
        key = (self.kind, self.seed, self.levels, self.layer_id, self.rank, self.max_in, self.max_out, self.stored)
        object.__setattr__(self, "_hash", hash(key))

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined]

    def __reduce__(self) -> tuple[Any, ...]:
        # Not the default, which would carry the hash along: strings hash differently in every process.
        return type(self), tuple(getattr(self, f.name) for f in fields(self))

    def __deepcopy__(self, memo: dict) -> "Basis":
        return self

    def A(self, r: int, n: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
        """A's leading block (r, n): a view of the shared matrix. Not to be written to."""
        view = _views.get((self, MATRIX_A, r, n, device, dtype))
        return _block(self, MATRIX_A, r, n, device, dtype) if view is None else view

    def B(self, m: int, r: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
        """B's leading block (m, r): a view of the shared matrix. Not to be written to."""
        view = _views.get((self, MATRIX_B, m, r, device, dtype))
        return _block(self, MATRIX_B, m, r, device, dtype) if view is None else view

    def scale(self, n: int, r: int) -> float:
        """s_A·s_B of a layer with n inputs at rank r: multiplied into d, never into the matrices."""
        if self.kind == "peft":
            return 1.0
        if self.levels == "uniform":
            return 0.01
        return (6 if self.levels == "kaiming_uniform" else 2) / math.sqrt(n * r)

    def fingerprint(self) -> str:
        """SHA-256 that tells two pairs apart; written to the file and checked on load."""
        return _fingerprint(self)

    def shared(self) -> "Basis":
        """The same basis without a layer's own id."""
        return replace(self, layer_id=0) if self.layer_id else self


def pair_digest(A: Tensor, B: Tensor) -> str:
    """SHA-256 over the float32 bytes of A, then B, row by row."""
    digest = hashlib.sha256()
    for matrix in (A, B):
        digest.update(matrix.detach().to("cpu", torch.float32).contiguous().numpy().astype("<f4", copy=False).tobytes())
    return digest.hexdigest()


@lru_cache(maxsize=256)
def _fingerprint(basis: Basis) -> str:
    if basis.kind == "peft":
        return basis.stored.digest if basis.stored else pair_digest(*peft_pair(basis))
    digest = hashlib.sha256()
    digest.update(basis_bytes(basis.seed, MATRIX_A, 16, 64).numpy().tobytes())
    digest.update(basis_bytes(basis.seed, MATRIX_B, 64, 16).numpy().tobytes())
    digest.update(level_table(basis.levels).astype("<f4").tobytes())
    digest.update(SCALE_RULES[basis.levels].encode())
    return digest.hexdigest()


def peft_pair(basis: Basis) -> tuple[Tensor, Tensor]:
    """PEFT's A (rank, max_in) and B (max_out, rank), float32, bit for bit: one CPU generator, A first.

    Raises ConfigError where a size is 0, as max_in is for a PEFT folder without its projections, read without its base.
    """
    if not (basis.rank and basis.max_in and basis.max_out):
        raise ConfigError(
            f"PEFT's A and B have rank {basis.rank}, {basis.max_in} inputs and {basis.max_out} outputs, and grow from all three; "
            "0 isn't known yet. Load the adapter into its base model with vera.load, and save it from there."
        )
    generator = torch.Generator(device="cpu").manual_seed(basis.seed)

    def draw(rows: int, columns: int) -> Tensor:
        bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(columns))  # PEFT's own order of operations
        out = torch.empty(rows, columns, dtype=torch.float32, device="cpu")
        return out.uniform_(-bound, bound, generator=generator)

    return draw(basis.rank, basis.max_in), draw(basis.max_out, basis.rank)


_cache: dict[tuple[Basis, int, torch.device, torch.dtype], Tensor] = {}
# The blocks handed out, by (basis, matrix, rows, columns, device, dtype): slicing anew takes 5 µs, and a step does so
# twice a layer.
_views: dict[tuple[Basis, int, int, int, torch.device | str, torch.dtype], Tensor] = {}
_lock = threading.RLock()


def clear_cache() -> None:
    """Drops every generated matrix; they grow again from their seeds when next used."""
    with _lock:
        _cache.clear()
        _views.clear()
        _peft_pair_cached.cache_clear()


def keep_only(bases: Collection[Basis], most: int) -> None:
    """Drops the generated matrices of all other bases where more than `most` are in memory; they grow again when next used."""
    with _lock:
        if len({key[0] for key in _cache}) > most:
            for key in [key for key in _cache if key[0] not in bases]:
                del _cache[key]
            _views.clear()
            _peft_pair_cached.cache_clear()


def cache_bytes() -> int:
    """Bytes of all generated matrices now in memory, over all devices."""
    with _lock:
        return sum(t.numel() * t.element_size() for t in _cache.values())


_peft_pair_cached = lru_cache(maxsize=4)(peft_pair)


def _block(basis: Basis, matrix: int, rows: int, columns: int, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    key = (basis, matrix, torch.device(device), dtype)
    whole = _cache.get(key)
    if whole is None or whole.shape[0] < rows or whole.shape[1] < columns:
        with _lock, torch.inference_mode(False), torch.no_grad():
            whole = _cache.get(key)
            if whole is None or whole.shape[0] < rows or whole.shape[1] < columns:
                have = (0, 0) if whole is None else whole.shape
                whole = _make(basis, matrix, max(rows, have[0]), max(columns, have[1]), key[2], dtype)
                if type(whole) is Tensor:  # under FakeTensorMode it has no values: not for later callers
                    _cache[key] = whole
                    for old in list(_views):  # those of the smaller matrix would keep it in memory
                        if old[:2] == key[:2]:
                            _views.pop(old, None)
    view = whole[:rows, :columns]
    if type(view) is Tensor and not torch.compiler.is_compiling():
        _views[basis, matrix, rows, columns, device, dtype] = view
    return view


def _make(basis: Basis, matrix: int, rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    if basis.kind == "peft":
        pair = (basis.stored.A, basis.stored.B) if basis.stored else _peft_pair_cached(basis)
        whole = pair[matrix]
        if whole.shape[0] < rows or whole.shape[1] < columns:
            raise ConfigError(
                f"PEFT's {'AB'[matrix]} has shape {tuple(whole.shape)}, and a layer asks for {(rows, columns)}: a PEFT "
                "basis is bound to the widest layer and the rank it was made for. Use basis='philox-u8'."
            )
        return whole.to(device, dtype)
    out = torch.empty(rows, columns, dtype=dtype, device=device)
    from . import kernels

    if kernels.on(out):
        from .kernels.grow import grow

        return grow(basis, matrix, out)
    table = torch.from_numpy(level_table(basis.levels).copy()).to(device)
    raw = basis_bytes(basis.seed, matrix, rows, columns, layer_id=basis.layer_id, device=device)
    step = max(1, 2**22 // max(1, columns))
    for start in range(0, rows, step):  # an index takes 4 bytes an entry: not for the whole matrix at once
        out[start : start + step] = table[raw[start : start + step].int()].to(dtype)
    return out
