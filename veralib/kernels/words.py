"""What the kernels share: the words of Philox, and the level that a byte stands for (basis.py has both in numpy and torch)."""

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
        # These wrap: not to be sanitised, which TRITON_DEBUG=1 would do.
        h0, l0 = tl.umulhi(c0, 0xD2511F53), tl.mul(c0, 0xD2511F53, sanitize_overflow=False)
        h1, l1 = tl.umulhi(c2, 0xCD9E8D57), tl.mul(c2, 0xCD9E8D57, sanitize_overflow=False)
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0, k1 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False), tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
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


_tables: dict[torch.device, Tensor] = {}


def table(levels: str, like: Tensor) -> Tensor:
    """The 256 levels, float32, on like's device where they are no arithmetic of v; else like itself, as a pointer never read."""
    if levels != "kaiming_normal":
        return like
    if like.device not in _tables:
        with torch.inference_mode(False):
            _tables[like.device] = torch.from_numpy(level_table(levels).copy()).to(like.device)
    return _tables[like.device]


def check_columns(**tensors: Tensor | None) -> None:
    """ValueError where the last dimension of one of them isn't contiguous: every kernel counts on that."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name} has stride {tensor.stride(-1)} between its columns, expected 1: call .contiguous()")


def key(basis: Basis) -> tuple[int, int]:
    """The two key words of a basis' seed, low first."""
    return basis.seed & MASK, basis.seed >> 32
