"""u = A x, and out += b ∘ B(d ∘ u) where each row has an adapter of its own: one kernel, whose matrix comes from three places.

The matrix F (A or B, (outputs, inputs)) is read as numbers, read as the raw bytes of basis.basis_bytes, half of bf16, or never
stored: each tile grows from the seed where it is multiplied. A grown tile holds the words of 16 neighbouring inputs, so the sum
over the inputs is taken in 16 strides: no number moves between threads. A is long and thin, so for few tokens its inputs are
dealt out over several programs, whose sums a second kernel adds up, always in one order.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..basis import Basis, level_table
from . import interpreted
from .words import LEVELS, byte, check_columns, key, level, table, words


@triton.jit
def _left(x, d, tokens, rows, ks, T, k_end, s_x, s_d, SCALED: tl.constexpr):
    """A tile of d ∘ x in x's dtype, rounded once; zeros outside, and where a row has no adapter."""
    there = (tokens < T)[:, None] & (ks < k_end)[None, :] & (rows >= 0)[:, None]
    left = tl.load(x + tokens.to(tl.int64)[:, None] * s_x + ks[None, :], mask=there, other=0.0)
    if SCALED:
        scales = tl.load(d + rows.to(tl.int64)[:, None] * s_d + ks[None, :], mask=there, other=0.0)
        left = (left.to(tl.float32) * scales.to(tl.float32)).to(x.dtype.element_ty)
    return left


@triton.jit
def _dot(left, right, total, INTERPRETED: tl.constexpr):
    """left right + total, summed in float32. The interpreter knows no bf16 products; float32's of these numbers are the same."""
    if INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit(do_not_specialize=["matrix", "layer", "k0", "k1"])
