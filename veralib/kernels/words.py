"""What the kernels share: the words of Philox, and the level that a byte stands for (basis.py has both in numpy and torch)."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..basis import MASK, Basis, level_table

LEVELS = {"kaiming_uniform": 0, "uniform": 1, "rademacher": 2, "kaiming_normal": 3}


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10: four uint32 words for each counter."""
    for _ in tl.static_range(10):
        h0, l0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        h1, l1 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def words(c, i, matrix, layer, k0, k1):
    """The four words of the 16-entry blocks c in the rows i; c and i are tiles that broadcast to one shape."""
    zero = c * 0 + i * 0
    counters = (
        (c + zero).to(tl.uint32),
        (i + zero).to(tl.uint32),
        (zero + matrix).to(tl.uint32),
        zero.to(tl.uint32) + layer.to(tl.uint32),
    )
    return philox(counters[0], counters[1], counters[2], counters[3], k0.to(tl.uint32), k1.to(tl.uint32))


@triton.jit
def byte(w0, w1, w2, w3, s: tl.constexpr):
    """Byte s of 16, of four little-endian words, as int32."""
    if s < 4:
        word = w0
    elif s < 8:
        word = w1
    elif s < 12:
        word = w2
    else:
        word = w3
    return ((word >> (8 * (s % 4))) & 0xFF).to(tl.int32)


@triton.jit
def level(v, table, LEVELS: tl.constexpr):
    """The float32 number that the byte v (int32) stands for. LEVELS: a number of this module's LEVELS; table: 3's."""
    if LEVELS == 0:
        return (2 * v - 255).to(tl.float32) * 0.00390625
    elif LEVELS == 1:
        return v.to(tl.float32) * 0.00390625
    elif LEVELS == 2:
        return tl.where(v >= 128, 1.0, -1.0)
    else:
        return tl.load(table + v)


@lru_cache(maxsize=8)
def table(levels: str, device: torch.device) -> Tensor:
    """The 256 levels on a device, float32."""
    return torch.from_numpy(level_table(levels).copy()).to(device)


def check_columns(**tensors: Tensor | None) -> None:
    """ValueError where the last dimension of one of them isn't contiguous: every kernel counts on that."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name} has stride {tensor.stride(-1)} between its columns, expected 1: call .contiguous()")


def key(basis: Basis) -> tuple[int, int]:
    """The two key words of a basis' seed, low first."""
    return basis.seed & MASK, basis.seed >> 32