def _product(
    out, x, F, d, b, index, levels, T, outputs, inputs, length, adapters, per_row,
    s_out, s_part, s_x, s_F, s_d, s_b, matrix, layer, k0, k1,
    LENGTH: tl.constexpr, SCALED: tl.constexpr, INDEXED: tl.constexpr, SOURCE: tl.constexpr, LEVELS: tl.constexpr,
    BT: tl.constexpr, BO: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0) * BT + tl.arange(0, BT)
    o = tl.program_id(1) * BO + tl.arange(0, BO)
    rows = tokens // per_row
    if INDEXED:
        rows = tl.load(index + rows, mask=tokens < T, other=-1)
        rows = tl.where(rows < adapters, rows, -1).to(tl.int32)
        if tl.max(rows, axis=0) < 0:  # no token of this tile has an adapter
            return
    # This program's inputs: [first, first + length). LENGTH is length, for the interpreter alone: Triton 3.6's can't count a loop
    # to a number that it is given at run time.
    first = tl.program_id(2) * length
    end = LENGTH if LENGTH else length
    low = x.dtype.element_ty
    total = tl.zeros((BT, BO), tl.float32)
    if SOURCE == 2:
        for start in range(0, (end + 15) // 16, BK):
            c = first // 16 + start + tl.arange(0, BK)
            w0, w1, w2, w3 = words(c[:, None], o[None, :], matrix, layer, k0, k1)
            for s in tl.static_range(16):
                grown = level(byte(w0, w1, w2, w3, s), levels, LEVELS).to(low)
                left = _left(x, d, tokens, rows, c * 16 + s, T, inputs, s_x, s_d, SCALED)
                total = _dot(left, grown, total, LENGTH > 0)
    else:
        for start in range(0, end, BK):
            ks = first + start + tl.arange(0, BK)
            left = _left(x, d, tokens, rows, ks, T, inputs, s_x, s_d, SCALED)
            there = (ks < inputs)[:, None] & (o < outputs)[None, :]
            read = tl.load(F + o.to(tl.int64)[None, :] * s_F + ks[:, None], mask=there, other=0)
            if SOURCE == 1:
                right = tl.where(there, level(read.to(tl.int32), levels, LEVELS), 0.0).to(low)
            else:
                right = read.to(low)
            total = _dot(left, right, total, LENGTH > 0)
    there = (tokens < T)[:, None] & (o < outputs)[None, :]
    place = out + tl.program_id(2).to(tl.int64) * s_part + tokens.to(tl.int64)[:, None] * s_out + o[None, :]
    if SCALED:
        there = there & (rows >= 0)[:, None]
        scales = tl.load(b + rows.to(tl.int64)[:, None] * s_b + o[None, :], mask=there, other=0.0)
        total = total * scales.to(tl.float32) + tl.load(place, mask=there, other=0.0).to(tl.float32)
    tl.store(place, total.to(out.dtype.element_ty), mask=there)


@triton.jit
def _total(out, parts, size, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """out = the sum of parts (PARTS, size) over the first, rounded once."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts + part * size + at, mask=at < size, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < size)


@dataclass(frozen=True)
class Bytes:
    """A or B as raw bytes, uint8 (outputs, inputs), and the name of the levels that they stand for."""

    raw: Tensor
    levels: str


@dataclass(frozen=True)
class Grown:
    """A or B that is nowhere stored. matrix: basis.MATRIX_A or MATRIX_B; shape: (outputs, inputs)."""

    basis: Basis
    matrix: int
    shape: tuple[int, int]


Source = Tensor | Bytes | Grown


def numbers(source: Source, like: Tensor) -> Tensor:
    """The matrix (outputs, inputs) in like's dtype: what the plain forms multiply by."""
    if isinstance(source, Bytes):
        return torch.from_numpy(level_table(source.levels).copy()).to(like.device)[source.raw.int()].to(like.dtype)
    if isinstance(source, Grown):
        make = source.basis.B if source.matrix else source.basis.A
        return make(*source.shape, like.device, like.dtype)
    return source.to(like.dtype)


def rank_space(x: Tensor, A: Source) -> Tensor:
    """u = A x in x's dtype, summed in float32. x: (T, n), rows contiguous  ->  (T, r)."""
    out = torch.empty(x.shape[0], _shape(A)[0], dtype=x.dtype, device=x.device)
    _launch(out, x, A, None, None, None, 1)
    return out


def mixed_add(out: Tensor, u: Tensor, d: Tensor, b: Tensor, index: Tensor | None, B: Source, per_row: int = 1) -> Tensor:
    """plain.mixed_add in one kernel, from any source of B: gathers d and b itself, and sums in float32."""
    _launch(out, u, B, d, b, index, per_row)
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)  # as a change in place that torch sees
    return out


class Tile(NamedTuple):
    """A program's work: BT tokens, BO outputs, one of `parts` of the inputs, BK of them at a time (grown: blocks of 16)."""

    BT: int
    BO: int
    BK: int
    num_warps: int
    num_stages: int
    parts: int = 1


def choose_tile(T: int, outputs: int, grown: bool, dtype: torch.dtype) -> Tile:
    """A first choice by arithmetic and by what the compiler says of registers; no measurement has changed it yet."""
    BT = 16 if T <= 16 else 32 if T <= 32 or dtype == torch.float32 else 64
    BO = 16 if outputs <= 512 and T <= 256 else 64  # a thin matrix must be cut up finely to reach every multiprocessor
    if grown:
        return Tile(BT, BO, 16, 4, 1)  # nothing large is read ahead
    if dtype == torch.float32 or T <= 64 or outputs <= 4096:
        return Tile(BT, BO, 64 if dtype != torch.float32 else 32, 4, 3)
    return Tile(128, 128, 64, 8, 3)


def choose_parts(tile: Tile, T: int, outputs: int, inputs: int) -> int:
    """Into how many parts A's inputs go: until a large GPU's multiprocessors have two programs each, or the parts get short."""
    programs = triton.cdiv(T, tile.BT) * triton.cdiv(outputs, tile.BO)
    most = min(256 // programs, inputs // 256, 16)
    return 1 << max(0, most.bit_length() - 1)


def _launch(
    out: Tensor, x: Tensor, F: Source, d: Tensor | None, b: Tensor | None, index: Tensor | None, per_row: int,
    tile: Tile | None = None,
) -> None:  # fmt: skip
    outputs, inputs = _shape(F)
    T = x.shape[0]
    if not T or not outputs or not inputs:
        if d is None:
            out.zero_()
        return
    values = F if isinstance(F, Tensor) else F.raw if isinstance(F, Bytes) else x
    kind = 0 if isinstance(F, Tensor) else 1 if isinstance(F, Bytes) else 2
    basis = F.basis if isinstance(F, Grown) else None
    levels = basis.levels if basis else F.levels if isinstance(F, Bytes) else "uniform"
    check_columns(out=out, x=x, d=d, b=b, F=values)
    if tile is None:
        tile = choose_tile(T, outputs, kind == 2, x.dtype)
        if d is None and out.is_contiguous():
            tile = tile._replace(parts=choose_parts(tile, T, outputs, inputs))
    if kind != 2:
        tile = tile._replace(BK=max(16, min(tile.BK, triton.next_power_of_2(inputs))))
    shape = tile._asdict()
    parts = shape.pop("parts")
    at_once = tile.BK * (16 if kind == 2 else 1)
    length = triton.cdiv(triton.cdiv(inputs, parts), at_once) * at_once if parts > 1 else inputs
    sums = out if parts == 1 else torch.empty(parts, T, outputs, dtype=torch.float32, device=x.device)
    k0, k1 = key(basis) if basis else (0, 0)
    or_none = lambda t: x if t is None else t  # noqa: E731  # a pointer that is never read
    with torch.cuda.device_of(x):
        _product[(triton.cdiv(T, tile.BT), triton.cdiv(outputs, tile.BO), parts)](
            sums, x, values, or_none(d), or_none(b), or_none(index), table(levels, x),
            T, outputs, inputs, length, 0 if d is None else len(d), per_row,
            sums.stride(-2), sums.stride(0) if parts > 1 else 0,
            x.stride(0), values.stride(0), or_none(d).stride(0), or_none(b).stride(0),
            F.matrix if isinstance(F, Grown) else 0, basis.layer_id if basis else 0, k0, k1,
            LENGTH=length if interpreted() else 0, SCALED=d is not None, INDEXED=index is not None,
            SOURCE=kind, LEVELS=LEVELS[levels], **shape,
        )  # fmt: skip
        if parts > 1:
            _total[(triton.cdiv(T * outputs, 256),)](out, sums, T * outputs, PARTS=parts, BLOCK=256, num_warps=2)


def _shape(source: Source) -> tuple[int, int]:
    shape = source.raw.shape if isinstance(source, Bytes) else source.shape
    return shape[0], shape[1]
